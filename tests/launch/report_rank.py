"""Joins the process group and writes rank, device and address to FOLDER/RANK.json; for the tests of launchers.

usage: report_rank.py cpu|cuda FOLDER (deepspeed puts --local_rank=N before them)
"""

import json
import os
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch

from launch.distributed import destroy_process_group, get_local_world_size, init_distributed, read_rank_info

device_type, folder = sys.argv[-2:]
rank_info = read_rank_info(os.environ)
device = init_distributed(rank_info, device_type, timedelta(hours=1))
total = torch.tensor([rank_info.rank + 1.0], device=device)
torch.distributed.all_reduce(total)
found = {
    **asdict(rank_info),
    "sum": total.item(),
    "group": [torch.distributed.get_rank(), torch.distributed.get_world_size()],
    "local_world_size": get_local_world_size(),
    "device": str(device),
    "backend": torch.distributed.get_backend(),
    "node": os.environ.get("SLURMD_NODENAME"),
    "master": [os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]],
}
Path(folder, f"{rank_info.rank}.json").write_text(json.dumps(found))
destroy_process_group()
