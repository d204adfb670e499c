"""What each launcher's test starts: joins the group, and writes what it found to FOLDER/RANK.json.

usage: report_rank.py cpu|cuda FOLDER (deepspeed puts --local_rank=N before them)
"""

import json
import os
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch

from launch.distributed import count_ranks_here, placement, start, stop

device_type, folder = sys.argv[-2:]
place = placement(os.environ)
device = start(place, device_type, timedelta(hours=1))
total = torch.tensor([place.rank + 1.0], device=device)
torch.distributed.all_reduce(total)
found = {
    **asdict(place),
    "sum": total.item(),
    "group": [torch.distributed.get_rank(), torch.distributed.get_world_size()],
    "ranks_here": count_ranks_here(),
    "device": str(device),
    "backend": torch.distributed.get_backend(),
    "node": os.environ.get("SLURMD_NODENAME"),
    "master": [os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]],
}
Path(folder, f"{place.rank}.json").write_text(json.dumps(found))
stop()
