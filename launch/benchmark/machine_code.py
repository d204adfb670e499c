"""Machine code (SASS) of a built CUDA extension: its kernels, their resource usage and their loops.

`read_kernels` parses what cuobjdump prints into `Kernel` objects; `Kernel.loops` finds the loops by control flow.
Branches to slow paths are not followed: calls and, where warps diverge, BRA.DIV.

kernel_costs.py weights the instructions by the loops' trips, sass.py prints the costs, and
tests/polaformer/cuda/test_machine_code.py holds the code to a budget.
"""

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import networkx as nx

from launch.benchmark.report import ROOT

PADDED_HEAD_DIMS = (32, 64, 96, 128)  # that head dimensions are padded to


class UnmatchedLoops(RuntimeError):
    """A kernel's loops cannot be found, or are not those that its source declares."""


# The classes that instructions are counted in, by the pipe that executes them (NVIDIA Nsight Compute's documentation,
# "Pipelines"): FMA, ALU, FMA's heavy half, XU, tensor cores; the rest goes to the memory unit or to neither.
CLASSES = {
    "FP32/HFMA2": "FFMA FADD FMUL HFMA2 HMUL2 HADD2",
    "ALU": """BMSK F2FP FCHK FMNMX FSEL FSET FSETP HMNMX2 HSET2 HSETP2 I2FP IABS IADD IADD3 IMNMX ISETP LEA LOP3 MOV
        P2R PLOP3 PRMT R2P SEL SGXT SHF VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3""",
    "IMAD": "IMAD IDP",
    "MUFU": "MUFU F2F F2I FLO FRND I2F POPC",
    "HMMA": "HMMA",
    "HGMMA": "HGMMA",
    "LDSM": "LDSM",
    "LDS/STS": "LDS STS",
    "LDG/STG/LDGSTS": "LDG STG LDGSTS",
    "SHFL": "SHFL",
    "BAR": "BAR",
    "other": "",
}
_CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes.split()}


class Instruction(NamedTuple):
    """One instruction; predicate as in "@!P0", or ""."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def stem(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """One of CLASSES."""
        return _CLASS_OF.get(self.stem, "other")

    @property
    def shared_clocks(self) -> int:
        """Clocks for which it occupies the 128 bytes a clock of shared memory and L1, if no banks conflict."""
        if self.kind == "LDSM":
            return 4 if ".M88.4" in self.opcode or ".MT88.4" in self.opcode else 2 if self.opcode.endswith(".2") else 1
        if self.kind in ("LDS/STS", "LDG/STG/LDGSTS"):
            return 4 if ".128" in self.opcode else 2 if ".64" in self.opcode else 1
        if self.kind == "HGMMA":  # each of four warps reads a quarter of B: 16 rows of two bytes
            return self.products // 2
        return 1 if self.kind == "SHFL" else 0

    @property
    def products(self) -> int:
        """How many HMMA.16816 multiply as much: a warp's share of HGMMA.64xNx16 is 16 rows × N columns."""
        if self.kind == "HGMMA":
            shape = re.search(r"\.64x(\d+)x16\.", self.opcode)
            if shape is None:
                raise UnmatchedLoops(f"{self.opcode} at {self.address:#x} is no product of bf16; count it here")
            return int(shape[1]) // 8
        return int(self.kind == "HMMA")

    @property
    def target(self) -> int | None:
        """The address that a branch may go to."""
        found = re.search(r"0x[0-9a-f]+", self.operands) if self.stem in ("BRA", "JMP", "CALL") else None
        return int(found[0], 16) if found else None

    def successors(self) -> tuple[bool, int | None]:
        """Whether the next instruction may follow, and the address of another that may."""
        never, always = self.predicate == "@!PT", self.predicate in ("", "@PT")
        if self.stem in ("BRX", "JMX"):
            raise UnmatchedLoops(f"an indirect branch at {self.address:#x}; loops cannot be told from such code")
        if never or self.opcode == "BRA.DIV":  # taken by warps that diverged: none is assumed to
            return True, None
        if self.stem in ("EXIT", "RET"):
            return not always, None
        if self.stem == "CALL":  # the routine returns, or is only a way out of a loop
            return True, self.target
        if self.target is not None:
            return not always or not self.operands.startswith("0x"), self.target
        return True, None


@dataclass(eq=False)
class Loop:
    """A loop of the machine code; `instructions` are its own, without those of the loops in it."""

    begin: int
    instructions: list[Instruction] = field(default_factory=list)
    inner: list["Loop"] = field(default_factory=list)

    @property
    def products(self) -> int:
        """Products of its own, in HMMA.16816."""
        return sum(instruction.products for instruction in self.instructions)

    def nested(self) -> Iterator["Loop"]:
        """Loops of this nest, itself first."""
        yield self
        for loop in self.inner:
            yield from loop.nested()

    @property
    def multiplies(self) -> bool:
        """Whether there are products in it."""
        return any(loop.products for loop in self.nested())

    def __str__(self) -> str:
        inside = f" ({', '.join(map(str, self.inner))})" if self.inner else ""
        return f"{self.begin:#x}: {self.products} HMMA of {len(self.instructions)}{inside}"


