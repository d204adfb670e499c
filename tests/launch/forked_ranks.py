"""Runs Python scripts and modules on one or more ranks, as forks of this process, which has imported the packages.

Reads a request from each line of standard input, as JSON: {"ranks", "words": what follows `python`, "variables": of the
environment, "output", "errors": files}. Answers with {"status": the first exit status that is not 0, "statuses": of all
ranks}. Like torchrun, it ends all ranks when one fails (and waits for those that ignore SIGTERM).
"""

import atexit
import gc
import json
import os
import runpy
import signal
import sys
import traceback
from typing import NoReturn

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # imports may print

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (DeepSpeed imports it, and the compiler, at its start)
import numpy as np
import PIL.Image
import torch
import torchmetrics.classification  # noqa: F401

import launch.train  # noqa: F401
from dataio.augment.params import ImageOptions
from dataio.pipeline import build_pipeline, make_resizer


def prepare() -> None:
    """Does what each process does once, in two seconds together, and what makes forks cheap."""
    options, cpu = ImageOptions(), torch.device("cpu")
    # DALI translates the functions of a pipeline; this one is never run, so it has no threads.
    build_pipeline(options, lambda: (), max_batch_size=1, device=cpu, resizer=make_resizer(options, cpu))
    hasattr(deepspeed.ops, "__compatible_ops__")  # DeepSpeed tries which of its operators it can compile
    PIL.Image.init()
    gc.collect()
    gc.freeze()  # forks would look through all objects, and thereby copy their memory


def become(rank: int, start: dict) -> NoReturn:
    """Runs the request as one rank in this process, and ends it."""
    for descriptor, path in ((1, start["output"]), (2, start["errors"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.update(start["variables"])
    if start["ranks"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(start["ranks"]))
    np.random.seed()  # otherwise all forks would draw the same numbers
    try:
        run(start["words"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # tearing down the modules would take two seconds of copying shared memory


def run(words: list[str]) -> None:
    if words[0] == "-m":
        sys.modules.pop(words[1], None)
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(words[0]))
        runpy.run_path(words[0], run_name="__main__")


def wait(ranks: list[int]) -> dict:
    """Waits for all ranks, and returns the answer."""
    failed, statuses = 0, {}
    while len(statuses) < len(ranks):
        ended, status = os.wait()
        statuses[ended] = os.waitstatus_to_exitcode(status)
        if status and not failed:
            failed = statuses[ended]
            for rank in set(ranks) - statuses.keys():
                os.kill(rank, signal.SIGTERM)
                os.kill(rank, signal.SIGCONT)  # tests stop some
    return {"status": failed, "statuses": [statuses[rank] for rank in ranks]}


prepare()
for line in sys.stdin:
    start, ranks = json.loads(line), []
    for rank in range(start["ranks"]):
        child = os.fork()
        if child == 0:
            become(rank, start)
        ranks.append(child)
    print(json.dumps(wait(ranks)), file=answers, flush=True)
