"""Comparison of the state that every rank has a copy of: weights, BatchNorm's statistics and the EMA.

Copies stay equal, bit for bit, as long as all machines compute correctly. A fault of memory or arithmetic on one of
them would otherwise spoil a run quietly.
"""

import socket
from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from launch.distributed import RunError, gather_objects
from launch.ema import ModelEma
from launch.engine import Engine
from launch.host_copy import HostCopy

_PART_BITS = 24  # bits of a sum that a float32 holds exactly
_PARTS = 2  # numbers of a fingerprint


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """Return two numbers below 2**24 that change with any one bit of the tensors: (2,) float32, on their device.

    They are the lower 48 bits of the sum of all 32-bit words, each tensor's times an odd number of its own. Tensors are
    float32 or integers.
    """
    total = sum(
        (2 * number + 1) * (tensor.detach().view(torch.int32) if tensor.is_floating_point() else tensor).sum()
        for number, tensor in enumerate(tensors)
    )
    assert isinstance(total, Tensor)  # there is a tensor
    parts = [(total >> shift) % 2**_PART_BITS for shift in (0, _PART_BITS)]
    return torch.stack(parts).float()


class ReplicaCheck:
    """Compares the copies of all ranks. Every rank has one, and makes the same calls.

    The fingerprints travel with other sums in a step's all-reduce, and are read one step later.
    first_step: the completed steps of the run's start.
    """

    def __init__(self, engine: Engine, ema: ModelEma, first_step: int) -> None:
        self._engine, self._ema = engine, ema
        self._kinds = list(self._copies())
        shape = dist.get_world_size(), len(self._kinds), _PARTS
        self._sums = HostCopy(torch.zeros(shape), next(ema.module.parameters()).device)
        self._equal_after = first_step  # completed steps
        self._pending_after: int | None = None

    def fingerprints(self, due: bool) -> Tensor:
        """Return what this rank tells the others, to be summed over the ranks: (n,) float32, nothing if none is due."""
        values = torch.zeros(self._sums.shape, device=self._sums.device)
        if not due or len(values) == 1:
            return values.flatten()[:0]
        for kind, tensors in enumerate(self._copies().values()):
            values[dist.get_rank(), kind] = fingerprint(tensors)
        return values.flatten()

    def exchange(self, step: int, applied: bool, sums: Tensor) -> None:
        """Compare what the last call began to read, and begin to read the sums of `fingerprints` after `step`.

        applied: whether the step changed the weights. A skipped one leaves the comparison to the next: the run may have
        to go back from what it would find.

        step: counted from 0.
        Raises RunError on every rank, naming those that are not like the others.
        """
        if applied:
            self.finish()
        if sums.numel():
            self._sums.start(sums.view(self._sums.shape))
            self._pending_after = step + 1

    def finish(self) -> None:
        """Compare what is left to compare. Raises RunError as `exchange`."""
        if self._pending_after is None:
            return
        by_rank = self._sums.read().tolist()
        faults = [
            f"{kind} of {ranks}"
            for number, kind in enumerate(self._kinds)
            if (ranks := _describe_outliers([found[number] for found in by_rank]))
        ]
        if faults:
            raise RunError(
                f"after step {self._pending_after} the ranks are not equal: {', '.join(faults)}. A machine computes"
                " wrongly, or unlike models of GPUs round otherwise. The ranks were equal after step"
                f" {self._equal_after}: remove checkpoints of later steps, and start again on other machines"
            )
        # Statistics and EMA are those of before the step.
        self._equal_after, self._pending_after = self._pending_after - 1, None

    def rewind(self, step: int) -> None:
        """Forget what was read after `step` completed steps, to which the run goes back."""
        self._equal_after, self._pending_after = min(self._equal_after, step), None

    def _copies(self) -> dict[str, list[Tensor]]:
        """Return the tensors of which every rank has a copy, by what they are."""
        parameters = dict(self._engine.module.named_parameters())
        state = self._engine.module.state_dict()
        copies = {
            "BatchNorm's statistics": [value for name, value in state.items() if name not in parameters],
            "the EMA": list(self._ema.module.state_dict().values()),
        }
        if self._engine.zero_optimization_stage() < 3:  # which divides them
            copies["the weights"] = list(parameters.values())
        return copies


def _describe_outliers(fingerprints: list[list[float]]) -> str:
    """Name the ranks that do not have the most common fingerprint: `rank 2 (node7)`; "" if there are none.

    All ranks are named if no fingerprint is that of more than half of them. Every rank calls it, with the same.
    """
    keys = list(map(tuple, fingerprints))
    (most_common, count), *others = Counter(keys).most_common()
    if not others:
        return ""
    hosts = gather_objects(socket.gethostname())
    outliers = [rank for rank, key in enumerate(keys) if key != most_common or 2 * count <= len(keys)]
    return ", ".join(f"rank {rank} ({hosts[rank]})" for rank in outliers)
