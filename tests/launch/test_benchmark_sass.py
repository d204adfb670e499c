"""Reading of machine code: names, loops and their trip counts; the command on code that was written for it."""

import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from launch.benchmark import __main__, machine_code, sass
from launch.benchmark.kernel_costs import WORK, LoopNest, Work, cost
from launch.benchmark.machine_code import PADDED_HEAD_DIMS, Instruction, Kernel, UnmatchedLoops

ROOT = Path(__file__).parents[2]


def assemble(text: str) -> list[Instruction]:
    """Instructions from lines such as `loop: @!P0 BRA loop`; `× 3` after one repeats it."""
    lines, labels = [], {}
    for line in filter(None, map(str.strip, text.splitlines())):
        label, predicate, opcode, operands, times = re.fullmatch(
            r"(?:(\w+): *)?(@!?\w+ )?([A-Z]\S*) *(.*?)(?: *× (\d+))?", line
        ).groups(default="")
        if label:
            labels[label] = f"{16 * len(lines):#x}"
        lines += int(times or 1) * [(predicate.strip(), opcode, operands)]
    words = re.compile("|".join(rf"\b{label}\b" for label in labels) or "$^")
    return [
        Instruction(16 * i, predicate, opcode, words.sub(lambda found: labels[found[0]], operands))
        for i, (predicate, opcode, operands) in enumerate(lines)
    ]


@pytest.mark.parametrize(
    ("symbol", "identity"),
    [
        ("_ZN10polaformer12_GLOBAL__N_16attendINS_8Bfloat16ELi96EEEvNS_13ForwardParamsE", ("attend", "bf16", 96)),
        ("_ZN10polaformer4bf1612_GLOBAL__N_18sum_keysILi128EEEvNS_13ForwardParamsE", ("sum_keys", "bf16", 128)),
        ("_ZN10polaformer4tf3212_GLOBAL__N_18sum_keysINS_11Tf32OperandILb1ELb1EEELi32EEEvNS_13ForwardParamsE",
         ("sum_keys", "float32", 32)),
        ("_ZN10polaformer12_GLOBAL__N_121differentiate_queriesINS_11Tf32OperandILb0ELb0EEELi64EEEvNS_14BackwardParamsE",
         ("differentiate_queries", "generic 16-bit", 64)),
        ("_ZN10polaformer12_GLOBAL__N_129differentiate_queries_shifted"
         "INS_11Tf32OperandILb0ELb1EEELi64EEEvNS_14BackwardParamsE",
         ("differentiate_queries_shifted", "generic float32", 64)),
        ("_ZN10polaformer12_GLOBAL__N_118combine_key_splitsILb0EEEvNS_13ForwardParamsE",
         ("combine_key_splits", "16", 0)),
        ("_ZN10polaformer12_GLOBAL__N_118combine_key_splitsILb1EEEvNS_13ForwardParamsE",
         ("combine_key_splits", "float32", 0)),
        ("_ZN10polaformer12_GLOBAL__N_120combine_query_splitsENS_14BackwardParamsE", ("combine_query_splits", "", 0)),
        ("_Z18fill_rotary_tablesv", ("fill_rotary_tables", "", 0)),
        ("plain", ("plain", "", 0)),
    ],
)  # fmt: skip
def test_names(symbol, identity):
    assert machine_code.identify(symbol) == identity


NESTED = """
        MOV R1, R2
outer:  FADD R0, R0, R1
        @P3 BRA cold
back:   BRA.DIV UR4, never
inner:  HMMA.16816.F32.BF16 R0, R4, R8, R0
        @!P0 BRA inner
        @P1 BRA outer
        EXIT
cold:   MUFU.EX2 R0, R0
        BRA back
never:  WARPSYNC.COLLECTIVE R10, inner
        BRA inner
"""
ROTATED = """
outer:  FADD R0, R0, R1
inner:  HMMA.16816.F32.BF16 R0, R4, R8, R0
        @P0 CALL.REL.NOINC after
        BRA inner
after:  @P1 EXIT
        BRA outer
"""


