"""Cost of 16 tokens of one head in each bf16 CUDA kernel, in warp instructions, from its machine code.

`cost` weights every instruction by the trips of its loops for 16 tokens, over all warps that share these tokens. WORK
declares the loops' trips as the source has them. They are checked against the code: its products must come to as many
HMMA instructions as the mathematics needs, of which a warpgroup's HGMMA is worth several.

Every warp is assumed to take every branch (a copy made by one warp of six counts six times). Code before and after the
loop over tokens, such as loading S, is executed once a block and is not counted.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import product

from launch.benchmark.machine_code import CLASSES, Kernel, Loop, UnmatchedLoops

TILE_TOKENS = 16  # that costs are counted for


@dataclass(frozen=True)
class LoopNest:
    """A loop of the source with the loops in it. trips: for one iteration of the loop around it, by padded width."""

    name: str
    trips: Callable[[int], int | Fraction]
    inner: tuple["LoopNest", ...] = ()
    multiplies: bool = True  # whether there are products in it

    def nested(self) -> Iterator["LoopNest"]:
        """All loops in this one."""
        for nest in self.inner:
            yield nest
            yield from nest.nested()

    def describe(self, width: int) -> str:
        """Names and trips of the loops, for messages."""
        inside = f" ({', '.join(nest.describe(width) for nest in self.inner)})" if self.inner else ""
        return f"{self.name} × {self.trips(width)}{inside}"


@dataclass(frozen=True)
class Work:
    """Declared work of a bf16 kernel for 16 tokens of one head, by padded width W.

    rows: of D elements that it reads and writes for each token. warps: that share the 16 tokens and run `loop`, of all
    blocks that do. loop: that over tokens, which runs so often for 16 of them. warpgroup_loop: that where warpgroups
    multiply, if it differs. products: HMMA.16816 that the mathematics takes, all warps together. extra: those beyond
    it, each by what it is for.
    """

    rows: int
    warps: Callable[[int], int]
    loop: LoopNest
    products: Callable[[int], int]
    extra: Mapping[str, Callable[[int], int]] = field(default_factory=dict)
    warpgroup_loop: LoopNest | None = None

    def all_products(self, width: int) -> int:
        """HMMA instructions with the extra ones."""
        return self.products(width) + sum(count(width) for count in self.extra.values())


# As forward_bf16.cu and backward_bf16.cu are written; `LoopNest.trips` counts as if nothing were unrolled: what the
# compiler unrolls or peels is found out from the HMMAs in the code.
WORK = {
    "sum_keys": Work(
        rows=2,  # k, v
        warps=lambda w: w // 16,
        loop=LoopNest("32 tokens", lambda w: Fraction(1, 2), (LoopNest("16 tokens", lambda w: 2),)),
        products=lambda w: 2 * (w // 16) * (w // 8),
        extra={"means": lambda w: 2 * (w // 16)},
    ),
    "attend": Work(
        rows=2,  # q, out
        warps=lambda w: 1,
        loop=LoopNest(
            "32 tokens, above W = 96 16",
            lambda w: Fraction(1, 2) if w <= 96 else 1,
            (LoopNest("16 columns", lambda w: w // 16),),
        ),
        warpgroup_loop=LoopNest("16 tokens", lambda w: 1, (LoopNest("16 columns", lambda w: w // 16),)),
        products=lambda w: 2 * 2 * (w // 16) * (w // 16),
        extra={"normalizers": lambda w: 2 * 2 * (w // 16)},
    ),
    "differentiate_queries": Work(
        rows=3,  # q, dout, dq
        warps=lambda w: 1,
        loop=LoopNest(
            "16 tokens",
            lambda w: 1,
            (LoopNest("16 columns of S dout", lambda w: w // 16), LoopNest("16 columns of dq", lambda w: w // 16)),
        ),
        products=lambda w: 2 * 2 * (w // 16) * (w // 16),
        extra={
            "normalizers": lambda w: 2 * 2 * (w // 16),
            "dots": lambda w: 2 * (w // 16),
            "logits": lambda w: 2 * 2 * (w // 16),
        },
    ),
    "sum_queries": Work(
        rows=2,  # q, dout
        warps=lambda w: w // 16,
        loop=LoopNest("32 tokens", lambda w: Fraction(1, 2), (LoopNest("16 tokens", lambda w: 2),)),
        products=lambda w: 2 * 2 * (w // 16) * (w // 16),
        extra={"means": lambda w: 2 * 2 * (w // 16)},
    ),
    "differentiate_keys": Work(
        rows=4,  # k, v, dk, dv
        warps=lambda w: 1,
        loop=LoopNest("16 tokens", lambda w: 1, (LoopNest("16 columns", lambda w: w // 16),)),
        products=lambda w: 2 * (2 * (w // 16) * (w // 8)),  # dS v and R(φ) dS
    ),
}


@dataclass(frozen=True)
class Cost:
    """Warp instructions for 16 tokens of one head, by class; clocks of one multiprocessor's shared memory for them;
    products of HGMMA among them, in HMMA.16816.
    """

    warps: int
    trips: dict[int, Fraction]  # per 16 tokens, of each loop by its address
    classes: dict[str, float]
    shared_clocks: float
    warpgroup_products: float

    @property
    def instructions(self) -> float:
        """Warp instructions of all classes."""
        return sum(self.classes.values())


def cost(kernel: Kernel, work: Work | None = None) -> Cost:
    """Cost of 16 tokens in one of WORK's kernels. Raises UnmatchedLoops if its code contradicts WORK."""
    work = work or WORK[kernel.name]
    if work.warpgroup_loop and kernel.count("HGMMA"):
        work = replace(work, loop=work.warpgroup_loop)
    loop, trips = _resolve_trips(kernel, work)
    warps = work.warps(kernel.width)
    classes, shared_clocks, warpgroup_products = dict.fromkeys(CLASSES, Fraction()), Fraction(), Fraction()
    for each in loop.nested():
        times = trips[each.begin] * warps
        for instruction in each.instructions:
            classes[instruction.kind] += times
            shared_clocks += times * instruction.shared_clocks
            warpgroup_products += times * instruction.products * (instruction.kind == "HGMMA")
    counts = {name: float(count) for name, count in classes.items()}
    return Cost(warps, trips, counts, float(shared_clocks), float(warpgroup_products))


