"""The state to resume a loader from, importable without PyTorch and DALI, which checkpoints are listed without."""

from typing_extensions import TypedDict


class LoaderState(TypedDict):
    """The position of a run, and what must be the same to resume there."""

    seed: int
    samples_seen: int  # of completed steps, over all ranks
    manifest_hash: str
    global_batch: int
    order: str  # of `str(ShuffledSampler)`
