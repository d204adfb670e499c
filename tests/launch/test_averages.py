"""BatchNorm statistics over ranks and weights over steps, on two real ranks."""

import json

SCRIPT = """
import json, os, sys
from datetime import timedelta
import torch
from torch import nn
from launch.averages import average_buffers
from launch.distributed import placement, start, stop

place = placement(os.environ)
start(place, "cpu", timedelta(hours=1))
model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(3))
model[1].running_mean += torch.tensor([1.0, 2.0]) * (place.rank + 1)
model[2].running_var += 10.0 * place.rank
weight = model[0].weight.clone()
average_buffers(model)
kept = bool(torch.equal(weight, model[0].weight))
with open(f"{sys.argv[1]}/{place.rank}.json", "w") as file:
    json.dump([model[1].running_mean.tolist(), model[2].running_var.tolist(), kept], file)
stop()
"""


def test_buffers_are_the_mean_over_ranks_and_weights_are_not_touched(forked, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    finished = forked(2, script, tmp_path)
    assert finished.returncode == 0, finished.stderr
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[1.5, 3.0], [6.0, 6.0, 6.0], True]
