"""Metrics as TensorBoard's own reader, metrics.jsonl and the terminal show them."""

import io
import json
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.distributed import RunError
from launch.flops import MfuConstants
from launch.monitor import METRICS_NAME, Monitor, truncate_metrics

MFU_CONSTANTS = MfuConstants(flops_per_image=10**6, peak_flops=1e12)
TAGS = {
    "train/loss",
    "train/learning_rate",
    "train/gradient_norm",
    "speed/images_per_second",
    "speed/waiting_for_data",
    "speed/mfu",
    "memory/peak_gib",
    "data/broken_images",
}


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_NAME).read_text().splitlines()]


def read_board(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return board


def await_next_second() -> None:
    """Waits for the next second: TensorBoard sorts event files by name, which begins with the second of their start."""
    second = int(time.time())
    while int(time.time()) == second:
        time.sleep(0.01)


def assert_equal_to_lines(board: EventAccumulator, lines: list[dict]) -> None:
    """TensorBoard shows exactly the scalars of these lines, which it keeps as float32."""
    for tag in {tag for line in lines for tag in line} - {"step", "time"}:
        shown = [(event.step, event.value) for event in board.Scalars(tag)]
        expected = [(line["step"], pytest.approx(line[tag], rel=1e-6)) for line in lines if tag in line]
        assert shown == expected, tag
    assert set(board.Tags()["scalars"]) == {tag for line in lines for tag in line} - {"step", "time"}


def train(monitor: Monitor, first: int, steps: int) -> None:
    """Steps of two micro-steps of 4 images each; step s, counted from 0, has losses s and s + 0.5."""
    for step in range(first, steps):
        for part in (0.0, 0.5):
            with monitor.data_wait():
                pass
            monitor.add([torch.tensor(step + part)], 4)
        if monitor.due(step):
            monitor.write(step, lr=0.1 / (step + 1), gradient_norm=torch.tensor(2.0 * step))


def test_scalars(alone, tmp_path):
    monitor = Monitor(tmp_path / "run", 0, 5, 2, MFU_CONSTANTS)
    train(monitor, 0, 5)
    monitor.scalars(5, {"eval/top1": 12.5, "eval/unknown": None, "eval/loss": math.nan})
    monitor.close()
    *training, evaluation = read_lines(tmp_path / "run")
    assert [line["step"] for line in training] == [2, 4, 5]
    assert all(line.keys() == TAGS | {"step", "time"} for line in training)
    assert [line["train/loss"] for line in training] == [0.75, 2.75, 4.25]  # means of micro-steps since the last
    assert [line["train/learning_rate"] for line in training] == [0.1 / 2, 0.1 / 4, 0.1 / 5]
    assert [line["train/gradient_norm"] for line in training] == [2.0, 6.0, 8.0]
    assert evaluation.keys() == {"step", "time", "eval/top1"}
    assert (evaluation["step"], evaluation["eval/top1"]) == (5, 12.5)
    assert_equal_to_lines(read_board(tmp_path / "run"), [*training, evaluation])


def test_speed_and_mfu_are_consistent(alone, tmp_path):
    monitor = Monitor(tmp_path, 0, 1, 1, MFU_CONSTANTS)
    train(monitor, 0, 1)
    monitor.close()
    (line,) = read_lines(tmp_path)
    assert line["speed/images_per_second"] > 0
    assert line["speed/mfu"] == pytest.approx(line["speed/images_per_second"] * 1e6 / 1e12)
    assert 0 < line["speed/waiting_for_data"] < 1
    assert 0 < line["memory/peak_gib"] < 1000


def test_images_are_denormalized(alone, tmp_path):
    pixels = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    normalised = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    monitor = Monitor(tmp_path, 0, 1, 1, MFU_CONSTANTS)
    monitor.images(normalised, mean, std)
    monitor.close()
    (event,) = read_board(tmp_path).Images("train/images")
    grid = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert grid.shape == (6 + 2 * 2, 3 * (6 + 2) + 2, 3)  # images are 2 pixels apart
    for number, image in enumerate(pixels):
        left = 2 + number * (6 + 2)
        shown = grid[2:8, left : left + 6].astype(float)
        assert np.abs(shown - 255 * image.permute(1, 2, 0).numpy()).max() <= 1


def test_only_64_images_are_shown(alone, tmp_path):
    monitor = Monitor(tmp_path, 0, 1, 1, MFU_CONSTANTS)
    monitor.images(torch.zeros(80, 3, 4, 4), (0.5,) * 3, (0.5,) * 3)
    monitor.close()
    (event,) = read_board(tmp_path).Images("train/images")
    assert (event.width, event.height) == (8 * 6 + 2, 8 * 6 + 2)


def test_text(alone, tmp_path):
    monitor = Monitor(tmp_path, 0, 1, 1, MFU_CONSTANTS)
    monitor.text("configuration", "output: größer\ndata:\n  hflip: 0.5")
    monitor.close()
    (event,) = read_board(tmp_path).Tensors("configuration/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text == "```\noutput: größer\ndata:\n  hflip: 0.5\n```"


def test_pauses_are_left_out_of_rates(alone, tmp_path, monkeypatch):
    """Of 16 s by the monitor's clock 8 are paused, and 2 of the other 8 are spent waiting."""
    now = 100.0
    monkeypatch.setattr("launch.monitor.time", SimpleNamespace(time=time.time, perf_counter=lambda: now))
    monitor = Monitor(tmp_path, 0, 9, 1, MFU_CONSTANTS)
    with monitor.data_wait():
        now += 2
    with monitor.paused():
        now += 8
    now += 6
    monitor.add([torch.tensor(1.0)], 4)
    monitor.write(0, 0.1, 1.0)
    monitor.close()
    (line,) = read_lines(tmp_path)
    assert (line["speed/waiting_for_data"], line["speed/images_per_second"]) == (2 / 8, 4 / 8)


def test_a_resumed_run_drops_metrics_after_its_checkpoint(alone, tmp_path):
    """Killed after 7 steps, it resumes from a checkpoint of 4."""
    killed = Monitor(tmp_path, 0, 8, 1, MFU_CONSTANTS)
    killed.text("configuration", "before")
    train(killed, 0, 4)
    killed.scalars(4, {"eval/top1": 40.0})
    train(killed, 4, 7)
    killed.close()
    kept = read_lines(tmp_path)[:5]
    with open(tmp_path / METRICS_NAME, "a") as lines:
        lines.write('{"step": 3, "time": 17')  # the last write was cut

    await_next_second()
    resumed = Monitor(tmp_path, 4, 8, 1, MFU_CONSTANTS)
    assert read_lines(tmp_path) == kept
    train(resumed, 4, 8)
    resumed.scalars(8, {"eval/top1": 80.0})
    resumed.close()
    lines = read_lines(tmp_path)
    assert lines[:5] == kept
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    board = read_board(tmp_path)
    assert_equal_to_lines(board, lines)
    assert len(board.Tensors("configuration/text_summary")) == 1


def test_a_run_that_starts_over_keeps_old_metrics_in_another_file(alone, tmp_path, capsys):
    for _ in range(2):  # the first was killed before its first checkpoint, or has lost them
        await_next_second()
        monitor = Monitor(tmp_path, 0, 3, 1, MFU_CONSTANTS)
        monitor.images(torch.zeros(1, 3, 4, 4), (0.5,) * 3, (0.5,) * 3)
        train(monitor, 0, 3)
        monitor.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3]
    assert_equal_to_lines(read_board(tmp_path), read_lines(tmp_path))
    kept = tmp_path / "metrics-to-step-00000003.jsonl"
    assert [json.loads(line)["step"] for line in kept.read_text().splitlines()] == [1, 2, 3]
    line = f"no checkpoint to resume from, the run starts over; the metrics of the last start are in {kept}"
    assert capsys.readouterr().out.splitlines().count(line) == 1


@pytest.mark.parametrize(
    "cut", ['{"step": 2, "tr', '{"step"', "{", "\0\0\0\0", '{"step": 1, "{"step": 2}', "[1]", "{}", '{"step": "x"}']
)
def test_later_and_truncated_lines_are_dropped(tmp_path, cut):
    path = tmp_path / METRICS_NAME
    whole = ['{"step": 1}', '{"step": 2, "eval/top1": 3.5}', '{"step": 3}']
    path.write_text("\n".join([*whole, cut]))
    truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2, "eval/top1": 3.5}\n'
    truncate_metrics(path, 0)
    assert path.read_text() == ""
    kept = tmp_path / "metrics-to-step-00000002.jsonl"
    assert kept.read_text() == '{"step": 1}\n{"step": 2, "eval/top1": 3.5}\n'
    assert truncate_metrics(path, 0) is None
    assert sorted(tmp_path.iterdir()) == [kept, path]


