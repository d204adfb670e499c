"""The command `python -m launch.benchmark COMMAND …`: imports that command's module alone and runs it."""

import argparse
import sys
from importlib import import_module

from launch.interrupt import EXIT_INTERRUPTED

COMMANDS = {
    "kernel": "polarity attention beside eager, compiled eager and softmax attention",
    "depthwise": "the models' depthwise convolutions beside PyTorch's in both layouts, and compiled",
    "data": "shards to batches: ours, webdataset with torchvision or timm, and DALI's own reader",
    "pack": "dataio.pack beside cp -r, tar and webdataset's ShardWriter",
    "resume": "the first batch after a resume beside that after a fresh start; the quality of the shuffle",
    "checkpoint": "saving and loading a checkpoint beside cp, and steps while one is written",
    "goodput": "a training run that is killed again and again beside what launch.plan expects of it",
    "parity": "our RandAugment beside timm's, in pixels and in draws",
    "gpu": "on a machine with a GPU: checks, tests, benchmarks, counters, sanitizers, into one folder",
    "step": "whole training steps of b5 and b4 beside ViT-B, ConvNeXt-B and CAFormer-M36 of timm",
    "profile": "every kernel of polarity attention, or every operator of a training step",
    "sass": "instruction counts of attention's compiled CUDA kernels, bounds and predicted times; needs no GPU",
}
_MODULES = {"profile": "profiling"}  # a profile.py here would hide Python's own from `python launch/benchmark …`


def main(argv: list[str]) -> int:
    """Run a command, or print help; returns the exit status."""
    if argv and argv[0] in COMMANDS:
        try:
            return import_module(f"launch.benchmark.{_MODULES.get(argv[0], argv[0])}").main(argv[1:])
        except KeyboardInterrupt:  # its processes have ended
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
    listed = "\n".join(f"  {name:10} {purpose}" for name, purpose in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark",
        description=f"commands:\n{listed}\n\npython -m launch.benchmark COMMAND --help describes one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=tuple(COMMANDS), metavar="COMMAND")
    parser.parse_args(argv)  # exits with the help or an error
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
