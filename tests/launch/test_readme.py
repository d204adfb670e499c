"""Measured figures in README.md and those of dataio and launch/benchmark, compared with the JSON of benchmarks."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "launch" / "benchmark" / "results"
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "launch" / "benchmark" / "README.md").read_text()
DATAIO = (ROOT / "dataio" / "README.md").read_text()


def tracked_texts() -> list[Path]:
    """All README files and other Markdown of the project."""
    folders = ".github", "configs", "dataio", "launch", "polaformer", "slurm"
    return [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))]


def report(name: str, device: str = "cpu") -> dict:
    return json.loads((RESULTS / f"{name}-{device}.json").read_text())


def entries(name: str, *keys: str) -> dict:
    """A report's results by the values of these keys."""
    return {tuple(entry[key] for key in keys): entry for entry in report(name)["results"]}


def row(*cells: str) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def span(values: dict[str, float], digits: int = 1) -> str:
    return f"{values['low']:.{digits}f}–{values['high']:.{digits}f}"


def quickstart_rows() -> list[str]:
    runs = report("quickstart")["runs"]

    def minutes(*stages: str) -> str:
        taken = [sum(run["seconds"][stage] for stage in stages or run["seconds"]) / 60 for run in runs]
        return " · ".join(f"{each:.1f}" for each in taken)

    def each(pattern: str, name: str) -> str:
        return " · ".join(pattern.format(run["speed"][name]) for run in runs)

    def reached(kind: str) -> str:
        top1 = [run["top1"][kind] for run in runs]
        return "–".join(f"{value:.2f}" for value in sorted({min(top1), max(top1)})) + " %"

    machines = " · ".join(f"{run['cores']} {'core' if run['cores'] == 1 else 'cores'}" for run in runs)
    [device] = {run["device"]["name"] for run in runs}
    return [
        f", {machines} of {device} | {minutes()} min, of which set-up {minutes('set-up')} min |",
        f"top-1 of the weights · of the EMA, in both runs | {reached('weights')} · {reached('EMA')} |",
        f"| {each('{:,.0f}', 'images_per_second')} images/s, of which"
        f" {each('{:.0%}', 'waiting_for_data').replace('%', ' %')} waiting for data |",
    ]


def feeding_rows() -> list[str]:
    results = entries("data", "work", "contender")

    def rate(work: str, loader: str) -> str:
        return f"{results[work, loader]['images_per_second']['median']:,.0f}" if (work, loader) in results else ""

    def cpu(loader: str, work: str = "simple") -> str:
        return f"{results[work, loader]['cpu_seconds_per_1000_images']['median']:.1f}"

    def memory(loader: str) -> str:
        return f"{results['simple', loader]['peak_resident_bytes'] / 1e9:.1f} GB"

    loaders = ("torchvision", "timm", "dali")
    own, timm, dali = (f"{cpu(name)} · {cpu(name, 'rand-augment')}" for name in ("ours", "timm", "dali"))
    return [
        row(
            f"encoded images alone (webdataset: {rate('read', 'webdataset')})",
            f"**{rate('read', 'ours')}**",
            "",
            "",
            rate("read", "dali"),
        ),
        *(
            row(
                work if work == "evaluation" else f"`{work}`",
                f"**{rate(work, 'ours')}**",
                *(rate(work, name) for name in loaders),
            )
            for work in ("simple", "rand-augment", "three-augment", "evaluation")
        ),
        row("CPU-seconds for 1,000 images: `simple` · `rand-augment`", f"**{own}**", cpu("torchvision"), timm, dali),
        row("memory at most, workers included: `simple`", f"**{memory('ours')}**", *map(memory, loaders)),
    ]


def packing_rows() -> list[str]:
    titles = {f"ours, --check {check}": f"`dataio.pack --check {check}`" for check in ("none", "header", "decode")}
    titles |= {"cp -r": "`cp -r`", "cp -r, until on disk": "`cp -r`, until on disk", "tar": "`tar`"}
    titles |= {"webdataset": "webdataset's ShardWriter, one process"}
    rows = []
    for (command,), entry in entries("pack", "contender").items():
        seconds = f"{entry['seconds']['median']:.1f}"
        bold = f"**{seconds}**" if command.startswith("ours") else seconds
        ratio = entry["times_faster_than"].get("cp -r")
        faster = "1" if ratio is None else f"{ratio['median']:.1f} ({span(ratio)})"
        rows.append(row(titles[command], f"{bold} ({span(entry['seconds'])})", faster))
    return rows


