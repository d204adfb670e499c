"""BatchNorm over groups of samples, with results that do not depend on the number of ranks or micro-steps.

Every `group_size` consecutive samples of the run are normalised with statistics of their own, wherever they are
computed. The running statistics, for evaluation, move once per optimizer step towards the mean over all of its groups.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm of each group of `group_size` samples: (B, C, height, width) → the same shape; B a multiple of it.

    Parameters, saved buffers and evaluation are those of nn.BatchNorm2d. Running statistics are left to
    `sync_batchnorm_buffers`.
    """

    sums: Tensor  # (2 C + 1,) float32: of the groups' means and unbiased variances in this step, and their number

    def __init__(self, norm: nn.BatchNorm2d, group_size: int) -> None:
        """Take over the parameters and buffers of `norm`, which has a momentum."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.group_size = group_size
        assert norm.running_mean is not None
        sums = torch.zeros(2 * norm.num_features + 1, device=norm.running_mean.device)
        self.register_buffer("sums", sums, persistent=False)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the groups, or use the running statistics in evaluation mode."""
        if not self.training:
            return super().forward(x)
        if len(x) == self.group_size:
            return self._normalise(x)
        return torch.cat([self._normalise(group) for group in x.split(self.group_size)])

    def _normalise(self, group: Tensor) -> Tensor:
        """Normalise one group and add its statistics to `sums`."""
        found = torch.ones_like(self.sums)
        mean, variance = found[: self.num_features], found[self.num_features : -1]
        # A momentum of 1 replaces the running statistics, here `mean` and `variance`, by those of the group.
        out = F.batch_norm(group, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        self.sums += found
        return out

    def update_running_statistics(self, sums: Tensor) -> None:
        """Move the running statistics by `momentum` towards the mean of a step's groups, whose `sums` these are."""
        mean, variance = (sums[:-1] / sums[-1]).chunk(2)
        self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr,arg-type]
        self.running_var.lerp_(variance, self.momentum)  # type: ignore[union-attr,arg-type]
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]


def convert_batchnorm(model: nn.Module, group_size: int) -> None:
    """Replace every nn.BatchNorm2d of the model by a GroupBatchNorm2d with its tensors, in place.

    State dicts stay as they are.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, GroupBatchNorm2d(child, group_size))


@torch.no_grad()
def sync_batchnorm_buffers(model: nn.Module, riders: Tensor, update: bool = True) -> Tensor:
    """Update the running statistics at the end of a step, and return the sums of `riders` over the ranks.

    Every rank calls it after the last micro-step. riders: (n,) float32 on the model's device, other values that the
    ranks share in each step. update: False forgets the step's statistics, the same on all ranks. Everything travels in
    one all-reduce (b5: 8,168 numbers of BatchNorm); the result stays on the device.
    """
    norms = [module for module in model.modules() if isinstance(module, GroupBatchNorm2d)]
    flat = torch.cat([riders, *(norm.sums for norm in norms)])
    if dist.get_world_size() > 1:
        dist.all_reduce(flat)
    rider_sums, *sums = flat.split([riders.numel(), *(norm.sums.numel() for norm in norms)])
    for norm, own_sums in zip(norms, sums, strict=True):
        if update:
            norm.update_running_statistics(own_sums)
        norm.sums.zero_()
    return rider_sums
