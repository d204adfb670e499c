"""Model FLOPs utilization (MFU): the floating-point operations of an image, and the peak rate of the devices."""

import time
from dataclasses import dataclass

import timm
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from launch.config import Config
from launch.plan import Plan

#: Dense bf16 tensor-core rates in operations per second, from NVIDIA's data sheets, by part of the device's name.
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
    """MFU = images per second · flops_per_image / peak_flops."""

    flops_per_image: int
    peak_flops: float  # per second, of all ranks together


def measure_mfu_constants(config: Config, plan: Plan, device: torch.device) -> MfuConstants:
    """Return the MFU constants of a run on its devices. Every rank calls it."""
    peak = torch.tensor(peak_flops(device, config.engine.precision), dtype=torch.float64, device=device)
    dist.all_reduce(peak)
    return MfuConstants(training_flops(config.model.name, plan.num_classes, config.data.image_size), peak.item())


def training_flops(model: str, num_classes: int, image_size: int) -> int:
    """Return the operations of one image's forward and backward, counted on the meta device; a multiply-add is two.

    Backward counts as twice forward: torch's counter would count its depthwise convolutions as dense ones.
    """
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        timm.create_model(model, num_classes=num_classes).eval()(torch.empty(1, 3, image_size, image_size))
    return 3 * counter.get_total_flops()


def peak_flops(device: torch.device, precision: str) -> float:
    """Return the device's peak rate in operations per second: its data sheet's for bf16, or else a measured one.

    The measured one is the best of four large matrix products in the run's precision; it takes a second.
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
    (a @ a)[0, 0].item()  # synchronises with the device
    return 2 * a.shape[0] ** 3 / (time.perf_counter() - start)