@pytest.mark.parametrize(
    ("text", "outer", "inner"),
    [
        (NESTED, "FADD BRA BRA.DIV BRA MUFU.EX2 BRA", "HMMA.16816.F32.BF16 BRA"),
        (ROTATED, "FADD EXIT BRA", "HMMA.16816.F32.BF16 CALL.REL.NOINC BRA"),
    ],
    ids=["with a cold path behind", "with unconditional branches back"],
)
def test_loops(text, outer, inner):
    (loop,) = machine_code.find_loops(assemble(text))
    assert [instruction.opcode for instruction in loop.instructions] == outer.split()
    (within,) = loop.inner
    assert [instruction.opcode for instruction in within.instructions] == inner.split()
    assert not within.inner
    assert (loop.products, within.products, loop.multiplies) == (0, 1, True)


def test_code_without_loops():
    assert machine_code.find_loops(assemble("FADD R0, R0, R1\nEXIT\nself: BRA self")) == []
    with pytest.raises(UnmatchedLoops, match="an indirect branch at 0x0"):
        machine_code.find_loops(assemble("BRX R2"))


COLUMNS = Work(
    rows=1,
    warps=lambda w: 3,
    loop=LoopNest("tokens", lambda w: 1, (LoopNest("columns", lambda w: 4, (LoopNest("parts", lambda w: 2),)),)),
    products=lambda w: 3 * 8,
)
CODES = {
    "as written": """
        tokens:  FADD R0, R0, R1
        columns: FMUL R0, R0, R1
        parts:   HMMA R0, R0, R1
                 MUFU.EX2 R0, R0
                 @P0 BRA parts
                 @P1 BRA columns
                 @P2 BRA tokens
                 EXIT""",
    "innermost unrolled": """
        tokens:  FADD R0, R0, R1
        columns: FMUL R0, R0, R1
                 HMMA R0, R0, R1 × 2
                 MUFU.EX2 R0, R0 × 2
                 @P1 BRA columns
                 @P2 BRA tokens
                 EXIT""",
    "innermost unrolled, columns by two": """
        tokens:  FADD R0, R0, R1
        columns: FMUL R0, R0, R1 × 2
                 HMMA R0, R0, R1 × 4
                 MUFU.EX2 R0, R0 × 4
                 @P1 BRA columns
                 @P2 BRA tokens
                 EXIT""",
    "columns unrolled": """
        tokens:  FADD R0, R0, R1
                 FMUL R0, R0, R1
        one:     HMMA R0, R0, R1
                 MUFU.EX2 R0, R0
                 @P0 BRA one
                 FMUL R0, R0, R1
        two:     HMMA R0, R0, R1
                 MUFU.EX2 R0, R0
                 @P0 BRA two
                 FMUL R0, R0, R1
        three:   HMMA R0, R0, R1
                 MUFU.EX2 R0, R0
                 @P0 BRA three
                 FMUL R0, R0, R1
        four:    HMMA R0, R0, R1
                 MUFU.EX2 R0, R0
                 @P0 BRA four
                 @P2 BRA tokens
                 EXIT""",
    "first columns peeled": """
        tokens:  FADD R0, R0, R1
                 FMUL R0, R0, R1
                 HMMA R0, R0, R1 × 2
                 MUFU.EX2 R0, R0 × 2
        columns: FMUL R0, R0, R1
                 HMMA R0, R0, R1 × 2
                 MUFU.EX2 R0, R0 × 2
                 @P1 BRA columns
                 @P2 BRA tokens
                 EXIT""",
    "all unrolled, two tiles of tokens": """
        tokens:  FADD R0, R0, R1 × 2
                 FMUL R0, R0, R1 × 8
                 HMMA R0, R0, R1 × 16
                 MUFU.EX2 R0, R0 × 16
                 @P2 BRA tokens
                 EXIT""",
}


def kernel_of(text: str) -> Kernel:
    return Kernel("sm_90a", "", "attend", "bf16", 32, code=assemble(text))


@pytest.mark.parametrize("text", CODES.values(), ids=CODES)
def test_costs_are_the_same_however_loops_are_compiled(text):
    counted = cost(kernel_of(text), COLUMNS)
    assert counted.warps == 3
    assert counted.classes["FP32/HFMA2"] == 3 * (1 + 4)
    assert counted.classes["HMMA"] == counted.classes["MUFU"] == 3 * 8
    assert counted.instructions == sum(counted.classes.values())


