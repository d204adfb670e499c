"""The command for machines with a GPU: its parts, its time limits, its files, and where little is installed.

Parts are small Python commands here; those that need a GPU are only planned, and their own parsers read their options.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

from launch.benchmark import (
    __main__,
    depthwise,
    gpu,
    gpu_parts,
    kernel_checks,
    kernel_runner,
    profiling,
    step,
)
from launch.benchmark.gpu_parts import Part, last_line
from launch.benchmark.report import ROOT, format_table, missing_modules

THIN = Path(__file__).with_name("thin_machine.py")


def make_part(name, code, usual=0.0, limit=3600.0, parse_result=last_line, **options):
    return Part(
        name, (sys.executable, "-c", code), usual, limit, parse_result, needs_kernels=name != "build", **options
    )


def run(parts, folder, seconds=float("inf"), archive=None, **clock):
    """{name: its entry in the summary}"""
    report = {"benchmark": "gpu"}
    gpu.run_parts(parts, folder, seconds, report, archive, **clock)
    assert json.loads((folder / "summary.json").read_text()) == report
    return {entry["name"]: entry for entry in report["parts"]}


def outcomes(entries):
    return {name: entry["outcome"] for name, entry in entries.items()}


def read_part(folder, name):
    return json.loads((folder / name / "part.json").read_text())


def test_a_part_that_passes(tmp_path):
    answer = Path(tmp_path, "counted", "answer")
    code = f"import os; print(os.environ['WORD']); open({str(answer)!r}, 'w').write('42')"
    parse_result = lambda folder: (int((folder / "answer").read_text()), "counted")  # noqa: E731
    entries = run([make_part("counted", code, parse_result=parse_result, environ={"WORD": "said"})], tmp_path)
    assert (entries["counted"]["outcome"], entries["counted"]["headline"]) == ("passed", "counted")
    written = read_part(tmp_path, "counted")
    assert written["result"] == 42
    assert written["command"] == [sys.executable, "-c", code]
    assert (written["exit_status"], written["outcome"]) == (0, "passed")
    assert written["seconds"] >= 0
    assert (tmp_path / "counted" / "log.txt").read_text() == "said\n"


def test_after_a_part_that_fails_the_others_run(tmp_path):
    unread = lambda folder: (json.loads((folder / "report.json").read_text()), "")  # noqa: E731
    parts = [
        make_part("failing", "print('why'); raise SystemExit(3)"),
        make_part("killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        make_part("silent", "", parse_result=unread),
        Part("nowhere", ("/nowhere/command",), 0, 3600, last_line),
        make_part("missing", "", missing="not installed: x"),
        make_part("last", "print('still ran')"),
    ]
    entries = run(parts, tmp_path)
    assert outcomes(entries) == {
        **dict.fromkeys(("failing", "killed", "silent", "nowhere"), "failed"),
        "missing": "skipped",
        "last": "passed",
    }
    assert (entries["failing"]["exit_status"], entries["failing"]["headline"]) == (3, "why")
    assert entries["killed"]["exit_status"] == 137
    assert entries["silent"]["headline"].startswith("no result: FileNotFoundError: ")
    assert "No such file" in entries["nowhere"]["headline"]
    assert entries["missing"]["headline"] == "not installed: x"
    assert entries["last"]["headline"] == "still ran"
    (tmp_path / "silent" / "report.json").write_text("[1]")  # of an earlier run into the same folder
    assert outcomes(run([parts[2]], tmp_path)) == {"silent": "failed"}
    table = gpu.format_summary(entries.values())
    assert [line.split()[0] for line in table.splitlines()[2:]] == list(entries)


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def await_end(pid):
    while is_running(pid):
        time.sleep(0.05)


def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_KILL_AFTER_SECONDS", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); "
    child = deaf + "time.sleep(10**6)"
    parent = deaf + f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    parent += "print(c.pid, flush=True); c.wait()"
    obedient, log = make_part("obedient", "import time; time.sleep(10**6)", limit=0.5), tmp_path / "hanging" / "log.txt"
    for limit in (2**n for n in range(1, 12)):  # until the machine is fast enough to have started both
        entries = run([make_part("hanging", parent, limit=limit), obedient, make_part("last", "")], tmp_path)
        assert outcomes(entries) == {
            "hanging": "exceeded its limit",
            "obedient": "exceeded its limit",
            "last": "passed",
        }
        assert entries["hanging"]["seconds"] >= limit
        pids = [word for word in log.read_text().split() if word.isdecimal()]
        if log.read_text().count("deaf") == 2 and pids:
            break
    await_end(pids[0])


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [(), ("sh", "-c", 'trap "" INT; "$@"', "sh")], ids=["", "as in the background"])
def test_tests_that_exceed_their_limit_still_say_what_failed(tmp_path, monkeypatch, prefix):
    """Also where a shell started the command in the background, which makes it deaf to Ctrl-C."""
    tests, folder = tmp_path / "test_endless.py", tmp_path / "endless"
    tests.write_text("import time\ndef test_a(): assert 0\ndef test_b(): time.sleep(10**6)\n")
    monkeypatch.setattr(gpu_parts, "_WORKERS", 2)
    command = [*gpu_parts._pytest(folder, str(tests)), "-m", "not gpu"]
    written = "import sys; from pathlib import Path; from launch.benchmark import gpu; from launch.benchmark.gpu_parts "
    written += "import Part, parse_tests; part = Part('endless', tuple(sys.argv[3:]), 0, 0, parse_tests); "
    written += "gpu.run_part(part, Path(sys.argv[1]), float(sys.argv[2]))"
    for limit in (2**n for n in range(3, 12)):  # until the machine is fast enough to have begun the second test
        runner = [*prefix, sys.executable, "-c", written, str(folder), str(limit), *command]
        subprocess.run(runner, cwd=ROOT, check=True)
        entry = read_part(tmp_path, "endless")
        assert entry["outcome"] == "exceeded its limit"
        if entry["result"] and entry["result"]["failures"]:
            break
    assert [name.rpartition(".")[2] for name in entry["result"]["failed"]] == ["test_a"]
    assert entry["headline"].startswith("1 failures")
    assert "assert 0" in (folder / "log.txt").read_text()


def test_parts_that_do_not_fit_into_the_time_are_left_out(tmp_path):
    """A part may begin if it usually fits into what is left, and never runs for longer than that."""
    now = [0.0]

    def taking(seconds):  # a part's parse_result, in which the test's clock goes on
        return lambda folder: now.append(now[-1] + seconds) or (None, "")

    parts = [
        make_part("first", "", usual=1, parse_result=taking(10_000)),
        make_part("long", "", usual=20_000),
        make_part("short", "", usual=1, parse_result=taking(9_999)),
        make_part("longer than usual", "import time; time.sleep(10**6)", usual=1, parse_result=taking(1)),
        make_part("late", "", usual=1),
    ]
    entries = run(parts, tmp_path, seconds=20_000, clock=lambda: now[-1])
    assert outcomes(entries) == {
        "first": "passed",
        "long": "left out",
        "short": "passed",
        "longer than usual": "exceeded its limit",
        "late": "left out",
    }
    assert entries["long"]["headline"].startswith("takes about 20000 s, and 10000 s are left")
    assert entries["late"]["headline"] == "takes about 1 s, and 0 s are left"
    assert not (tmp_path / "late").exists()


def test_without_kernels_parts_that_need_them_are_skipped(tmp_path):
    parts = [make_part("build", "raise SystemExit(1)"), make_part("needs them", "")]
    free = Part("needs none", (sys.executable, "-c", ""), 0, 3600, last_line, needs_kernels=False)
    entries = run([*parts, free], tmp_path)
    assert outcomes(entries) == {"build": "failed", "needs them": "skipped", "needs none": "passed"}
    assert entries["needs them"]["headline"] == "no kernels that run here, see build"


def test_advice_of_pytorch_is_no_headline(tmp_path):
    error = "RuntimeError: CUDA error: an illegal memory access was encountered"
    advice = "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable it.\n"
    (tmp_path / "log.txt").write_text(f"Traceback\n{error}\n{advice}\n")
    assert last_line(tmp_path) == (None, error)


@pytest.mark.parametrize(
    ("program", "fault", "printed"),
    [
        ("print('kernels run')", "", "kernels run\n"),
        ("import os; print('one failed', flush=True); os.abort()", "", "one failed\n"),
        ("raise SystemExit('they were not built')", "they were not built", ""),
        ("import os; os.abort()", "exit status -6", ""),
        ("import time; time.sleep(10**6)", "", "kernels are there, but the first run of one took more than 2 s\n"),
    ],
)
def test_faults_that_a_rebuild_would_repair(monkeypatch, capfd, program, fault, printed):
    """Kernels that are not there or not for this GPU; not those that fail or hang."""
    monkeypatch.setattr(kernel_checks, "_TRY", program)
    monkeypatch.setattr(kernel_checks, "_LONGEST_SECONDS", 2 if "sleep" in program else 3600)
    assert kernel_checks.find_fault() == fault
    assert capfd.readouterr().out == printed


INTERRUPTED = """
import json, os, signal, sys
from pathlib import Path
from launch.benchmark import gpu
from launch.benchmark.gpu_parts import Part, last_line
root, limit, *names = sys.argv[1:]
forks = {}
for name in names:
    forks[name] = os.fork()
    if forks[name] == 0:
        break
