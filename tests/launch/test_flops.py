"""Operations of an image against the published figures, and the peak rate for the MFU."""

from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch

from launch.flops import measure_mfu_constants, peak_flops, training_flops
from launch.plan import make_plan

# Multiply-adds of one forward pass of 224 × 224 pixels and 1000 classes, as the authors publish them.
PUBLISHED = {"b0": 0.668e9, "b1": 1.003e9, "b2": 2.731e9, "b3": 5.070e9, "b4": 11.05e9, "b5": 17.74e9}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_three_passes_of_two_operations_each(preset):
    expected = 3 * 2 * PUBLISHED[preset]
    assert training_flops(f"polaformerpp_{preset}", 1000, 224) == pytest.approx(expected, rel=0.03)


def test_flops_grow_with_image_size_and_classes():
    small, large = (training_flops("polaformerpp_b0", 1000, size) for size in (224, 448))
    # Everything is linear in the pixels but softmax attention, which is quadratic, and the classifier.
    assert 4 * small < large < 4.6 * small
    classifier = small - training_flops("polaformerpp_b0", 10, 224)
    assert classifier == 3 * 2 * 990 * 2048


@pytest.fixture
def clock(monkeypatch) -> None:
    """By the clock of launch.flops, four products take 3, 2, 4 and 5 s."""
    readings = accumulate([0, 3, 0, 2, 0, 4, 0, 5])
    monkeypatch.setattr("launch.flops.time", SimpleNamespace(perf_counter=lambda: next(readings)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_a_cpu(clock, precision):
    """The best of four products of 1024 × 1024 numbers."""
    assert peak_flops(torch.device("cpu"), precision) == 2 * 1024**3 / 2


def test_the_mfu_constants_of_a_run(clock, alone, configure):
    config = configure()
    mfu_constants = measure_mfu_constants(config, make_plan(config, 0, 1), alone)
    assert mfu_constants.flops_per_image == training_flops("polaformerpp_b0", 10, 32)
    assert mfu_constants.peak_flops == 2 * 1024**3 / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_does_not_beat_its_peak():
    device = torch.device("cuda", 0)
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    a @ a  # warms up
    laps = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    for lap in laps:
        lap.record()
        a @ a
    torch.cuda.synchronize()
    best = min(began.elapsed_time(ended) for began, ended in pairwise(laps))  # whoever else uses the GPU
    reached = 2 * 4096**3 / (best / 1000)
    assert 0.05 * peak_flops(device, "bf16") < reached < 1.1 * peak_flops(device, "bf16")