def test_trips():
    assert list(cost(kernel_of(CODES["as written"]), COLUMNS).trips.values()) == [1, 4, 8]
    assert list(cost(kernel_of(CODES["first columns peeled"]), COLUMNS).trips.values()) == [1, 3]
    assert list(cost(kernel_of(CODES["all unrolled, two tiles of tokens"]), COLUMNS).trips.values()) == [Fraction(1, 2)]


@pytest.mark.parametrize(
    ("columns", "parts", "extra", "fault"),
    [(3, 2, 0, "no"), (4, 1, 0, "no"), (4, 4, 0, "several"), (4, 2, 1, "no")],
    ids=["fewer", "none", "either may be unrolled", "extra"],
)
def test_wrong_trips_are_refused(columns, parts, extra, fault):
    loop = LoopNest(
        "tokens", lambda w: 1, (LoopNest("columns", lambda w: columns, (LoopNest("parts", lambda w: parts),)),)
    )
    wrong = Work(1, lambda w: 3, loop, lambda w: 3 * 8, {"means": lambda w: 3 * extra})
    message = (
        f"sm_90a attend<bf16, 32>: {fault} trip counts of its loop over tokens give the 24 + {3 * extra} (means) HMMAs"
        f" that 3 warps need for 16 tokens; declared is tokens × 1 (columns × {columns} (parts × {parts})), the"
        " code has 0x0: 0 HMMA of 2 (0x10: 0 HMMA of 2 (0x20: 1 HMMA of 3));"
        " correct WORK in launch/benchmark/kernel_costs.py"
    )
    with pytest.raises(UnmatchedLoops, match=re.escape(message)):
        cost(kernel_of(CODES["as written"]), wrong)


def test_a_loop_without_products_must_be_declared():
    code = kernel_of("""
        tokens: HMMA R0, R0, R1 × 8
        rows:   STG.E.64 R0, R1
                @P0 BRA rows
                @P1 BRA tokens
                EXIT""")
    without = Work(1, lambda w: 1, LoopNest("tokens", lambda w: 1), lambda w: 8)
    with pytest.raises(UnmatchedLoops, match="no trip counts"):
        cost(code, without)
    rows = LoopNest("rows", lambda w: 5, multiplies=False)
    counted = cost(code, Work(1, lambda w: 1, LoopNest("tokens", lambda w: 1, (rows,)), lambda w: 8))
    assert counted.classes["LDG/STG/LDGSTS"] == 5
    assert counted.shared_clocks == 10


@pytest.mark.parametrize(
    ("opcode", "kind", "shared_clocks"),
    [
        ("FFMA", "FP32/HFMA2", 0),
        ("HFMA2.BF16_V2", "FP32/HFMA2", 0),
        ("F2FP.BF16.F32.PACK_AB", "ALU", 0),
        ("IMAD.MOV.U32", "IMAD", 0),
        ("MUFU.EX2", "MUFU", 0),
        ("HGMMA.64x48x16.F32.BF16", "HGMMA", 3),
        ("LDSM.16.MT88.4", "LDSM", 4),
        ("LDSM.16.M88.2", "LDSM", 2),
        ("LDSM.16.M88", "LDSM", 1),
        ("STS.64", "LDS/STS", 2),
        ("LDGSTS.E.BYPASS.128", "LDG/STG/LDGSTS", 4),
        ("SHFL.BFLY", "SHFL", 1),
        ("BAR.SYNC.DEFER_BLOCKING", "BAR", 0),
        ("UIADD3", "other", 0),
    ],
)
def test_classes(opcode, kind, shared_clocks):
    instruction = Instruction(0, "", opcode, "")
    assert (instruction.kind, instruction.shared_clocks) == (kind, shared_clocks)


def symbol_of(name: str, width: int) -> str:
    return f"_ZN10polaformer4bf1612_GLOBAL__N_1{len(name)}{name}ILi{width}EEEvNS_13ForwardParamsE"


