"""python -m launch.benchmark COMMAND …: hands over to that command's module, which is imported only then."""

import argparse
import sys
from importlib import import_module

from launch.interrupt import EXIT_INTERRUPTED

COMMANDS = {
    "kernel": "polarity attention against eager, compiled eager and softmax attention",
    "data": "shards to batches: ours against webdataset with torchvision or timm, and DALI's own reader",
    "pack": "dataio.pack against cp -r, tar and webdataset's ShardWriter",
    "resume": "the first batch after a resume against that after a fresh start; how well an epoch is shuffled",
    "gpu": "on a machine with a GPU: checks, tests, benchmarks, counters, sanitizers, into one folder",
    "step": "whole training steps of b5 and b4 beside ViT-B, ConvNeXt-B and CAFormer-M36 of timm",
    "profile": "the time of every kernel of polarity attention, or of every operator of a training step",
    "sass": "what the compiler made of the CUDA kernels: instructions, bounds, predicted times; needs no GPU",
}
_MODULES = {"profile": "profiling"}  # a profile.py here would hide Python's own from `python launch/benchmark …`


def main(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        try:
            return import_module(f"launch.benchmark.{_MODULES.get(argv[0], argv[0])}").main(argv[1:])
        except KeyboardInterrupt:  # its processes have ended
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
    listed = "\n".join(f"  {name:8} {purpose}" for name, purpose in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark",
        description=f"commands:\n{listed}\n\npython -m launch.benchmark COMMAND --help tells the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=tuple(COMMANDS), metavar="COMMAND")
    parser.parse_args(argv)  # leaves with the help, or with what is wrong
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
