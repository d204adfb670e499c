"""launch/train.py that does harm to itself: harmed_run.py [arguments], with HARM and SKIP in the environment.

HARM is JSON, a list of {"step": from 1, "rank": …, "to": place, "from_then_on": false}. Places are
- "image" (in the first micro-step), "target" (in the second), "spike" (targets that multiply the loss), "gradient",
  "weight", "sums" (of BatchNorm), "statistics", "EMA";
- "weight bit", "statistics bit", "EMA bit": one that flips;
- "speed": a sleep of two seconds in each micro-step, between data and forward pass;
- "clock": it jumps back by a day;
- "stop", the signal that stops a run with a checkpoint, and "wait", for such a signal of others, after the file
  HELD-rank is made;
- "process", which stops by SIGSTOP, and "main thread", which waits for ever;
- "life", which SIGKILL ends, and "code", which raises an AssertionError.
With {"kill": true, "rank": …} and "after": seconds, or "at": function of a save or of going back, "call": from 1,
SIGKILL ends the rank.
The file KILLED is made before a kill, and STEPPED after the first step.
Harm is done in the first start of a Slurm job, or in that with "restart": its number.
SKIP is a list of steps, from 1, that the run skips, as a run that has gone back does.
"""

import itertools
import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

from launch.interrupt import StopSignals, exit_process

signals = StopSignals().listen()

import torch  # noqa: E402  (as in launch/train.py, signals come first)

from launch import guard, train  # noqa: E402
from launch import run as run_module  # noqa: E402
from launch.batchnorm import GroupBatchNorm2d  # noqa: E402
from launch.checkpoint import layout, writer  # noqa: E402
from launch.watchdog import Watchdog  # noqa: E402

harms, skipped = (json.loads(os.environ.get(name, "[]")) for name in ("HARM", "SKIP"))
rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
harms = [harm for harm in harms if harm.get("restart", 0) == int(os.environ.get("SLURM_RESTART_COUNT", "0"))]


def kill_self(*_arguments) -> None:
    if "KILLED" in os.environ:
        Path(os.environ["KILLED"]).touch()
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(name: str, call: int) -> None:
    """Kills this process when it calls a function of the modules that save, for the so-manieth time."""
    owner = next(owner for owner in (writer.CheckpointWriter, writer, layout) if hasattr(owner, name))
    function, calls = getattr(owner, name), itertools.count(1)

    def killing(*arguments, **options):
        if next(calls) == call:
            kill_self()
        return function(*arguments, **options)

    setattr(owner, name, killing)


for kill in [harm for harm in harms if "kill" in harm]:
    harms.remove(kill)
    if kill["rank"] == rank:
        kill_at(kill["at"], kill["call"]) if "at" in kill else Timer(kill["after"], kill_self).start()
train_step, initialize, paused = train.train_step, guard.Guard.__init__, Watchdog.paused
pauses = []


@contextmanager
def counted_pause(self):
    with paused(self):
        pauses.append(self)
        yield
        pauses.pop()


def unwatched(function):
    """Checks that the watchdog does not take a function of going back for a hang: it may read for hours."""

    def checked(*arguments):
        assert pauses
        return function(*arguments)

    return checked


for owner, name in ((run_module, "find_checkpoint"), (run_module, "load"), (layout, "remove_newer")):
    setattr(owner, name, unwatched(getattr(owner, name)))


def step_with_harm(run, augment, step):
    due = [harm for harm in harms if rank == harm["rank"] and step + 1 >= harm["step"]]
    done = {harm["to"] for harm in due}
    for harm in due:
        if not harm.get("from_then_on"):
            harms.remove(harm)  # once: the run may go back to before this step
    model = run.engine.module
    # ZeRO-3 has a rank's part of a parameter in another attribute.
    weight = getattr(model.head.weight, "ds_tensor", model.head.weight)
    if "weight" in done:
        weight.data.view(-1)[0] = torch.nan
    if "sums" in done:
        next(module for module in model.modules() if isinstance(module, GroupBatchNorm2d)).sums[0] = torch.inf
    if "statistics" in done:
        model.norm.running_var[0] = torch.inf
    if "EMA" in done:
        run.ema.module.norm.weight.data[0] = torch.nan
    if "clock" in done:
        now = time.time
        time.time = lambda: now() - 86_400
    if "stop" in done:
        os.kill(os.getpid(), signal.SIGTERM)
    if "wait" in done:
        Path(f"{os.environ['HELD']}-{rank}").touch()
        while not signals.received:
            time.sleep(0.01)
    if "process" in done:
        os.kill(os.getpid(), signal.SIGSTOP)
    if "life" in done:
        kill_self()
    assert "code" not in done
    if "main thread" in done:
        threading.Event().wait()
    for place, tensor in {
        "weight bit": weight, "statistics bit": model.norm.running_mean, "EMA bit": run.ema.module.head.bias
    }.items():  # fmt: skip
        if place in done:
            tensor.data.view(torch.int32).view(-1)[0] ^= 1
    hook = model.head.bias.register_hook(lambda gradient: gradient * torch.inf) if "gradient" in done else None

    calls = itertools.count(1)

    def augment_with_harm(batch):
        images, targets = augment(batch)
        micro_step = next(calls)
        if "speed" in done:
            time.sleep(2)
        if "image" in done and micro_step == 1:
            images[1, 2, 3, 4] = torch.nan
        if "target" in done and micro_step == 2:
            targets[0, 0] = torch.inf
        return images, targets * 1000 if "spike" in done else targets

    trained = train_step(run, augment_with_harm, step)
    if hook:
        hook.remove()
    if "STEPPED" in os.environ:
        Path(os.environ.pop("STEPPED")).touch()
    return trained


def guard_that_skips(self, *arguments):
    initialize(self, *arguments)
    self.skipped |= {step - 1 for step in skipped}


train.train_step, guard.Guard.__init__, Watchdog.paused = step_with_harm, guard_that_skips, counted_pause
exit_process(train.main(sys.argv[1:], signals))
