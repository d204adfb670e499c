"""The machine code of the built CUDA extension, for every architecture in it: what the compiler made of the kernels.

Registers decide how many blocks share a multiprocessor: it has 65,536, and a warp takes them in units of 256. Shared
memory, all of it dynamic, must allow as many; plan.h's `fit` is asserted of that when the kernels are compiled. For
bf16 at W = 96 the four product kernels come to 12 warps each (2 × 6, 3 × 4, 1 × 12, 3 × 4), which hide latency by
copies ahead and by independent products rather than by their number.
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
from torch.utils import cpp_extension

import polaformer

pytestmark = pytest.mark.slow

WIDTHS = (32, 64, 96, 128)
OPERANDS = ("bf16", "float32", "any float32", "any 16")  # of operands.cuh
SLOW_OPERANDS = ("any float32", "any 16")  # which compute with a shift
PRODUCTS = ("sum_keys", "attend", "differentiate_queries", "differentiate_keys")
SHIFTED = ("attend_shifted", "differentiate_queries_shifted", "differentiate_keys_shifted")

# Blocks per multiprocessor that plan.h counts on, at each width: of bf16, of the others.
RESIDENTS = {
    "sum_keys": ((8, 3, 2, 1), (6, 2, 1, 1)),
    "attend": ((4, 3, 3, 2), (2, 2, 2, 1)),
    "differentiate_queries": ((4, 2, 1, 1), (2, 1, 1, 1)),
    "differentiate_keys": ((4, 3, 3, 2), (2, 2, 1, 1)),
}
THREADS_PER_COLUMN = {"sum_keys": 2, "differentiate_queries": 4}  # the others have 128 threads
REGISTERS = 65536  # of a multiprocessor
RESERVED_SHARED_BYTES = 1024  # that an H100 takes for itself, for each block

# Head widths above 96 in float32, which no PolaFormer++ has, keep a number or two on the stack between tiles: all 255
# registers are in use inside, and fewer columns at a time would slow the widths below.
STACK_BYTES = {
    ("attend", "float32", 128): 8,
    ("differentiate_queries_shifted", "any float32", 128): 8,
    ("differentiate_keys_shifted", "any float32", 128): 16,
}

# 16 bytes at a time: copied to shared memory past the registers, or loaded; and what stores the results.
WIDE_ACCESSES = {
    ("sum_keys", "bf16"): ("LDGSTS.E.BYPASS.128",),
    ("sum_keys", "float32"): ("LDGSTS.E.BYPASS.128",),
    ("attend", "bf16"): ("LDG.E.128", "STG.E.64"),
    ("attend", "float32"): ("LDG.E.128",),
    ("differentiate_queries", "bf16"): ("LDGSTS.E.BYPASS.128", "STG.E.128"),
    ("differentiate_queries", "float32"): ("LDGSTS.E.BYPASS.128",),
    ("differentiate_keys", "bf16"): ("LDG.E.128", "STG.E.128"),
    ("differentiate_keys", "float32"): ("LDG.E.128",),
}


@dataclass
class Kernel:
    """One kernel of one architecture: what it is, what it takes, how often it has each instruction."""

    architecture: str
    name: str
    operand: str = ""
    width: int = 0
    usage: dict[str, int] = field(default_factory=dict)  # REG, STACK, SHARED, LOCAL
    instructions: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.architecture} {self.name}<{self.operand}, {self.width}>"

    def count(self, opcode: str) -> int:
        """Instructions whose name is `opcode` or goes on from it with a dot."""
        found = (n for name, n in self.instructions.items() if name == opcode or name.startswith(opcode + "."))
        return sum(found)

    @property
    def identity(self) -> tuple[str, str, int]:
        return self.name, self.operand, self.width


def identify(symbol: str) -> tuple[str, str, int]:
    """Name, operand and padded width from a mangled symbol; operand and width only where it is a template of them."""
    names = sorted((*PRODUCTS, *SHIFTED, "finish_keys", "finish_queries", "fill_turns"), key=len, reverse=True)
    name = re.search("|".join(names), symbol)
    assert name, f"{symbol} is a kernel that this test does not know; add it"
    rest = symbol[name.end() :]
    width = re.search(r"ELi(\d+)E", rest)
    if width is None:
        return name[0], {"ILb0": "16", "ILb1": "float32"}.get(rest[:4], ""), 0
    flags = re.search(r"Tensor32ILb(\d)ELb(\d)E", rest)
    operand = {None: "bf16", "11": "float32", "01": "any float32", "00": "any 16"}[flags and flags[1] + flags[2]]
    return name[0], operand, int(width[1])


def dump(*options: str) -> str:
    """What cuobjdump, which triton brings along, prints of the extension."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *options, find_extension()], capture_output=True, text=True, check=True).stdout


def find_extension() -> Path:
    """The built extension. Where it cannot be built the test skips; where it can and is not, it fails."""
    found = sorted(Path(polaformer.__file__).parent.glob("_cuda*.so"))
    if not found and (cpp_extension.CUDA_HOME is None or torch.version.cuda is None):
        pytest.skip("no CUDA toolkit, or a torch without CUDA: the kernels cannot be built here")
    assert found, "the CUDA kernels are not built; run: pip install --no-build-isolation -e ."
    return found[0]


