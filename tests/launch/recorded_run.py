"""launch/train.py that also records the samples of each rank: recorded_run.py RECORD [arguments].

With HOLD_AT in the environment it stops at the batch of that position, and waits to be killed.
"""

import json
import os
import signal
import sys

from launch import train


class RecordingLoader(train.TrainLoader):
    def __next__(self):
        batch = super().__next__()
        with open(f"{sys.argv[1]}-{os.environ['RANK']}.jsonl", "a") as record:
            record.write(json.dumps({"position": batch.position, "samples": batch.samples.tolist()}) + "\n")
        if batch.position >= float(os.environ.get("HOLD_AT", "inf")):
            signal.pause()
        return batch


train.TrainLoader = RecordingLoader
sys.exit(train.main(sys.argv[2:]))