def write_dumps(folder: Path, kernels: list[tuple[str, int]], architecture: str = "sm_90a") -> None:
    """What cuobjdump would print of kernels that have one loop, over tokens, with an FFMA for every HMMA."""
    usage, elf, code = [f"arch = {architecture}"], [f"arch = {architecture}"], [f"\tcode for {architecture}"]
    for name, width in kernels:
        symbol, work = symbol_of(name, width), WORK[name]
        usage += [f" Function {symbol}:", "  REG:100 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:984"]
        elf += [f".nv.info.{symbol}", "\tAttribute:\tEIATTR_MAX_THREADS", "\tFormat:\tEIFMT_SVAL"]
        elf += ["\tValue:\t0x80 0x1 0x1 "]
        count = work.all_products(width) / work.warps(width) / work.loop.trips(width)
        assert count == int(count)
        body = int(count) * "FFMA R0, R0, R1, R2\nHMMA.16816.F32.BF16 R0, R4, R8, R0\n"
        code += [f"\t\tFunction : {symbol}"]
        for address, predicate, opcode, operands in assemble(f"loop: {body}@!P0 BRA loop\nEXIT"):
            written = f"{predicate} {opcode} {operands}".rstrip()
            code += [f"        /*{address:04x}*/       {written} ;      /* 0x000fe400078e00ff */", f"{'':60}/* 0x0 */"]
    for name, lines in (("--dump-resource-usage", usage), ("--dump-elf", elf), ("--dump-sass", code)):
        (folder / name).write_text("\n".join(lines) + "\n")