@pytest.fixture(scope="session")
def kernels() -> list[Kernel]:
    found = {}
    architecture = symbol = None
    for line in dump("--dump-resource-usage").splitlines():
        if line.startswith("arch = "):
            architecture = line.split()[-1]
        elif named := re.match(r" Function (\S+):", line):
            symbol = named[1]
        elif line.startswith("  REG:"):
            usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            found[architecture, symbol] = Kernel(architecture, *identify(symbol), usage)
    # Architecture, symbol and instructions follow one another; a predicate may stand before an instruction.
    pattern = r"code for (\w+)|Function : (\S+)|/\*[0-9a-f]{4,6}\*/\s+(?:@!?\w+ +)?([A-Z][A-Z0-9_.]*)"
    for match in re.finditer(pattern, dump("--dump-sass")):
        architecture, symbol = match[1] or architecture, match[2] or symbol
        if match[3]:
            found[architecture, symbol].instructions[match[3]] += 1
    return list(found.values())


def faulty(kernels: list[Kernel], fault) -> list[str]:
    """A line for each kernel of which `fault` says something."""
    return [f"{kernel}: {said}" for kernel in kernels if (said := fault(kernel))]


def test_every_kernel_is_there_for_every_architecture(kernels):
    expected = {
        *product(PRODUCTS, OPERANDS, WIDTHS),
        *product(SHIFTED, SLOW_OPERANDS, WIDTHS),
        *(("finish_keys", inputs, 0) for inputs in ("16", "float32")),
        ("finish_queries", "", 0),
        ("fill_turns", "", 0),
    }
    architectures = {kernel.architecture for kernel in kernels}
    assert architectures
    for architecture in architectures:
        assert {kernel.identity for kernel in kernels if kernel.architecture == architecture} == expected
    assert all(sum(kernel.instructions.values()) > 50 for kernel in kernels)


def test_no_spills_no_stack_no_local_memory(kernels):
    def fault(kernel):
        allowed = STACK_BYTES.get(kernel.identity, 0)
        if kernel.usage["STACK"] > allowed or kernel.usage["LOCAL"]:
            return f"{kernel.usage['STACK']} bytes of stack, {kernel.usage['LOCAL']} of local memory"
        accesses = kernel.count("LDL") + kernel.count("STL")
        return accesses if accesses and not allowed else None

    assert not faulty(kernels, fault)


def test_registers_and_shared_memory_allow_the_blocks_that_the_plan_counts_on(kernels):
    def fault(kernel):
        if kernel.usage["SHARED"] > RESERVED_SHARED_BYTES:
            return f"{kernel.usage['SHARED']} bytes of static shared memory; fit() does not know of them"
        threads = kernel.width * THREADS_PER_COLUMN.get(kernel.name.removesuffix("_shifted"), 0) or 128
        blocks = 1
        if kernel.name in PRODUCTS:
            blocks = RESIDENTS[kernel.name][kernel.operand != "bf16"][WIDTHS.index(kernel.width)]
        taken = (kernel.usage["REG"] + 7) // 8 * 8 * threads * blocks
        return f"{blocks} blocks of {threads} threads take {taken} registers" if taken > REGISTERS else None

    assert not faulty(kernels, fault)


def test_products_run_on_tensor_cores(kernels):
    def fault(kernel):
        if kernel.name not in PRODUCTS + SHIFTED:
            return None
        narrow = kernel.operand == "bf16"
        wanted, other = ("HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32")[:: 1 if narrow else -1]
        if not kernel.count(wanted) or kernel.count(other):
            return f"{kernel.count(wanted)} of {wanted}, {kernel.count(other)} of {other}"
        if narrow and not kernel.count("LDSM"):
            return "operands are not loaded by LDSM"
        return None

    assert not faulty(kernels, fault)


def test_float32_takes_three_products_for_one(kernels):
    """Of float32 inputs the rounding errors are multiplied, too: thrice the instructions, but in the same loops."""
    of = {(kernel.architecture, *kernel.identity): kernel for kernel in kernels}
    for (architecture, name, operand, width), kernel in of.items():
        if operand == "any float32" and name in PRODUCTS:
            once = of[architecture, name, "any 16", width]
            ratio = kernel.count("HMMA.1688") / once.count("HMMA.1688")
            assert ratio == 3, f"{kernel}: {ratio} times as many"


def test_rows_are_moved_sixteen_bytes_at_a_time(kernels):
    def fault(kernel):
        lacking = [
            opcode for opcode in WIDE_ACCESSES.get((kernel.name, kernel.operand), ()) if not kernel.count(opcode)
        ]
        if lacking:
            return f"lacks {', '.join(lacking)}"
        # An aligned row is nowhere read or written by its single elements.
        if kernel.operand == "bf16" and (single := kernel.count("LDG.E.U16") + kernel.count("STG.E.U16")):
            return f"{single} accesses of two bytes"
        return None

    assert not faulty(kernels, fault)


def test_no_atomics(kernels):
    """They would add in any order: other bits on every run."""

    def fault(kernel):
        return [name for name in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS") if kernel.count(name)]

    assert not faulty(kernels, fault)


def test_features_of_bf16_come_from_powers_of_two(kernels):
    """One MUFU.EX2 for each feature, where a series would take a dozen multiplications."""

    def fault(kernel):
        powers = kernel.count("MUFU.EX2")
        return f"{powers} of MUFU.EX2" if kernel.operand == "bf16" and powers < 8 else None

    assert not faulty(kernels, fault)
