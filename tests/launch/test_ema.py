"""BatchNorm statistics averaged over two real ranks, and the EMA of the weights."""

import json

SCRIPT = """
import json, os, sys
from datetime import timedelta
import torch
from torch import nn
from launch.engine import sync_batchnorm_buffers
from launch.distributed import read_rank_info, init_distributed, destroy_process_group

rank_info = read_rank_info(os.environ)
init_distributed(rank_info, "cpu", timedelta(hours=1))
model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(3))
model[1].running_mean += torch.tensor([1.0, 2.0]) * (rank_info.rank + 1)
model[2].running_var += 10.0 * rank_info.rank
weight = model[0].weight.clone()
sync_batchnorm_buffers(model, torch.zeros(1))
kept = bool(torch.equal(weight, model[0].weight))
with open(f"{sys.argv[1]}/{rank_info.rank}.json", "w") as file:
    json.dump([model[1].running_mean.tolist(), model[2].running_var.tolist(), kept], file)
destroy_process_group()
"""


def test_buffers_are_averaged_over_ranks_and_weights_are_not(forked, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    finished = forked(2, script, tmp_path)
    assert finished.returncode == 0, finished.stderr
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[1.5, 3.0], [6.0, 6.0, 6.0], True]