def test_a_full_disk_does_not_end_training(alone, tmp_path, capsys):
    hook = threading.excepthook
    (tmp_path / METRICS_NAME).symlink_to("/dev/full")
    monitor = Monitor(tmp_path, 0, 3, 1, MFU_CONSTANTS)
    train(monitor, 0, 3)
    monitor.close()
    assert capsys.readouterr().err == (
        f"rank 0: cannot write to {tmp_path / METRICS_NAME}: No space left on device; training goes on, with steps"
        " missing\n"
    )
    assert threading.excepthook == hook
    assert [event.step for event in read_board(tmp_path).Scalars("train/loss")] == [1, 2, 3]


def test_lines_are_whole_once_there_is_space_again(alone, tmp_path, capsys, no_file_larger_than):
    monitor = Monitor(tmp_path, 0, 9, 1, MFU_CONSTANTS)
    monitor.scalars(1, {"eval/top1": 1.0})
    size = (tmp_path / METRICS_NAME).stat().st_size
    with no_file_larger_than(size + 10):
        monitor.scalars(2, {"eval/top1": 2.0})
    monitor.scalars(3, {"eval/top1": 3.0})
    monitor.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 3]
    assert "metrics.jsonl: File too large; training goes on" in capsys.readouterr().err


def test_without_disk_space_tensorboard_is_switched_off(alone, tmp_path, capsys, no_file_larger_than):
    monitor = Monitor(tmp_path, 0, 9, 1, MFU_CONSTANTS)
    with no_file_larger_than(2000):
        for _ in range(2):
            monitor.images(torch.rand(8, 3, 32, 32), (0.5,) * 3, (0.5,) * 3)
            monitor._to_tensorboard("flush")  # waits for its thread
    train(monitor, 0, 1)
    monitor.close()
    assert capsys.readouterr().err == (
        f"rank 0: cannot write to {tmp_path}/tensorboard: File too large; training goes on, without TensorBoard\n"
    )
    assert [line["step"] for line in read_lines(tmp_path)] == [1]