def summary_rows() -> list[str]:
    data, pack, resume = entries("data", "work", "contender"), entries("pack", "contender"), report("resume")
    simple = data["simple", "ours"]["times_faster_than"]["torchvision"]["median"]
    rand = data["rand-augment", "ours"]["times_faster_than"]["timm"]["median"]
    fresh, resumed = (resume["seconds"][name]["median"] for name in ("fresh", "resumed"))
    own, disk, copy = (pack[name,]["seconds"] for name in ("ours, --check none", "cp -r, until on disk", "cp -r"))
    return [
        f"both on webdataset | {simple:.1f} × · {rand:.1f} × |",
        f"from a state of {resume['state_bytes']} bytes | {fresh:.1f} s · {resumed:.1f} s |",
        f"by what ran before it | {own['median']:.1f} s · {disk['median']:.1f} s · {span(copy)} s |",
    ]


def goodput_row() -> str:
    found = report("goodput")
    restart = found["restart"]
    return row(
        f"a rank of two killed {found['kills']} times in {found['seconds'] / 60:.0f} min: share of time that trained ·"
        " expected; restart, median · longest",
        f"{100 * found['goodput']:.0f} · {100 * found['expected_goodput']:.0f} %;"
        f" {restart['median']:.1f} · {restart['longest']:.1f} s",
    )


def dataio_figures() -> list[str]:
    """Patterns of dataio's figures: seconds of a pack by check, and correlations of its sampler's orders."""
    pack, data, correlation = entries("pack", "contender"), report("pack")["data"], report("resume")["correlation"]
    seconds = {check: pack[f"ours, --check {check}",]["seconds"]["median"] for check in ("decode", "header", "none")}
    full, windowed = correlation["full"], correlation["windowed by 16 shards"]
    return [
        rf"finds before training \| {data['images']:,} JPEGs, {report('pack')['workers']} processes \|",
        *(rf"(?m)^\| `{check}` \| [^|]+ \| {median:.0f} s \|$" for check, median in seconds.items()),
        rf"is\s{full:.3f}\s\(full\)\s+and\s{windowed:.3f}\s\(windows\sof\s16\sshards\)",
    ]


def attention_row() -> str:
    passes = {entry["contender"]: entry["passes"]["both"] for entry in _float32_first_stage()}
    times = " · ".join(
        f"{1e3 * passes[name]['seconds']['median']:.0f}" for name in ("ours", "eager", "compiled", "sdpa")
    )
    return f"| {times} ms |"


def _float32_first_stage() -> list[dict]:
    of_shape = [entry for entry in report("kernel")["results"] if entry["shape"] == "8,1,56x56,96"]
    return [entry for entry in of_shape if entry["dtype"] == "float32"]


def kernel_rows() -> list[str]:
    both = {key: entry["passes"]["both"] for key, entry in entries("kernel", "shape", "dtype", "contender").items()}
    shapes = {"8,1,56x56,96": "(B, H, N, D) = (8, 1, 3136, 96), float32", "8,2,28x28,96": "(8, 2, 784, 96), float32"}
    rows = []
    for shape, title in shapes.items():
        for dtype, cell in (("float32", title), ("bfloat16", "the same, bfloat16")):
            implementations = ("ours", "eager", "compiled", "sdpa")
            own, *others = (f"{1e3 * both[shape, dtype, name]['seconds']['median']:.0f} ms" for name in implementations)
            rows.append(row(cell, f"**{own}**", *others))
    growth = report("kernel")["growth_ratios"][0]
    shares = (f"{both[shape, 'float32', 'ours']['share_of_product_rate']:.0%}".replace("%", " %") for shape in shapes)
    return [
        *rows,
        row(
            f"65,536 tokens against 3,136 ({growth['tokens']:.1f} ×), {growth['dtype']}",
            f"{growth['seconds']:.1f} × the time, {growth['peak_extra_bytes']:.1f} × the memory",
            "",
            "",
            "",
        ),
        f"In float32 that is {' and '.join(shares)} of the machine's rate for large matrix products",
    ]


