"""Budgets of the machine code in the built CUDA extension, for every architecture in it.

Registers limit how many blocks share a multiprocessor: it has 65,536, and a warp takes them in units of 256. Dynamic
shared memory must permit as many blocks, which `fits_in_shared_memory` of launch_params.h asserts at compile time. For
bf16 at W = 96 the five product kernels reach 8 or 12 resident warps (2 × 6; 2 × 4, on sm_90a 3 × 4; 2 × 6; 2 × 6;
3 × 4) and hide latency by asynchronous copies and independent products rather than by occupancy.
"""

from itertools import product

import pytest
import torch
from torch.utils import cpp_extension

from launch.benchmark import machine_code
from launch.benchmark.kernel_costs import WORK, cost
from launch.benchmark.machine_code import PADDED_HEAD_DIMS, Instruction, Kernel

pytestmark = pytest.mark.slow

OPERANDS = ("bf16", "float32", "generic float32", "generic 16-bit")  # of bf16.cuh and tf32.cuh
SLOW_OPERANDS = ("generic float32", "generic 16-bit")  # the operands of kernels with a shift
PRODUCTS = ("sum_keys", "attend", "differentiate_queries", "differentiate_keys")  # of all operands
BF16_PRODUCTS = (*PRODUCTS, "sum_queries")
WARPGROUPS = "sm_90a"  # the architecture whose warpgroups multiply in WARPGROUP_PRODUCTS
WARPGROUP_PRODUCTS = ("attend", "differentiate_keys")
SHIFTED = ("attend_shifted", "differentiate_queries_shifted", "differentiate_keys_shifted")

# Blocks per multiprocessor that launch_params.h assumes, at each W: bf16, others.
BLOCKS_PER_SM = {
    "sum_keys": ((8, 3, 2, 1), (6, 2, 1, 1)),
    "attend": ((3, 2, 2, 2), (2, 2, 2, 1)),
    "differentiate_queries": ((6, 3, 2, 1), (2, 1, 1, 1)),
    "sum_queries": ((6, 3, 2, 1), ()),
    "differentiate_keys": ((4, 3, 3, 2), (2, 2, 1, 1)),
}
WARPGROUP_BLOCKS_PER_SM = BLOCKS_PER_SM | {"attend": ((4, 3, 3, 2), ())}
RESERVED_SHARED_BYTES = 1024  # reserved by an H100 for each block

# Stack that kernels may use where registers are exhausted: a few values for bf16 at W = 96, a few more in tf32, where
# accuracy matters more than speed.
STACK_BYTES = {"bf16": 32}
STACK_BYTES_OTHERWISE = 72

# Vector accesses that must occur: asynchronous copies to shared memory, loads, stores of results.
WIDE_ACCESSES = {
    ("sum_keys", "bf16"): ("LDGSTS.E.BYPASS.128",),
    ("sum_keys", "float32"): ("LDGSTS.E.BYPASS.128",),
    ("attend", "bf16"): ("LDGSTS.E.BYPASS.128", "STG.E.64"),  # results of 16 columns at a time, four per thread
    ("attend", "float32"): ("LDG.E.128",),
    ("differentiate_queries", "bf16"): ("LDGSTS.E.BYPASS.128", "LDG.E.64", "STG.E.64"),
    ("sum_queries", "bf16"): ("LDGSTS.E.BYPASS.128",),
    ("differentiate_queries", "float32"): ("LDGSTS.E.BYPASS.128",),
    ("differentiate_keys", "bf16"): ("LDGSTS.E.BYPASS.128", "LDG.E.128", "STG.E.128"),
    ("differentiate_keys", "float32"): ("LDG.E.128",),
}


# Warp instructions per 16 tokens of one head in bf16, at each W: the maximum over sm_80, sm_90a and sm_100 with CUDA
# 13.0, plus 1 %. More instructions are slower; `python -m launch.benchmark sass` shows their kinds and costs.
BUDGET = {
    "sum_keys": (308, 697, 1125, 1495),
    "attend": (545, 1073, 1648, 2507),
    "differentiate_queries": (1073, 2302, 3452, 4501),
    "sum_queries": (517, 1097, 1861, 2352),
    "differentiate_keys": (597, 1213, 1928, 2664),
}
WARPGROUP_BUDGET = {
    "attend": (520, 917, 1368, 2068),
    "differentiate_keys": (465, 884, 1370, 1793),
}
BUDGET_FACTORS = {"sm_120": 1.1}  # needs more instructions for the same code