def test_skipped_steps_have_no_loss_and_no_norm(alone, tmp_path, capsys):
    monitor = Monitor(tmp_path, 0, 9, 1, MFU_CONSTANTS, max_bad_samples=3)
    monitor.write(0, 0.1, math.inf, 2)
    train(monitor, 1, 2)
    monitor.close()
    skipped, trained = read_lines(tmp_path)
    assert skipped.keys() == trained.keys() - {"train/loss", "train/gradient_norm"}
    assert (skipped["data/broken_images"], skipped["speed/images_per_second"]) == (2, 0)
    assert "step 1/9  skipped  lr" in capsys.readouterr().out


def test_a_run_that_goes_back_writes_its_steps_once(alone, tmp_path):
    monitor = Monitor(tmp_path, 0, 9, 1, MFU_CONSTANTS)
    train(monitor, 0, 5)
    monitor.add([torch.tensor(1000.0)], 4)
    await_next_second()
    monitor.rewind(3)
    train(monitor, 3, 6)
    monitor.close()
    lines = read_lines(tmp_path)
    assert [(line["step"], line["train/loss"]) for line in lines] == [(step + 1, step + 0.25) for step in range(6)]
    assert_equal_to_lines(read_board(tmp_path), lines)


def test_a_full_disk_does_not_end_a_run_that_goes_back(alone, tmp_path, capsys, no_file_larger_than):
    monitor = Monitor(tmp_path, 0, 9, 1, MFU_CONSTANTS)
    train(monitor, 0, 2)
    with no_file_larger_than(10):
        monitor.rewind(1)
        monitor.scalars(2, {"eval/top1": 1.0})
    train(monitor, 1, 3)
    monitor.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 2, 3]
    errors = capsys.readouterr().err
    assert f"cannot remove the steps after 1 from {tmp_path / METRICS_NAME}: File too large; they are rep" in errors
    assert (
        f"cannot write to {tmp_path / 'tensorboard'}: File too large; training goes on, without TensorBoard" in errors
    )


