"""Connection loss: errors by which gloo, NCCL and the process group's store say that another rank is gone."""

import re

import torch.distributed as dist

_CONNECTION_LOSS = re.compile(
    "(Connection (closed by (remote )?peer|reset by peer)|Broken pipe|[Ff]ailed to recv, got 0 bytes"
    "|Connection timed out|No route to host|failed to connect|remote process exited|ncclRemoteError).*"
)


def connection_loss(error: Exception) -> str | None:
    """Return what gloo, NCCL or the store says of another rank that is gone; None if `error` is anything else."""
    if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
        return None
    found = _CONNECTION_LOSS.search(str(error))
    return found and found[0]
