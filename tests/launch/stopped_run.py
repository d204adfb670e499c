"""launch/train.py that is stopped at a chosen point: stopped_run.py [arguments], with STOP_AT in the environment.

STOP_AT is JSON: {"at": point, "signals": names, "rank": …, "reached": file}. The process sends itself the signals, or
without any waits for those that others send it, after it has written its process id to the file. Without a rank, all
do so. Points: "build" (start-up), "step N" (its first batch), "batch N" (of an evaluation), "save".
"""

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

from launch import interrupt
from launch.interrupt import StopSignals, exit_process

signals = StopSignals().listen()
wanted = json.loads(os.environ.get("STOP_AT") or "{}")
interrupt._SAME_REQUEST_SECONDS = 0.0 if len(wanted.get("signals", [])) > 1 else 1.0

from launch import run, train  # noqa: E402  (as in launch/train.py, signals come first)


def reach(point: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if wanted.get("at") != point or wanted.get("rank", rank) != rank:
        return
    for number, name in enumerate(wanted.get("signals", []), 1):
        os.kill(os.getpid(), signal.Signals[name])
        while signals._requests < number:
            time.sleep(0.01)
    if "reached" in wanted:
        Path(f"{wanted['reached']}-{rank}").write_text(str(os.getpid()))
    while not signals.received:
        time.sleep(0.01)


class StoppedTrainLoader(train.TrainLoader):
    def __next__(self):
        batch = super().__next__()
        step, position = divmod(batch.position, self.loader_options.global_batch_size)
        if position == self.loader_options.first_position(0):
            reach(f"step {step + 1}")
        return batch


class StoppedEvalLoader(run.EvalLoader):
    def __iter__(self):
        for number, batch in enumerate(super().__iter__(), 1):
            reach(f"batch {number}")
            yield batch


def stopped_before(point: str, function):
    @functools.wraps(function)
    def call(*arguments):
        reach(point)
        return function(*arguments)

    return call


train.TrainLoader, run.EvalLoader = StoppedTrainLoader, StoppedEvalLoader
train.build_model = stopped_before("build", train.build_model)
train.CheckpointWriter._write = stopped_before("save", train.CheckpointWriter._write)
if __name__ == "__main__":
    exit_process(train.main(sys.argv[1:], signals))
