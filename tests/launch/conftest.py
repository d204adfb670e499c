"""Fixtures: commands as processes and as forks, a process group inside the test, and one small run for all tests."""

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from torch.distributed import TCPStore

from dataio.pack.packer import PackOptions, pack
from launch.config import Config, load_config
from launch.distributed import destroy_process_group, find_free_port, init_distributed, read_rank_info

ROOT = Path(__file__).parents[2]
SMALL_RUN = """
model: {name: polaformerpp_b0, drop_path_rate: 0.0}
data:
  image_size: 32
  crop_scale: [0.6, 1.0]
  augmentation: simple
  crop_pct: 1.0
  mean: [0.286, 0.286, 0.286]
  std: [0.353, 0.353, 0.353]
  mixup: 0.0
  cutmix: 0.0
  threads: 1
optimizer: {epochs: 4, global_batch_size: 16, lr: 1.6e-2, warmup_lr: 1.0e-5, warmup_epochs: 0.4, ema_decay: 0.8}
engine: {precision: fp32}
checkpoint: {every_epochs: 2}
log: {eval_every_epochs: 2}
"""
_OF_LAUNCHERS = ("SLURM_", "MASTER_", "LOCAL_", "DS_", "RANK", "WORLD_SIZE")


@pytest.fixture
def no_launcher() -> Iterator[None]:
    """An environment without any launcher's variables, which is restored after the test."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(_OF_LAUNCHERS):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def alone(no_launcher) -> Iterator[torch.device]:
    """The CPU, with a gloo process group of this process alone."""
    yield init_distributed(read_rank_info(os.environ), "cpu", timedelta(hours=1))
    destroy_process_group()


@pytest.fixture
def no_file_larger_than() -> Callable[[int], contextlib.AbstractContextManager]:
    """Returns a context manager: inside, a file above this size in bytes fails with "File too large"."""

    @contextlib.contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def free_port() -> int:
    return find_free_port()


@pytest.fixture(scope="session")
def environ() -> dict[str, str]:
    """The environment of commands: no launcher's variables, no GPU."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def command(environ) -> Callable[..., subprocess.CompletedProcess]:
    """Returns a function: runs Python with these arguments in the project's root, on the CPU; its output is text.

    Keywords are environment variables of the process.
    """

    def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
        words = [sys.executable, *map(str, arguments)]
        return subprocess.run(words, cwd=ROOT, env=environ | variables, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def torchrun(command) -> Callable[..., subprocess.CompletedProcess]:
    """Returns a function: the same on a number of ranks, under torchrun."""
    return lambda ranks, *arguments: command(
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments
    )


class Forks:
    """Runs commands in forks of forked_ranks.py, which is started on first use."""

    def __init__(self, environ: dict[str, str], folders: pytest.TempPathFactory) -> None:
        self._environ, self._folders, self._server = environ, folders, None

    def __call__(self, ranks: int, *words: object, **variables: str) -> subprocess.CompletedProcess:
        folder = self._folders.mktemp("forked")
        output, errors = folder / "output", folder / "errors"
        output.touch()
        errors.touch()
        if ranks > 1:
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # in this process, as torchrun's
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        start = {"ranks": ranks, "words": [*map(str, words)], "variables": variables}
        start |= {"output": str(output), "errors": str(errors)}
        try:
            answer = self._answer(json.dumps(start))
        except BaseException:
            self.close()  # ranks that hang among them
            raise
        finished = subprocess.CompletedProcess(words, answer["status"], output.read_text(), errors.read_text())
        finished.statuses = answer["statuses"]  # of all ranks
        return finished

    def _answer(self, line: str) -> dict:
        if self._server is None:
            command = [sys.executable, Path(__file__).with_name("forked_ranks.py")]
            self._server = subprocess.Popen(
                command, cwd=ROOT, env=self._environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
        print(line, file=self._server.stdin, flush=True)
        if answer := self._server.stdout.readline():
            return json.loads(answer)
        raise RuntimeError("forked_ranks.py has ended; its last output is among the captured errors")

    def close(self) -> None:
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None


@pytest.fixture(scope="session")
def forked(environ, tmp_path_factory) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Returns a function: the same as `torchrun`, or as `command` for one rank, without seconds of imports.

    Forks do not show how a process ends or what hash seeds change: tests of resuming and of launchers use real
    processes. There is no GPU, so forking is safe.
    """
    with contextlib.closing(Forks(environ | {"DS_ACCELERATOR": "cpu"}, tmp_path_factory)) as forks:
        yield forks


@pytest.fixture(scope="session")
def small_config(fashion_shards, tmp_path_factory) -> Path:
    """The configuration file of a small run of b0 on `fashion_shards`, without its output."""
    tree = yaml.safe_load(SMALL_RUN)
    tree["data"] |= {part: str(fashion_shards / part) for part in ("train", "val")}
    path = tmp_path_factory.mktemp("configs") / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="session")
def small_shards(fashion, tmp_path_factory) -> Path:
    """Folder with `train` and `val`: 167 and 37 images of `fashion`."""
    root = tmp_path_factory.mktemp("small_shards")
    pack(fashion, root / "train", PackOptions(val_percent=60, split="train"))
    pack(fashion, root / "val", PackOptions(val_percent=10, split="val"))
    return root


@pytest.fixture(scope="session")
def train_arguments() -> Callable[..., list[str]]:
    """Returns a function: folder of shards, output, overrides → arguments of launch/train.py.

    They make 11 steps over 2 epochs of `small_shards`, with everything on that draws random numbers.
    """
    return lambda shards, output, *more: [
        *("--config", "configs/quickstart.yaml", f"output={output}"),
        *(f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", "data.threads=1", "model.drop_path_rate=0.1"),
        *("data.mixup=0.8", "data.cutmix=1.0", "data.reprob=0.25", "data.augmentation=rand-augment"),
        *("optimizer.epochs=2", "optimizer.global_batch_size=32", "optimizer.gradient_accumulation_steps=2"),
        *("checkpoint.every_epochs=0.4", "checkpoint.keep=3", "log.eval_every_epochs=1", "log.every_steps=1", *more),
    ]


@pytest.fixture
def configure(small_config, tmp_path) -> Callable[..., Config]:
    """Returns a function: overrides → the small run's configuration."""
    return lambda *overrides: load_config(small_config, [f"output={tmp_path / 'run'}", *overrides])


@pytest.fixture(scope="session")
def trained_run(small_config, forked, tmp_path_factory) -> Path:
    """The folder of that run: four epochs on one rank, two checkpoints."""
    output = tmp_path_factory.mktemp("run") / "b0"
    finished = forked(1, "launch/train.py", "--config", small_config, f"output={output}")
    assert finished.returncode == 0, finished.stderr
    return output


# --- Benchmarks -----------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
        ),
    ],
)
def device(request) -> str:
    """The type of each device that a benchmark measures."""
    return request.param


@pytest.fixture(scope="module")
def small_peak_measurements() -> Iterator[None]:
    """Benchmarks whose measurements of the device's peak rates need no gigabytes, and few rounds."""
    from launch.benchmark import measure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_COPIED_BYTES", {"cpu": 1 << 20, "cuda": 1 << 26})
        patch.setattr(measure, "_MATMUL_SIZE", {"cpu": 128, "cuda": 1024})
        patch.setattr(measure, "MAX_ROUNDS", 20)
        yield


@pytest.fixture(scope="session")
def run_benchmark() -> Callable[..., tuple[int, dict | None, str, str]]:
    """Returns a function: a benchmark's module, path of its output, arguments → (status, report, stdout, stderr)."""

    def run(module: ModuleType, path: Path, *arguments: object) -> tuple[int, dict | None, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = module.main([*map(str, arguments), "--output", str(path)])
        return status, json.loads(path.read_text()) if path.exists() else None, out.getvalue(), err.getvalue()

    return run