else:
    statuses = {name: os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) for name, fork in forks.items()}
    sys.exit(print(json.dumps(statuses)))
signal.signal(signal.SIGTERM, gpu._stop)
Path(root, name).mkdir(parents=True)
Path(root, name, "process").write_text(str(os.getpid()))
endless = "import os, time; print(os.getpid(), flush=True); time.sleep(10**6)"
parts = [
    Part("first", (sys.executable, "-c", "print('measured')"), 0, 3600, last_line),
    Part("second", (sys.executable, "-c", endless), 0, float(limit), last_line),
]
folder = Path(root, name, "results")
gpu.run_parts(parts, folder, float("inf"), {"benchmark": "gpu"}, folder.with_suffix(".tar.gz"))
"""


def test_results_survive_a_kill(tmp_path):
    """And what was running ends: at once, or where nobody is left who could end it, at its limit."""
    names = ("SIGKILL", "SIGTERM", "SIGINT")
    for limit in (2**n for n in range(1, 12)):  # until the machine is fast enough to be interrupted before its end
        root = tmp_path / str(limit)
        logs = [root / name / "results/second/log.txt" for name in names]
        command = [sys.executable, "-c", INTERRUPTED, str(root), str(limit), *names]
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
        )
        while process.poll() is None and not all(log.exists() and log.read_text().endswith("\n") for log in logs):
            time.sleep(0.05)
        for name in names:
            with suppress(ProcessLookupError):
                os.kill(int((root / name / "process").read_text()), signal.Signals[name])
        statuses = json.loads(process.communicate()[0].splitlines()[-1])
        found = {read_part(root / name / "results", "second")["outcome"] for name in names}
        if all(statuses.values()) and found == {"running"}:
            break
    assert statuses.keys() == set(names)
    assert all(statuses.values())
    for name, log in zip(names, logs, strict=True):
        folder = root / name / "results"
        assert read_part(folder, "first")["headline"] == "measured"
        assert read_part(folder, "second")["outcome"] == "running"
        summary = json.loads((folder / "summary.json").read_text())
        assert [entry["name"] for entry in summary["parts"]] == ["first"]
        with tarfile.open(folder.with_suffix(".tar.gz")) as packed:
            wanted = {"results/summary.json", "results/first/part.json", "results/first/log.txt"}
            assert wanted <= set(packed.getnames())
        await_end(int(log.read_text().split()[0]))  # what was running may have said that it was interrupted


# --- The plan -------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(tmp_path):
    return {part.name: part for part in gpu_parts.plan_parts(tmp_path)}


def test_the_plan(planned):
    order = "build check check-awkward kernels kernel depthwise step tests counters memcheck racecheck compiled"
    order += " operators compiled-step all-tests data resume checkpoint goodput full"
    assert list(planned) == order.split()
    assert all(0 < part.expected_seconds < part.timeout_seconds for part in planned.values())
    within = gpu.choose_parts(list(planned.values()), ["kernels", "check"])
    assert [part.name for part in within] == ["check", "kernels"]
    first = ("build", "check", "check-awkward", "kernels", "kernel", "depthwise", "step", "tests")
    assert sum(planned[name].expected_seconds for name in first) < 6 * 60
    started = {part.command[3] for part in planned.values() if part.command[2] == "launch.benchmark"}
    assert started == __main__.COMMANDS.keys() - {"gpu", "pack", "parity", "sass"}  # all that use a GPU


def test_the_plan_is_listed_without_a_gpu(planned, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert gpu.main(["--list", "--output", str(tmp_path / "unused")]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert [row[0] for row in rows[2 : 2 + len(planned)]] == list(planned)
    assert rows[2] == ["build", "GPU", "20", "300"]
    assert ["counters", "GPU,", "kernels,", "ncu", "50", "150"] in rows
    assert ["resume", "GPU,", "nvidia.dali,", "pydantic,", "matplotlib,", "skimage", "300", "1800"] in rows
    assert "\nskipped here: counters: ncu is neither on the PATH nor in CUDA_HOME/bin\n" in printed
    assert not (tmp_path / "unused").exists()


def test_commands_understand_their_options(planned, tmp_path):
    for name, part in planned.items():
        module, command, *arguments = *part.command[2:], ""
        if module != "launch.benchmark":
            continue
        options = import_module(f"launch.benchmark.{__main__._MODULES.get(command, command)}").parse(arguments[:-1])
        assert options.output == tmp_path / name / "report.json"
        assert options.device == "cuda"
    assert kernel_checks.parse(list(planned["check"].command[3:])).output == tmp_path / "check" / "report.json"
    for name, mode in {"counters": "profiled", "memcheck": "tiny", "racecheck": "tiny"}.items():
        words = planned[name].command
        begin = words.index("launch.benchmark.kernel_checks")
        assert kernel_checks.parse(list(words[begin + 1 : begin + 2])).mode == mode
    for path in planned["tests"].command[-len(gpu_parts._KERNEL_TESTS) :]:
        assert (ROOT / path).exists()


def test_tools_of_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    (tmp_path / "compute-sanitizer").touch(mode=0o755)
    planned = {part.name: part for part in gpu_parts.plan_parts(tmp_path)}
    assert planned["memcheck"].command[0] == str(tmp_path / "compute-sanitizer")
    assert planned["memcheck"].missing == ""
    assert planned["counters"].missing == "ncu is neither on the PATH nor in CUDA_HOME/bin"
    assert missing_modules("torch", "nowhere.at_all", "json.nothing") == "not installed: nowhere.at_all, json.nothing"


# --- The parts' results ---------------------------------------------------------------------------------------


def test_counts_of_tests(tmp_path):
    tests = tmp_path / "test_three.py"
    tests.write_text("import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('so')\n")
    command = [sys.executable, "-m", "pytest", "-q", str(tests), f"--junitxml={tmp_path / 'tests.xml'}"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
    counts, headline = gpu_parts.parse_tests(tmp_path)
    assert counts == {
        "tests": 3,
        "failures": 1,
        "errors": 0,
        "skipped": 1,
        "passed": 1,
        "failed": ["test_three.test_b"],
    }
    assert headline == "1 passed, 1 failures, 1 skipped"


def test_headlines_of_reports(tmp_path, small_peak_measurements):
    """Of what the commands write here, on the CPU; and of a shape and a model that failed."""
    output = ("--device", "cpu", "--output", str(tmp_path / "report.json"))
    shapes = ("--shapes", "1,1,4x4,8", "1,2,3x5,8", "--runs", "2")
    assert profiling.main([*shapes, *output]) == 0
    report, headline = gpu_parts.parse_profile(tmp_path)
    assert re.fullmatch(r"1,1,4x4,8 \d+ \+ \d+ µs; 1,2,3x5,8 \d+ \+ \d+ µs", headline)
    assert (
        profiling.headline({"profiled": "kernels", "results": [{"shape": "1,1,4x4,8", "skipped": "so"}]})
        == "1,1,4x4,8 failed"
    )

    small = ("--batch", "2", "--resolution", "32")
    assert profiling.main(["--model", "polaformerpp_b0", *small, "--runs", "1", *output]) == 0
    report, headline = gpu_parts.parse_profile(tmp_path)
    assert re.fullmatch(r"polaformerpp_b0: \d+ ms a step; (\S+ \d+ %, ){2}\S+ \d+ %", headline)

    models = ("--models", "polaformerpp_b0", "--modes", "eager", *small)
    assert step.main([*models, "--seconds", "0.01", *output]) == 0
    report, headline = gpu_parts.parse_steps(tmp_path)
    assert re.fullmatch(r"images/s: polaformerpp_b0 \d+", headline)
    assert step.headline({"results": [{"model": "b5", "skipped": "so"}]}) == "images/s: b5 failed"

    of_b0 = ("--models", "polaformerpp_b0", "--resolutions", "32", "--batch", "1", "--dtype", "float32")
    layouts = ("--implementations", "ours", "channels-last", "nchw")
    assert depthwise.main([*of_b0, *layouts, "--seconds", "0.01", *output]) == 0
    report, headline = gpu_parts.parse_depthwise(tmp_path)
    assert re.fullmatch(r"polaformerpp_b0 at 32, float32: \S+ ms, \S+× the better layout", headline)
    report["models"][0] |= {"seconds": {}, "times_faster_than": {}}
    assert depthwise.headline(report) == "polaformerpp_b0 at 32, float32: not measured"


def test_counters(tmp_path):
    """The form that Nsight Compute writes, with few of its two thousand columns."""
    columns = "ID", "Process ID", "Kernel Name", "Block Size", "gpu__time_duration.sum", "gpu__time_duration.max"
    columns += "sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_elapsed", "sm__warps_active.avg.per_second"
    rows = [
        columns,
        ("", "", "", "", "ns", "ns", "%", "1/s"),
        ("0", "7", "void bf16::<unnamed>::sum_keys<96>(ForwardParams)", "(192, 1, 1)", "53,216", "1", "71.25", "2"),
        ("1", "7", "void bf16::<unnamed>::attend<96>(ForwardParams)", "(128, 1, 1)", "92784", "1", "(!) n/a", "2"),
    ]
    lines = ["==PROF== Connected to process 7", *(",".join(f'"{cell}"' for cell in row) for row in rows)]
    (tmp_path / "counters.csv").write_text("\n".join(lines) + "\n")
    launches, headline = gpu_parts.parse_table(tmp_path / "counters.csv")
    assert launches == [
        {"kernel": rows[2][2], "metrics": {"gpu__time_duration.sum": 53216.0, columns[6]: 71.25}},
        {"kernel": rows[3][2], "metrics": {"gpu__time_duration.sum": 92784.0, columns[6]: "(!) n/a"}},
    ]
    assert headline == "2 launches, 146 µs"
    for empty in ("==WARNING== No kernels were profiled.\n", "\n".join(lines[:3]) + "\n"):
        (tmp_path / "counters.csv").write_text(empty)
        with pytest.raises(ValueError, match="no launch of a kernel of ours"):
            gpu_parts.parse_table(tmp_path / "counters.csv")


@pytest.mark.parametrize(
    ("summary", "counts"),
    [
        ("ERROR SUMMARY: 0 errors", {"error": 0}),
        ("ERROR SUMMARY: 1 error", {"error": 1}),
        ("RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", {"hazard": 2, "error": 1, "warning": 1}),
    ],
)
def test_summary_of_a_sanitizer(tmp_path, summary, counts):
    (tmp_path / "log.txt").write_text(f"========= COMPUTE-SANITIZER\nran\n========= {summary}\n")
    assert gpu_parts.parse_sanitizer(tmp_path) == (counts, summary.partition(": ")[2])


def test_tables():
    rows = [("a", "1", "2"), ("longer", "skipped")]
    assert format_table(("name", "x", "y"), rows).splitlines() == [
        "name          x  y",
        "──────  ───────  ─",
        "a             1  2",
        "longer  skipped",
    ]
    assert format_table(("name", "x", "y"), rows, markdown=True).splitlines() == [
        "| name   |       x | y |",
        "| ------ | ------: | : |",
        "| a      |       1 | 2 |",
        "| longer | skipped |   |",
    ]


# --- The check ------------------------------------------------------------------------------------------------


@pytest.fixture
def two_cases(monkeypatch):
    monkeypatch.setattr(kernel_checks, "EDGE_CASES", (("2,3,7x9,16", "bfloat16"), ("1,1,5x3,6", "float32")))


def check_on_cpu(folder):
    output = folder / "report.json"
    status = kernel_checks.main(["errors", "--shapes", "awkward", "--device", "cpu", "--output", str(output)])
    return status, json.loads(output.read_text())["checks"], gpu_parts.parse_checks(folder)[1]


def test_the_check(two_cases, tmp_path, capsys):
    status, checks, headline = check_on_cpu(tmp_path)
    assert status == 0
    assert headline == "2 of 2 right and bit-identical"
    assert [list(entry["errors"]) for entry in checks] == [["0", "1"], ["0"]]  # of the first and the last image
    for entry in checks:
        for sizes in entry["errors"]["0"].values():
            assert all(0 <= error["ours"] <= error["allowed"] for error in sizes.values())
    assert capsys.readouterr().out.count("bit-identical") == 2


def test_the_check_finds_what_is_wrong(two_cases, tmp_path, monkeypatch):
    right, calls = kernel_runner.ops.polarity_attention, []

    def unsteady(*inputs):
        calls.append(inputs)
        return right(*inputs) * (1 if len(calls) % 2 else float("nan"))

    monkeypatch.setattr(kernel_runner.ops, "polarity_attention", unsteady)
    status, checks, headline = check_on_cpu(tmp_path)
    assert status == 1
    assert "; wrong: 2,3,7x9,16 bfloat16" in headline
    assert checks[0]["bit_identical"] is False
    assert checks[0]["too_large"][0].startswith("out of image 1: largest error nan, allowed ")


def test_tiny_runs(monkeypatch, capsys):
    monkeypatch.setattr(kernel_checks, "TINY", (("1,1,1x1,6", "float32"), ("2,1,3x5,8", "bfloat16")))
    assert kernel_checks.main(["tiny", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count(": ran\n") == 4 + 3 * len(kernel_checks.TINY_CONVOLUTIONS)


# --- Where little is installed --------------------------------------------------------------------------------


def test_commands_start_with_torch_and_timm_alone(command, tmp_path):
    """Also the kernels' tests, and two measurements."""
    reports = [tmp_path / "kernel.json", tmp_path / "profile.json"]
    measurement = "--device", "cpu", "--shapes", "1,1,4x4,8", "--dtype", "float32", "--output"
    commands = [
        *(("launch.benchmark", name, "--help") for name in ("gpu", "kernel", "depthwise", "profile", "step")),
        ("launch.benchmark.kernel_checks", "--help"),
        ("pytest", "--collect-only", "-q", "-m", "gpu", *gpu_parts._KERNEL_TESTS),
        ("launch.benchmark", "kernel", *measurement, str(reports[0]), "--growth", "--implementations", "ours", "eager",
         "--seconds", "0.01"),
        ("launch.benchmark", "profile", *measurement, str(reports[1])),
    ]  # fmt: skip
    finished = command(THIN, json.dumps(commands), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert finished.returncode == 0, finished.stderr
    for words, (status, output, errors) in zip(commands, json.loads(finished.stdout), strict=True):
        assert status == 0, f"{words}: {output}{errors}"
        if words[-1] == "--help":
            assert output.startswith(f"usage: python -m {' '.join(words[:-1])} ")
            assert errors == ""
    assert all(json.loads(path.read_text())["results"] for path in reports)