# Of depthwise convolution with 3×3 and 5×5 kernels: warp instructions of a step, in which a thread computes 7 outputs
# of two channels in each of two rows, or in one row where 5×5 kernels are differentiated. Maxima and 1 %, as above.
DEPTHWISE_BUDGET = {
    ("depthwise_forward", "bf16"): (680, 1255),
    ("depthwise_forward", "fp16"): (680, 1280),
    ("depthwise_forward", "float32"): (590, 1130),
    ("depthwise_forward", "bf16 with residual"): (815, 1400),
    ("depthwise_forward", "fp16 with residual"): (815, 1400),
    ("depthwise_forward", "float32 with residual"): (700, 1240),
    ("depthwise_backward", "bf16"): (1130, 1245),
    ("depthwise_backward", "fp16"): (1110, 1185),
    ("depthwise_backward", "float32"): (1045, 1090),
}
DEPTHWISE_BLOCKS = 2  # of 256 threads on a multiprocessor, as depthwise_params.h assumes


@pytest.fixture(scope="session")
def all_kernels() -> list[Kernel]:
    """Kernels of the built extension. Tests skip where it cannot be built, and fail where it can be but is not."""
    try:
        extension = machine_code.find_extension()
    except RuntimeError:
        if cpp_extension.CUDA_HOME is None or torch.version.cuda is None:
            pytest.skip("no CUDA toolkit, or a torch without CUDA: the kernels cannot be built here")
        raise
    return machine_code.read_kernels(extension)


@pytest.fixture(scope="session")
def kernels(all_kernels) -> list[Kernel]:
    """Those of polarity attention."""
    others = ("depthwise", "tell_warpgroup_code")
    return [kernel for kernel in all_kernels if not any(name in kernel.name for name in others)]


@pytest.fixture(scope="session")
def depthwise_kernels(all_kernels) -> list[Kernel]:
    """Those of depthwise convolution."""
    return [kernel for kernel in all_kernels if "depthwise" in kernel.name]


def uses_warpgroups(kernel: Kernel) -> bool:
    """Whether warpgroups multiply in this kernel."""
    return kernel.architecture == WARPGROUPS and kernel.operand == "bf16" and kernel.name in WARPGROUP_PRODUCTS


def describe_failures(kernels: list[Kernel], fault) -> list[str]:
    """One line for each kernel in which `fault` finds something."""
    return [f"{kernel}: {said}" for kernel in kernels if (said := fault(kernel))]


def test_every_kernel_is_there_for_every_architecture(kernels):
    expected = {
        *product(PRODUCTS, OPERANDS, PADDED_HEAD_DIMS),
        *product(("sum_queries",), ("bf16",), PADDED_HEAD_DIMS),
        *product(SHIFTED, SLOW_OPERANDS, PADDED_HEAD_DIMS),
        *(("combine_key_splits", inputs, 0) for inputs in ("16", "float32")),
        ("combine_query_splits", "", 0),
        ("fill_rotary_tables", "", 0),
    }
    architectures = {kernel.architecture for kernel in kernels}
    assert architectures
    for architecture in architectures:
        assert {kernel.identity for kernel in kernels if kernel.architecture == architecture} == expected
    assert all(len(kernel.code) > 50 for kernel in kernels)


def test_no_spills_no_stack_no_local_memory(kernels):
    def fault(kernel):
        allowed = STACK_BYTES.get(kernel.operand, STACK_BYTES_OTHERWISE)
        if kernel.operand == "bf16" and kernel.width != 96:
            allowed = 0
        if kernel.usage["STACK"] > allowed or kernel.usage["LOCAL"]:
            return f"{kernel.usage['STACK']} bytes of stack, {kernel.usage['LOCAL']} of local memory"
        accesses = kernel.count("LDL") + kernel.count("STL")
        return accesses if accesses and not allowed else None

    assert not describe_failures(kernels, fault)