@pytest.fixture
def extension(tmp_path, monkeypatch) -> Path:
    """A file that the cuobjdump on the PATH takes for an extension: it prints what lies beside it."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    tool = tmp_path / "cuobjdump"
    tool.write_text(f'#!/bin/sh\ncat "{tmp_path}/$1"\n')
    tool.chmod(0o755)
    write_dumps(tmp_path, [(name, width) for name in WORK for width in PADDED_HEAD_DIMS])
    path = tmp_path / "_cuda.so"
    path.touch()
    return path


def run(*arguments: object) -> int:
    return __main__.import_module("launch.benchmark.sass").main(list(map(str, arguments)))


def test_the_command(extension, tmp_path, capsys):
    path = tmp_path / "new" / "sass.json"
    assert run("--extension", extension, "--output", path) == 0
    printed, report = capsys.readouterr().out, json.loads(path.read_text())
    assert report["benchmark"] == "sass"
    assert [(entry["kernel"], entry["padded_width"]) for entry in report["kernels"]] == [
        (name, width) for name in WORK for width in PADDED_HEAD_DIMS
    ]
    for entry in report["kernels"]:
        work, width = WORK[entry["kernel"]], entry["padded_width"]
        assert entry["instructions"]["HMMA"] == entry["instructions"]["FP32/HFMA2"] == work.all_products(width)
        assert entry["all_instructions"] == sum(entry["instructions"].values())
        assert (entry["registers"], entry["threads"], entry["blocks_by_registers"]) == (100, 128, 4)
        assert (entry["static_shared_bytes"], entry["stack_bytes"], entry["local_accesses"]) == (1024, 0, 0)
    written = {tuple(line.split()) for line in printed.splitlines()}
    assert {
        ("HMMA", *(str(work.all_products(width)) for width in PADDED_HEAD_DIMS)) for work in WORK.values()
    } <= written
    assert "Lower bounds for 128,1,56x56,96 in bf16 on one H100, µs: predicted, not measured" in printed
    assert "share of copy bandwidth" in printed
    heading = "Polarity attention's CUDA kernels for bf16; those of depthwise convolution are not counted"
    assert printed.splitlines()[0] == heading

    assert run("--extension", extension, "--markdown") == 0
    printed = capsys.readouterr().out
    assert "### attend, sm_90a: warp instructions for 16 tokens of one head\n\n|" in printed
    assert all(line.startswith(("#", "|")) for line in filter(None, printed.splitlines()))


def test_predictions_follow_from_the_counts(extension, tmp_path):
    path = tmp_path / "sass.json"
    assert run("--extension", extension, "--output", path, "--shape", "4,2,28x28,80", "--gpu", "h200") == 0
    report = json.loads(path.read_text())
    prediction, gpu = report["prediction"], sass.GPU_SPECS["h200"]
    counted = {entry["kernel"]: entry for entry in report["kernels"] if entry["padded_width"] == 96}
    tiles = 4 * 2 * 28 * 28 // 16
    per_clock = tiles / (gpu.multiprocessors * gpu.clocks_per_second)
    for name, kernel in prediction["kernels"].items():
        classes, bounds = counted[name]["instructions"], kernel["bounds"]
        assert bounds["issue"] == pytest.approx(counted[name]["all_instructions"] / 4 * per_clock)
        assert bounds["FMA"] == pytest.approx(classes["FP32/HFMA2"] / 4 * per_clock)
        assert bounds["HMMA"] == pytest.approx(classes["HMMA"] / 0.62 * per_clock)
        assert bounds["memory"] == pytest.approx(WORK[name].rows * tiles * 16 * 80 * 2 / (0.9 * 4.8e12))
        assert kernel["seconds"] >= max(bounds.values())
        attained = 0.9 if kernel["binding"] == "memory" else 0.45
        assert kernel["seconds"] == pytest.approx(bounds[kernel["binding"]] / attained)
    for name, rows in (("forward", 4), ("backward", 7)):
        each, declared = prediction["passes"][name], sass.PASSES[name]
        kernels = sum(prediction["kernels"][kernel]["seconds"] for kernel in declared.kernels)
        assert each["seconds"] == pytest.approx(kernels + declared.launches * 3e-6)
        assert each["floor_seconds"] == pytest.approx(rows * tiles * 16 * 80 * 2 / (0.9 * 4.8e12))
        assert each["share_of_copy_rate"] == pytest.approx(each["floor_seconds"] / each["seconds"])
    assert {kernel for each in sass.PASSES.values() for kernel in each.kernels} == set(WORK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpu a100", "{} has code for sm_90a, a100 runs sm_80; build it with that in TORCH_CUDA_ARCH_LIST, or name"
                        " another --gpu"),
        ("--extension nothing.so", "nothing.so is no file; name a built polaformer/_cuda*.so"),
        ("--output setup.py/x.json", "[Errno 17] File exists: 'setup.py'"),
    ],
)  # fmt: skip
def test_extensions_that_are_refused(extension, capsys, arguments, message):
    assert run("--extension", extension, *arguments.split()) == 2
    assert capsys.readouterr() == ("", f"error: {message.format(extension)}\n")


def test_extensions_that_are_not_what_they_should_be(extension, tmp_path, capsys):
    write_dumps(tmp_path, [(name, width) for name in WORK for width in PADDED_HEAD_DIMS[1:]])
    assert run("--extension", extension) == 2
    lacking = ", ".join(f"{name}<32>" for name in WORK)
    assert capsys.readouterr().err == f"error: {extension} lacks {lacking} for bf16; build it from these sources\n"

    (tmp_path / "--dump-resource-usage").write_text(
        f"cuobjdump info    : File '{extension}' does not contain device code"
    )
    assert run("--extension", extension) == 2
    assert capsys.readouterr().err == f"error: {extension} holds no CUDA kernels; name a built polaformer/_cuda*.so\n"

    (tmp_path / "cuobjdump").write_text("#!/bin/sh\necho 'fatal: too new' >&2\nexit 1\n")
    assert run("--extension", extension) == 2
    assert capsys.readouterr().err == (
        f"error: cuobjdump cannot read {extension}: fatal: too new; use that of the CUDA toolkit that built it\n"
    )


def test_loops_that_nobody_declared(extension, tmp_path, capsys):
    dump = tmp_path / "--dump-sass"
    dump.write_text(dump.read_text().replace("HMMA", "FADD", 1))
    assert run("--extension", extension) == 1
    assert re.match(r"error: sm_90a \w+<bf16, 32>: no trip counts of its loop over tokens", capsys.readouterr().err)


def test_nothing_to_read_it_with(tmp_path, monkeypatch, capsys):
    (tmp_path / "_cuda.so").touch()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(machine_code, "find_spec", lambda name: None)
    assert run("--extension", tmp_path / "_cuda.so") == 2
    assert capsys.readouterr().err == (
        "error: cuobjdump is neither on the PATH, in CUDA_HOME/bin, nor in triton; run: pip install triton\n"
    )
    tool = tmp_path / "bin" / "cuobjdump"
    tool.parent.mkdir()
    tool.touch()
    assert machine_code.find_cuobjdump() == tool


def test_nothing_built(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine_code, "ROOT", tmp_path)
    assert run() == 2
    assert capsys.readouterr().err == (
        "error: polaformer/_cuda*.so is not built; run: pip install --no-build-isolation -e .\n"
    )


def test_torch_is_all_that_it_needs():
    """It runs where the model's and the training's requirements are not installed."""
    blocked = ("dataio", "deepspeed", "einops", "nvidia.dali", "polaformer", "psutil", "pydantic", "rich", "timm")
    program = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import launch.benchmark.sass"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