def _resolve_trips(kernel: Kernel, work: Work) -> tuple[Loop, dict[int, Fraction]]:
    """Find the loop over tokens, and the trips of it and of each loop in it per 16 tokens, by address."""
    loop = max(kernel.loops, key=lambda loop: sum(each.products for each in loop.nested()), default=Loop(0))
    needed = Fraction(work.all_products(kernel.width), work.warps(kernel.width))
    found: dict[tuple[int, int], list[dict[int, Fraction]]] = {}  # by tiles and compiler changes: possible trips
    for tiles in (1, 2, 4):  # iterations of the source's loop over tokens in one of the code's
        for changes, inner in _readings(loop, work.loop, kernel.width):
            trips = {loop.begin: Fraction(work.loop.trips(kernel.width)) / tiles}
            _multiply_out(loop, inner, trips)
            if sum(trips[each.begin] * each.products for each in loop.nested()) == needed:
                ways = found.setdefault((tiles, changes), [])
                ways += [trips] if trips not in ways else []
    best = found[min(found)] if found else []
    if len(best) == 1:
        return loop, best[0]
    fault = "several trip counts" if best else "no trip counts"
    wanted = " + ".join(
        [str(work.products(kernel.width)), *(f"{n(kernel.width)} ({x})" for x, n in work.extra.items())]
    )
    raise UnmatchedLoops(
        f"{kernel}: {fault} of its loop over tokens give the {wanted} HMMAs that {work.warps(kernel.width)} warps need"
        f" for {TILE_TOKENS} tokens; declared is {work.loop.describe(kernel.width)}, the code has {loop};"
        " correct WORK in launch/benchmark/kernel_costs.py"
    )


def _multiply_out(loop: Loop, inner: Mapping[int, int], trips: dict[int, Fraction]) -> None:
    """Fill in the trips of the loops in `loop`, from those for one iteration of the loop around each."""
    for each in loop.inner:
        trips[each.begin] = trips[loop.begin] * inner[each.begin]
        _multiply_out(each, inner, trips)


def _readings(loop: Loop, nest: LoopNest, width: int) -> Iterator[tuple[int, dict[int, int]]]:
    """Ways to match the loops in `loop` with those in `nest`: number of compiler changes, and trips by address."""
    for choice in product(*(_readings_of_one(each, loop, nest, width) for each in loop.inner)):
        trips = {address: count for _, some in choice for address, count in some.items()}
        yield sum(changes for changes, _ in choice), trips


def _readings_of_one(loop: Loop, around: Loop, nest: LoopNest, width: int) -> list[tuple[int, dict[int, int]]]:
    """Ways to match `loop` itself, which may be partly unrolled or have its first or last iteration peeled."""
    found = []
    for candidate in nest.nested():
        declared = int(candidate.trips(width))
        for unrolled in range(1, declared + 1):
            if declared % unrolled or candidate.multiplies != loop.multiplies:
                continue
            for peeled in (0, 1):
                trips = declared // unrolled - peeled
                copies = peeled * sum(each.products for each in loop.nested())
                if trips < 2 or around.products < copies:
                    continue
                skipped = candidate not in nest.inner  # a loop around it is unrolled
                for changes, inner in _readings(loop, candidate, width):
                    changed = changes + (unrolled > 1) + peeled + skipped
                    found.append((changed, inner | {loop.begin: trips}))
    return found