@dataclass
class Kernel:
    """One kernel of one architecture. `operand` is "" and `width` 0 if it is no template over them."""

    architecture: str
    symbol: str
    name: str
    operand: str
    width: int
    usage: dict[str, int] = field(default_factory=dict)  # REG, STACK, SHARED (static), LOCAL
    threads: int = 1024  # limit per block, from the launch bounds
    code: list[Instruction] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.architecture} {self.name}<{self.operand}, {self.width}>"

    @property
    def identity(self) -> tuple[str, str, int]:
        """Name, operand and width, which tell a kernel from the others of an architecture."""
        return self.name, self.operand, self.width

    @cached_property
    def opcodes(self) -> Counter[str]:
        """Number of instructions by opcode."""
        return Counter(instruction.opcode for instruction in self.code)

    def count(self, opcode: str) -> int:
        """Count the instructions whose name is `opcode`, with or without modifiers."""
        return sum(n for name, n in self.opcodes.items() if name == opcode or name.startswith(opcode + "."))

    @cached_property
    def loops(self) -> list[Loop]:
        """Its outermost loops, in the order of their addresses."""
        return find_loops(self.code)

    @property
    def blocks_by_registers(self) -> int:
        """Blocks that a multiprocessor of 65,536 registers and 64 warps has room for; warps take 256 at a time."""
        warps = -(-self.threads // 32)
        registers = -(-self.usage["REG"] * 32 // 256) * 256 * warps
        return min(65536 // registers, 64 // warps)


# Reading.


def find_cuobjdump() -> Path:
    """Path of cuobjdump: on the PATH, in CUDA_HOME, or inside triton. Raises RuntimeError if there is none."""
    if found := shutil.which("cuobjdump"):
        return Path(found)
    candidates = [Path(os.environ["CUDA_HOME"], "bin/cuobjdump")] if os.environ.get("CUDA_HOME") else []
    if (triton := find_spec("triton")) and triton.origin:
        candidates.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise RuntimeError("cuobjdump is neither on the PATH, in CUDA_HOME/bin, nor in triton; run: pip install triton")


def find_extension() -> Path:
    """Path of the extension that was built in place. Raises RuntimeError if there is none."""
    found = sorted(ROOT.glob("polaformer/_cuda*.so"))
    if not found:
        raise RuntimeError("polaformer/_cuda*.so is not built; run: pip install --no-build-isolation -e .")
    return found[0]


def identify(symbol: str) -> tuple[str, str, int]:
    """Name, operand and padded width of a kernel from its mangled name.

    The width is the first template argument that is an int: the padded head dimension, or the size of a depthwise
    convolution's kernel. The operand follows from the template argument Tf32Operand or Dtype; without one it is bf16.
    Kernels without a width have at most a bool for the type of their input: their operand is "16" or "float32".
    """
    rest, name = symbol.removeprefix("_Z").removeprefix("N"), symbol
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    if not rest.startswith("I"):
        return name, "", 0
    width = re.search(r"Li(\d+)E", rest)
    if width is None:
        return name, {"ILb0E": "16", "ILb1E": "float32"}.get(rest[:5], ""), 0
    if dtype := re.search(r"DtypeE(\d)E", rest):
        residual = " with residual" if name == "depthwise_forward" and "Lb1E" in rest else ""
        return name, ("bf16", "fp16", "float32")[int(dtype[1])] + residual, int(width[1])
    flags = re.search(r"Tf32OperandILb(\d)ELb(\d)E", rest)
    operand = {None: "bf16", "11": "float32", "01": "generic float32", "00": "generic 16-bit"}[
        flags and flags[1] + flags[2]
    ]
    return name, operand, int(width[1])


def read_kernels(extension: Path, wanted: Callable[[Kernel], bool] = lambda kernel: True) -> list[Kernel]:
    """Read the kernels of an extension or object file for which `wanted`, called before code is read, holds.

    Raises RuntimeError if there is no cuobjdump, or no kernel in the file.
    """
    found = {}
    architecture = symbol = ""
    for line in _dump(extension, "--dump-resource-usage").splitlines():
        if line.startswith("arch = "):
            architecture = line.split()[-1]
        elif named := re.match(r" Function (\S+):", line):
            symbol = named[1]
        elif line.startswith("  REG:"):
            usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            found[architecture, symbol] = Kernel(architecture, symbol, *identify(symbol), usage)
    if not found:
        raise RuntimeError(f"{extension} holds no CUDA kernels; name a built polaformer/_cuda*.so")
    found = {key: kernel for key, kernel in found.items() if wanted(kernel)}
    _read_threads(extension, found)
    _read_code(extension, found)
    return list(found.values())


def _dump(extension: Path, *options: str) -> str:
    if not extension.is_file():
        raise RuntimeError(f"{extension} is no file; name a built polaformer/_cuda*.so")
    finished = subprocess.run([find_cuobjdump(), *options, extension], capture_output=True, text=True)
    if "does not contain device code" in finished.stdout + finished.stderr:
        return ""
    if finished.returncode:
        reason = (finished.stderr or finished.stdout).strip().partition("\n")[0]
        raise RuntimeError(f"cuobjdump cannot read {extension}: {reason}; use that of the CUDA toolkit that built it")
    return finished.stdout


def _read_threads(extension: Path, kernels: Mapping[tuple[str, str], Kernel]) -> None:
    architecture = symbol = ""
    pattern = r"^arch = (\w+)|^\.nv\.info\.(\S+)|EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+(0x\w+) (0x\w+) (0x\w+)"
    for match in re.finditer(pattern, _dump(extension, "--dump-elf"), re.MULTILINE):
        architecture, symbol = match[1] or architecture, match[2] or symbol
        if match[3] and (architecture, symbol) in kernels:
            x, y, z = (int(size, 16) for size in match.groups()[2:])
            kernels[architecture, symbol].threads = x * y * z


def _read_code(extension: Path, kernels: Mapping[tuple[str, str], Kernel]) -> None:
    pattern = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(?:(@!?\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*?)\s*;")
    # All functions: to name those that are wanted takes cuobjdump several times as long.
    for architecture in dict.fromkeys(architecture for architecture, _ in kernels):
        kernel = None
        for line in _dump(extension, "--dump-sass", "--gpu-architecture", architecture).splitlines():
            if "Function : " in line:
                kernel = kernels.get((architecture, line.split()[-1]))
            elif kernel is not None and (match := pattern.match(line)):
                kernel.code.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))


# Loops.


def find_loops(code: Sequence[Instruction]) -> list[Loop]:
    """Outermost natural loops (Aho et al., "Compilers", 9.6): edges back to a block that dominates their source.

    So neither a cold path that the compiler put behind a loop, nor a jump back from there into it, misleads.
    """
    blocks, successors = _split_into_blocks(code)
    graph = nx.DiGraph((block, successor) for block, others in enumerate(successors) for successor in others)
    graph.add_node(0)
    graph = graph.subgraph({0} | nx.descendants(graph, 0))
    parents = nx.immediate_dominators(graph, 0)
    bodies: dict[int, set[int]] = {}  # blocks of each loop, by the first; several back edges to it are one loop
    for block, head in graph.edges:
        if head in _dominators(block, parents):
            without_head = graph.subgraph(set(graph) - {head})
            before = nx.ancestors(without_head, block) | {block} if block != head else set()
            bodies.setdefault(head, {head}).update(before)
    return _nest(bodies, blocks)


def _dominators(block: int, parents: Mapping[int, int]) -> Iterator[int]:
    """Yield the block and all blocks that every way to it leads through."""
    yield block
    while block:  # the first block is number 0
        block = parents[block]
        yield block


def _split_into_blocks(code: Sequence[Instruction]) -> tuple[list[Sequence[Instruction]], list[list[int]]]:
    """Split code into basic blocks, with the numbers of those that may follow each."""
    ways = [instruction.successors() for instruction in code]
    targets = {target for _, target in ways if target is not None}
    starts = [0]
    for i in range(1, len(code)):
        if code[i].address in targets or ways[i - 1] != (True, None):
            starts.append(i)
    blocks = [code[begin:end] for begin, end in pairwise([*starts, len(code)])]
    number = {block[0].address: i for i, block in enumerate(blocks)}
    successors = []
    for i, begin in enumerate(starts):
        falls_through, target = ways[begin + len(blocks[i]) - 1]
        following = [i + 1] if falls_through and i + 1 < len(blocks) else []
        successors.append(following + ([number[target]] if target is not None else []))
    return blocks, successors


def _nest(bodies: Mapping[int, Collection[int]], blocks: Sequence[Sequence[Instruction]]) -> list[Loop]:
    """Nest the loops; a block's instructions belong to the innermost loop that it is in."""
    loops = {head: Loop(blocks[head][0].address) for head in sorted(bodies)}
    outermost: list[Loop] = []
    for head, loop in loops.items():
        around = [other for other in bodies if other != head and head in bodies[other]]
        parent = min(around, key=lambda other: len(bodies[other]), default=None)
        (outermost if parent is None else loops[parent].inner).append(loop)
    for block in sorted(set(chain(*bodies.values()))):
        innermost = min((head for head in bodies if block in bodies[head]), key=lambda head: len(bodies[head]))
        loops[innermost].instructions.extend(blocks[block])
    return outermost
