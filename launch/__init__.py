"""How a run goes: configuration, engine, checkpoints, monitoring, and the commands.

Start reading at train.py, which tells the story of a run from top to bottom.
"""