def profile_rows() -> list[str]:
    rows = []
    for entry in report("profile", "h200")["results"][:3]:
        passes = [entry["passes"][name] for name in ("forward", "backward")]
        shares = " · ".join(f"{100 * each['share_of_copy_rate']:.0f}" for each in passes)
        times = (f"{1e6 * each['seconds']['median']:.0f} µs" for each in passes)
        batch, heads, size, head_dim = entry["shape"].split(",")
        tokens = int(size.split("x")[0]) ** 2
        rows.append(row(f"({batch}, {heads}, {tokens}, {head_dim})", *times, f"{shares} %"))
    return rows


def model_seconds(device: str, dtype: str) -> dict[str, float]:
    """Milliseconds of all depthwise convolutions of b5, by implementation."""
    [model] = [each for each in report("depthwise", device)["models"] if each["dtype"] == dtype]
    return {name: 1e3 * seconds for name, seconds in model["seconds"].items()}


def depthwise_row_of_gpu() -> str:
    of_b5 = model_seconds("h200", "bfloat16")
    return " · ".join(f"{of_b5[name]:.0f}" for name in ("ours", "channels-last", "nchw")) + " ms |"


def depthwise_rows() -> list[str]:
    layouts = ("channels-last", "nchw")
    passes = {(entry["shape"], entry["contender"]): entry["passes"] for entry in report("depthwise", "h200")["results"]}
    titles = {
        "128,56x56,336,3x3": "3×3, 128 × 56² × 336",
        "128,56x56,96,5x5": "5×5 with residual, 128 × 56² × 96",
        "128,28x28,672,3x3": "3×3, 128 × 28² × 672",
        "128,14x14,1568,3x3": "3×3, 128 × 14² × 1568",
    }
    rows = []
    for shape, title in titles.items():
        own, *others = (
            f"{1e3 * passes[shape, name]['both']['seconds']['median']:.2f} ms" for name in ("ours", *layouts)
        )
        shares = (passes[shape, "ours"][name]["share_of_copy_rate"] for name in ("forward", "backward"))
        rows.append(row(title, f"**{own}**", *others, " · ".join(f"{100 * share:.0f}" for share in shares) + " %"))
    models = [
        ("all 114 of b5 at 224², 128 images", "h200", "bfloat16", 1),
        ("the same with 8 images on 2 cores (AMD EPYC, AVX-512), float32", "cpu", "float32", 0),
        ("the same, bfloat16", "cpu", "bfloat16", 0),
    ]
    for title, device, dtype, digits in models:
        times = model_seconds(device, dtype)
        own, *others = (f"{times[name]:.{digits}f} ms" for name in ("ours", *layouts))
        rows.append(row(title, f"**{own}**", *others, ""))
    return rows


@pytest.mark.parametrize(
    "words", [quickstart_rows()[0], summary_rows()[0], goodput_row(), attention_row(), depthwise_row_of_gpu()]
)
def test_figures_of_the_first_screen_are_those_of_the_results(words):
    assert words in README


@pytest.mark.parametrize(
    "words",
    [
        *quickstart_rows()[1:],
        *summary_rows()[1:],
        *feeding_rows(),
        *packing_rows(),
        *kernel_rows(),
        *profile_rows(),
        *depthwise_rows(),
    ],
)
def test_figures_are_those_of_the_results(words):
    assert words in BENCHMARKS


@pytest.mark.parametrize("pattern", dataio_figures())
def test_figures_of_dataio_are_those_of_the_results(pattern):
    assert re.search(pattern, DATAIO)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.split()) < 900
    pages = [
        ROOT / "README.md",
        *ROOT.glob("*/README.md"),
        *ROOT.glob("*/*/README.md"),
        *(ROOT / ".github").glob("*.md"),
    ]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize("path", sorted(path.relative_to(ROOT).as_posix() for path in tracked_texts()))
def test_links_lead_to_files(path):
    text = (ROOT / path).read_text()
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [link for link in links if not re.match(r"https?://", link)]
    assert [link for link in local if not (ROOT / path).parent.joinpath(link).exists()] == []
