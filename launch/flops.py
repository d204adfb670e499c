"""How many floating-point operations a step takes, and how many its devices could do: together, the MFU."""

import time
from dataclasses import dataclass

import timm
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from launch.config import Config
from launch.plan import Plan

#: Dense bf16 tensor-core rates from the makers' data sheets, operations per second, by part of the device's name.
_DATA_SHEET_PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
}


@dataclass(frozen=True)
class MfuConstants:
    """What turns images per second into a share of the hardware."""

    flops_per_image: int
    peak_flops: float  # per second, of all ranks together


def measure_mfu_constants(config: Config, plan: Plan, device: torch.device) -> MfuConstants:
    """The rates of a run on its devices; every rank calls it."""
    peak = torch.tensor(peak_flops(device, config.engine.precision), dtype=torch.float64, device=device)
    dist.all_reduce(peak)
    return MfuConstants(training_flops(config.model.name, plan.num_classes, config.data.image_size), peak.item())


def training_flops(model: str, num_classes: int, image_size: int) -> int:
    """Operations of one image's forward and backward, a multiply-add counted as two, nothing of it computed.

    Backward is taken for twice forward: torch's counter takes the depthwise convolutions in it for dense ones.
    """
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        timm.create_model(model, num_classes=num_classes).eval()(torch.empty(1, 3, image_size, image_size))
    return 3 * counter.get_total_flops()


def peak_flops(device: torch.device, precision: str) -> float:
    """What the device could do at best, operations per second: its data sheet's bf16 rate, or else a measured one.

    The measured one is that of a large matrix product in the run's precision, the best of a few; it takes a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, rate in _DATA_SHEET_PEAK_FLOPS.items():
            if part in name:
                return rate
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return max(_matmul_flops_per_second(a) for _ in range(4))


def _matmul_flops_per_second(a: torch.Tensor) -> float:
    start = time.perf_counter()
    (a @ a)[0, 0].item()  # waits for the device
    return 2 * a.shape[0] ** 3 / (time.perf_counter() - start)