def test_bad_samples_are_counted_up_to_the_limit(alone, tmp_path):
    monitor = Monitor(tmp_path, 0, 9, 1, MFU_CONSTANTS, max_bad_samples=3)
    for step, broken in enumerate((0, 3)):
        monitor.add([torch.tensor(1.0)], 4)
        monitor.write(step, 0.1, 1.0, broken)
    monitor.add([torch.tensor(1.0)], 4)
    with pytest.raises(
        RunError, match="^4 bad samples in this epoch at step 3, data.max_bad_samples allows 3; check the sh"
    ):
        monitor.write(2, 0.1, 1.0, 4)
    monitor.close()
    assert [line["data/broken_images"] for line in read_lines(tmp_path)] == [0, 3, 4]
    assert_equal_to_lines(read_board(tmp_path), read_lines(tmp_path))


def test_a_repeated_warning_is_printed_once(alone, tmp_path, capsys):
    monitor = Monitor(tmp_path, 0, 1, 1, MFU_CONSTANTS)
    for line in ("sample 7: not an image", "sample 8: not an image", "sample 7: not an image"):
        monitor.warn(line)
    monitor.close()
    assert capsys.readouterr().err == "rank 0: sample 7: not an image\nrank 0: sample 8: not an image\n"


def test_lines_are_printed_verbatim(alone, tmp_path, capsys):
    monitor = Monitor(tmp_path, 0, 1, 1, MFU_CONSTANTS)
    monitor.log("output: runs/[b5] :smile: " + 300 * "x")
    train(monitor, 0, 1)
    monitor.close()
    printed, step = capsys.readouterr().out.splitlines()
    assert printed == "output: runs/[b5] :smile: " + 300 * "x"
    assert step.startswith("step 1/1  loss 0.2500  lr 1.00e-01  ")


def test_a_terminal_has_a_progress_bar(alone, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take any stream for a terminal
    monitor = Monitor(tmp_path, 2, 4, 1, MFU_CONSTANTS)
    monitor.log("a line of its own")
    train(monitor, 2, 4)
    monitor.close()
    printed = capsys.readouterr().out
    assert "a line of its own" in printed
    assert "4/4" in printed
    assert "loss 3.2500" in printed
    assert "step 4/4  loss" not in printed
    assert printed.rindex("\x1b[?25h") > printed.rindex("\x1b[?25l"), "the cursor stays hidden"


TWO_RANKS = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch
from launch.distributed import RunError, read_rank_info, init_distributed, destroy_process_group
from launch.flops import MfuConstants
from launch.monitor import Monitor

rank_info = read_rank_info(os.environ)
init_distributed(rank_info, "cpu", timedelta(hours=1))
monitor = Monitor(Path(sys.argv[1], str(rank_info.rank)), 0, 2, 1, MfuConstants(1, 1.0), max_bad_samples=5)
monitor.add([torch.tensor(1.0 + rank_info.rank)], 4)
monitor.write(0, 0.1, 1.0, bad_samples=2 + rank_info.rank)
monitor.warn("a warning")
monitor.images(torch.zeros(1, 3, 4, 4), (0.5,) * 3, (0.5,) * 3)
monitor.text("name", "text")
monitor.log(f"rank {rank_info.rank} speaks")
try:  # no step was trained
    monitor.write(1, 0.1, 1.0, bad_samples=3)
except RunError:
    Path(sys.argv[1], f"refused-{rank_info.rank}").touch()
monitor.close()
destroy_process_group()
"""


def test_losses_are_averaged_over_ranks_and_rank_0_writes(forked, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS)
    finished = forked(2, script, tmp_path)
    assert finished.returncode == 0, finished.stderr
    line, skipped = read_lines(tmp_path / "0")
    assert line["train/loss"] == 1.5
    assert (line["data/broken_images"], skipped["data/broken_images"]) == (5, 6)
    assert {"rank 0: a warning", "rank 1: a warning"} <= set(finished.stderr.splitlines())
    assert {path.name for path in tmp_path.iterdir()} == {"script.py", "0", "refused-0", "refused-1"}
    assert "rank 0 speaks" in finished.stdout
    assert "rank 1 speaks" not in finished.stdout