def test_occupancy_is_what_the_plan_assumes(kernels):
    def fault(kernel):
        if kernel.usage["SHARED"] > RESERVED_SHARED_BYTES:
            return f"{kernel.usage['SHARED']} bytes of static shared memory; fits_in_shared_memory() ignores them"
        blocks = 1
        if kernel.name in BF16_PRODUCTS:
            assumed = WARPGROUP_BLOCKS_PER_SM if uses_warpgroups(kernel) else BLOCKS_PER_SM
            blocks = assumed[kernel.name][kernel.operand != "bf16"][PADDED_HEAD_DIMS.index(kernel.width)]
        if kernel.blocks_by_registers < blocks:
            return (
                f"{kernel.usage['REG']} registers, {kernel.threads} threads: {kernel.blocks_by_registers} of {blocks}"
            )
        return None

    assert not describe_failures(kernels, fault)


def test_products_run_on_tensor_cores(kernels):
    def fault(kernel):
        if kernel.name not in BF16_PRODUCTS + SHIFTED:
            return None
        is_bf16 = kernel.operand == "bf16"
        wanted, other = ("HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32")[:: 1 if is_bf16 else -1]
        if kernel.count(other) or not kernel.count(wanted) + kernel.count("HGMMA"):
            return f"{kernel.count(wanted)} of {wanted}, {kernel.count(other)} of {other}"
        if is_bf16 and kernel.count(wanted) and not kernel.count("LDSM"):
            return "operands are not loaded by LDSM"
        return None

    assert not describe_failures(kernels, fault)


def test_warpgroups_multiply_asynchronously(kernels):
    """Batches of products run while the next features are computed: ptxas may wait for each product instead, and only
    mention it, if it cannot tell that registers are free.
    """

    def fault(kernel):
        products, waits = kernel.count("HGMMA"), kernel.count("WARPGROUP.DEPBAR")
        if bool(products) != uses_warpgroups(kernel):
            return f"{products} of HGMMA"
        return f"{waits} waits for {products} products" if products and 2 * waits > products + 4 else None

    assert not describe_failures(kernels, fault)


