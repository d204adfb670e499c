"""Training runs: configuration, DeepSpeed engine, checkpoints, monitoring, and the commands.

Start reading at train.py, which shows a run from top to bottom.
"""
