"""The start-up check: the same code and versions on all ranks, and a run's folder that all of them share.

What differs between hosts otherwise ends a run late or not at all: other code trains other ranks, and a folder that is
not shared lacks half of its first checkpoint. Everything here is compared once, before anything is allocated.
first_collective.py has checked before that all ranks reach each other.
"""

import hashlib
import platform
import secrets
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.distributed as dist

import dataio
import launch
import polaformer
from dataio.files import refresh_folder, sha256_of
from dataio.pipeline import DALI_VERSION
from launch.distributed import RunError, broadcast_object, gather_objects, raise_on_all_ranks

_PROBE = ".start-up-check"  # in the run's folder, followed by the rank
#: Seconds in which a file of another host is seen, on NFS too, where opening a folder reads it anew.
_SHARING_SECONDS = 10.0
#: Seconds between clocks that are worth a warning. Nothing in a run compares clocks of hosts, so it is no error; but
#: servers refuse requests with signatures that are minutes off, and logs of several hosts are out of order.
_CLOCK_SECONDS = 30.0
_CODE_SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h", ".so"}
_LEAST_FREE = 0.5  # of a GPU's memory, before the run allocates any


@dataclass(frozen=True)
class RankRecord:
    """What a rank runs on. Only `software` has to be the same on all ranks."""

    host: str
    software: dict[str, str]  # name → version
    code: str  # hash of our packages' source files
    gpu: str = ""  # model and compute capability; "" on the CPU
    driver: str = ""
    free_bytes: int = 0  # of the GPU's memory
    total_bytes: int = 0


def check_ranks(device: torch.device) -> None:
    """Compare what the ranks run on; print warnings, and hosts and ranks if there are several hosts, on rank 0.

    Raises RunError on every rank if their software or code is not the same.
    """
    with raise_on_all_ranks():
        files = hash_code() if dist.get_world_size() > 1 else {}
        kernels = {path: files.pop(path) for path in list(files) if path.endswith(".so")}
        own = make_record(device, files)
    records, kernels_of_ranks = gather_objects(own), gather_objects(kernels)
    hosts = [record.host for record in records]
    faults = find_faults(records)
    if len({record.code for record in records}) > 1:
        faults.append(describe_code(hosts, gather_objects(files)))
    if faults:
        raise RunError("\n".join(faults))
    gather_objects(None)  # a barrier
    clocks = gather_objects(time.time())
    warnings = find_warnings(records) + find_other_kernels(hosts, kernels_of_ranks) + find_wrong_clocks(hosts, clocks)
    if dist.get_rank() == 0:
        for line in warnings:
            print(f"warning: {line}", file=sys.stderr, flush=True)
        if len(set(hosts)) > 1:
            print(f"start-up check: {len(hosts)} ranks on {len(set(hosts))} hosts, same code and versions", flush=True)


def check_shared_folder(folder: Path, seconds: float = _SHARING_SECONDS) -> None:
    """Write a small file of each rank into a run's folder, read rank 0's everywhere, and remove them.

    Raises RunError on every rank, naming those that cannot write there, or have another folder at this path.
    """
    if dist.get_world_size() == 1:
        return
    token, host = broadcast_object(secrets.token_hex(8)), socket.gethostname()
    probe, probe_of_rank_0 = (folder / f"{_PROBE}-{rank:05d}" for rank in (dist.get_rank(), 0))
    try:
        with raise_on_all_ranks():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe.write_text(token)
            except OSError as error:
                raise RuntimeError(
                    f"{host} cannot write to the run's folder {folder}: {error.strerror}; make it writable there, or"
                    " choose another output"
                ) from error
        with raise_on_all_ranks():
            if not _appears(probe_of_rank_0, token, seconds):
                raise RuntimeError(
                    f"{host} has another folder at {folder.absolute()} than rank 0; choose an output on a file system"
                    " that all hosts share, by its absolute path"
                )
    except RunError:
        with suppress(OSError):
            probe.unlink()
        with suppress(OSError):
            folder.rmdir()  # rank 0's holds the lock, and stays
        raise
    with suppress(OSError):
        probe.unlink()