def test_warpgroups_read_the_state_in_the_right_order(kernels):
    """Rows of core matrices lie along N (`tnspB`) where features are K: for outputs and dv, not for dS v."""

    def fault(kernel):
        operands = [each.operands for each in kernel.code if each.stem == "HGMMA"]
        transposed = sum("tnspB" in each for each in operands)
        columns = 2 if kernel.name == "attend" and kernel.width == 128 else kernel.width // 16  # unrolled
        expected = {"attend": 4 * columns, "differentiate_keys": 2 * columns}.get(kernel.name, 0)
        others = {"differentiate_keys": columns * kernel.width // 16}.get(kernel.name, 0)
        if uses_warpgroups(kernel) and (transposed, len(operands) - transposed) != (expected, others):
            return f"{transposed} transposed of {len(operands)}"
        return None

    assert not describe_failures(kernels, fault)


def test_signs_become_masks_of_whole_halves(kernels):
    """By PRMT with selectors whose upper bits replicate a sign, which CUDA's __byte_perm drops.

    The emulator replaces these instructions, so only the machine code shows it.
    """

    def fault(kernel):
        if kernel.operand != "bf16":
            return None
        operands = " ".join(each.operands for each in kernel.code if each.opcode.startswith("PRMT"))
        return [wanted for wanted in ("0xdd99", "0xffbb") if wanted not in operands]

    assert not describe_failures(kernels, fault)


def test_float32_uses_three_tf32_products(kernels):
    """float32 inputs are products of upper and lower tf32 parts: three times the instructions, in the same loops."""
    of = {(kernel.architecture, *kernel.identity): kernel for kernel in kernels}
    for (architecture, name, operand, width), kernel in of.items():
        if operand == "generic float32" and name in PRODUCTS:
            once = of[architecture, name, "generic 16-bit", width]
            ratio = kernel.count("HMMA.1688") / once.count("HMMA.1688")
            assert ratio == 3, f"{kernel}: {ratio} times as many"


def test_rows_are_moved_by_vectors(kernels):
    def fault(kernel):
        lacking = [
            opcode for opcode in WIDE_ACCESSES.get((kernel.name, kernel.operand), ()) if not kernel.count(opcode)
        ]
        if lacking:
            return f"lacks {', '.join(lacking)}"
        # No aligned row is read or written element by element.
        if kernel.operand == "bf16" and (single := kernel.count("LDG.E.U16") + kernel.count("STG.E.U16")):
            return f"{single} accesses of two bytes"
        return None

    assert not describe_failures(kernels, fault)


def test_no_atomics(all_kernels):
    """Their order varies, so results would not be bit-identical."""

    def fault(kernel):
        return [name for name in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS") if kernel.count(name)]

    assert not describe_failures(all_kernels, fault)


def test_bf16_features_use_ex2(kernels):
    """One MUFU.EX2 per feature instead of the dozen multiplications of a series."""

    def fault(kernel):
        powers = kernel.count("MUFU.EX2")
        return f"{powers} of MUFU.EX2" if kernel.operand == "bf16" and powers < 8 else None

    assert not describe_failures(kernels, fault)


def test_instructions_stay_within_their_budget(kernels):
    assert set(BUDGET) == set(WORK)

    def fault(kernel):
        if kernel.name not in WORK or kernel.operand != "bf16":
            return None
        budget = WARPGROUP_BUDGET if uses_warpgroups(kernel) else BUDGET
        factor = BUDGET_FACTORS.get(kernel.architecture, 1)
        allowed = factor * budget[kernel.name][PADDED_HEAD_DIMS.index(kernel.width)]
        found = cost(kernel).instructions
        return f"{found:.0f} warp instructions for 16 tokens, allowed are {allowed:.0f}" if found > allowed else None

    assert not describe_failures(kernels, fault)


def step_of(kernel: Kernel) -> list[Instruction]:
    """Instructions of a depthwise kernel's loop over steps, the longest one."""
    bodies = [[each for nested in loop.nested() for each in nested.instructions] for loop in kernel.loops]
    return max(bodies, key=len)


def products_of_step(kernel: Kernel) -> int:
    """Products of two channels that the mathematics of a step takes: per output, one for each tap, backward two."""
    backward = kernel.name == "depthwise_backward"
    rows = 1 if backward and kernel.width == 5 else 2
    return 2 * 7 * rows * kernel.width**2 * (1 + backward)


def test_depthwise_kernels_are_there_for_every_architecture(kernels, depthwise_kernels):
    expected = {(*key, size) for key, size in product(DEPTHWISE_BUDGET, (3, 5))} | {("sum_depthwise_splits", "", 0)}
    for architecture in {kernel.architecture for kernel in kernels}:
        found = {kernel.identity for kernel in depthwise_kernels if kernel.architecture == architecture}
        assert found == expected


def test_depthwise_kernels_use_what_the_plan_assumes(depthwise_kernels):
    """Registers for two blocks, 16-byte copies, and no local memory but two pairs backward, not in bf16."""

    def fault(kernel):
        if kernel.usage["STACK"] > (16 if kernel.name == "depthwise_backward" and kernel.operand != "bf16" else 0):
            return f"{kernel.usage['STACK']} bytes of stack"
        if kernel.width and kernel.blocks_by_registers < DEPTHWISE_BLOCKS:
            return f"{kernel.usage['REG']} registers, {kernel.threads} threads"
        if kernel.width and not kernel.count("LDGSTS.E.BYPASS.128"):
            return "rows are not copied by 16 bytes"
        single = kernel.count("LDG.E.U16") + kernel.count("STG.E.U16") + kernel.count("LDS.U16")
        return f"{single} accesses of two bytes" if single else None

    assert not describe_failures(depthwise_kernels, fault)


def test_depthwise_kernels_stay_within_their_budget(depthwise_kernels):
    def fault(kernel):
        if not kernel.width:
            return None
        step = step_of(kernel)
        products = sum(each.stem == "FFMA" for each in step)
        if products != products_of_step(kernel):
            return f"{products} products in a step, {products_of_step(kernel)} are needed"
        allowed = DEPTHWISE_BUDGET[kernel.name, kernel.operand][kernel.width == 5]
        allowed *= BUDGET_FACTORS.get(kernel.architecture, 1)
        return f"{len(step)} warp instructions in a step, allowed are {allowed}" if len(step) > allowed else None

    assert not describe_failures(depthwise_kernels, fault)