def _appears(path: Path, content: str, seconds: float) -> bool:
    """Return whether another rank's file is seen to have this content in time."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            refresh_folder(path.parent)
            if path.read_text() == content:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def make_record(device: torch.device, files: dict[str, str]) -> RankRecord:
    """Return this rank's record. files: hashes of our packages' source files."""
    import deepspeed  # as in launch.engine

    software = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "deepspeed": deepspeed.__version__,
        "DALI": DALI_VERSION,
    }
    code = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    if device.type == "cpu":
        return RankRecord(socket.gethostname(), software, code)
    software |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    major, minor = torch.cuda.get_device_capability(device)
    gpu = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    return RankRecord(socket.gethostname(), software, code, gpu, _driver_version(), *torch.cuda.mem_get_info(device))


def hash_code() -> dict[str, str]:
    """Return the hash of each source file of our packages and each compiled one, by its path below their folder."""
    found = {}
    for package in (dataio, launch, polaformer):
        folder = Path(package.__path__[0])
        for path in folder.rglob("*"):
            # Editors leave hidden files, and links without a target.
            if path.suffix in _CODE_SUFFIXES and not path.name.startswith(".") and path.is_file():
                found[str(path.relative_to(folder.parent))] = sha256_of(path)
    return found


def find_faults(records: Sequence[RankRecord]) -> list[str]:
    """Return a line for each kind of software that is not the same on all ranks."""
    hosts = [record.host for record in records]
    faults = []
    for name in records[0].software:
        if text := _describe_outliers([record.software.get(name, "missing") for record in records], hosts):
            faults.append(f"{name} is {text}; install the same on all hosts, with pip install -r requirements.txt")
    return faults


def describe_code(hosts: Sequence[str], files: Sequence[dict[str, str]]) -> str:
    """Name the ranks that run other code than most, and the files in question. files: hashes by path, of each rank."""
    paths = sorted({path for of_rank in files for path in of_rank})
    differing = [path for path in paths if len({of_rank.get(path) for of_rank in files}) > 1]
    keys = [repr(sorted(of_rank.items())) for of_rank in files]
    expected = _most_common(keys)
    ranks = name_ranks([rank for rank, key in enumerate(keys) if key != expected], hosts)
    more = f" and {len(differing) - 3} more files" if len(differing) > 3 else ""
    return (
        f"the code of {ranks} is not that of the other ranks: {', '.join(differing[:3])}{more}; start all ranks from"
        " the same commit"
    )


def find_other_kernels(hosts: Sequence[str], files: Sequence[dict[str, str]]) -> list[str]:
    """Return a line for each compiled file that is not the same on all ranks: builds of one commit may differ.

    files: hashes by path, of each rank.
    """
    lines = []
    for path in sorted({path for of_rank in files for path in of_rank}):
        hashes = [of_rank.get(path, "") for of_rank in files]
        if ranks := [rank for rank, found in enumerate(hashes) if found != _most_common(hashes)]:
            lines.append(f"{path} of {name_ranks(ranks, hosts)} is another build than that of the other ranks")
    return lines


def find_warnings(records: Sequence[RankRecord]) -> list[str]:
    """Return a line for each thing about the ranks' GPUs that slows a run down or may end it."""
    hosts, warnings = [record.host for record in records], []
    if text := _describe_outliers([record.gpu for record in records], hosts):
        warnings.append(
            f"the GPU is {text}: all wait for the slowest, and unlike models may round otherwise, which"
            " guard.compare_every_steps takes for a fault"
        )
    if text := _describe_outliers([record.driver for record in records], hosts):
        warnings.append(f"NVIDIA's driver is {text}")
    for rank, record in enumerate(records):
        if record.free_bytes < _LEAST_FREE * record.total_bytes:
            free, total = (count / 2**30 for count in (record.free_bytes, record.total_bytes))
            warnings.append(
                f"of the {total:.1f} GiB of the GPU of {name_ranks([rank], hosts)}, {free:.1f} GiB are free: other"
                " processes hold the rest, left over from another run perhaps; nvidia-smi there shows them"
            )
    return warnings


def find_wrong_clocks(hosts: Sequence[str], clocks: Sequence[float]) -> list[str]:
    """Return a line for each rank whose clock is far from the median. clocks: in seconds, all read at once."""
    median = statistics.median_low(clocks)
    return [
        f"the clock of {name_ranks([rank], hosts)} is {abs(clock - median):.0f} s"
        f" {'ahead of' if clock > median else 'behind'} the others; set it by NTP"
        for rank, clock in enumerate(clocks)
        if abs(clock - median) > _CLOCK_SECONDS
    ]


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return the ranks with their hosts: `rank 3 (node7), ranks 8, 9 (node8)`."""
    by_host: dict[str, list[str]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(str(rank))
    return ", ".join(f"rank{'s' * (len(some) > 1)} {', '.join(some)} ({host})" for host, some in by_host.items())


def _describe_outliers(values: Sequence[str], hosts: Sequence[str]) -> str:
    """Say which ranks do not have the most common value: `2.10 on rank 3 (node7), 2.11 on the other 15 ranks`."""
    expected = _most_common(values)
    outliers = {value: [rank for rank, found in enumerate(values) if found == value] for value in values}
    others = len(outliers.pop(expected))
    if not outliers:
        return ""
    named = [f"{value} on {name_ranks(ranks, hosts)}" for value, ranks in outliers.items()]
    return f"{', '.join(named)}, {expected} on the other {others} rank{'s' * (others > 1)}"


def _most_common(values: Sequence[str]) -> str:
    """Return the value that most ranks have; of several, the one of the lowest rank."""
    return Counter(values).most_common(1)[0][0]  # in the order in which they are first met


def _driver_version() -> str:
    """Return the version of NVIDIA's kernel module; "" if that is hidden."""
    with suppress(OSError, IndexError):
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        return next((word for word in line.split() if word[:1].isdigit() and "." in word), "")
    return ""
