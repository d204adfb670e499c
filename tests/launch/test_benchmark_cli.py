"""The benchmarks' command line: help whose examples are valid, what is refused and how, and where there is no GPU."""

import os
import re
import shlex
from importlib import import_module

import pytest
import torch

from launch.benchmark import __main__, kernel_checks
from launch.benchmark.__main__ import _MODULES, COMMANDS

MODULES = {name: import_module(f"launch.benchmark.{_MODULES.get(name, name)}") for name in COMMANDS}
EXAMPLES = {
    "kernel": 4,
    "depthwise": 5,
    "data": 4,
    "pack": 3,
    "resume": 3,
    "checkpoint": 3,
    "goodput": 3,
    "parity": 2,
    "gpu": 4,
    "step": 4,
    "profile": 5,
    "sass": 3,
}
NO_GPU = "PyTorch sees no NVIDIA GPU; use --device cpu"
NO_GPU_HERE = "PyTorch sees no NVIDIA GPU; run this where nvidia-smi lists one"
ON_CPU = (
    "kernel",
    "depthwise",
    "data",
    "resume",
    "checkpoint",
    "goodput",
    "step",
    "profile",
)  # commands whose --device is the GPU by default

BAD_SHAPE = "shape '8,1,3136,96' is not B,H,HEIGHTxWIDTH,D; write for example 8,1,56x56,96"
BAD_CONVOLUTION = "shape {!r} is not B,SIDExSIDE,C,KxK with K = 3 or 5; write for example 8,56x56,96,3x3"
UNKNOWN_MODEL = "timm knows no model {!r}; use one that timm.list_models() names, or polaformerpp_b5"
ABOVE_0 = "{} is {}; give a number above 0"
_CPUS = len(os.sched_getaffinity(0))
TOO_MANY = f"{{}} is 100000, and this process may use {_CPUS} CPUs; give at most {4 * _CPUS}"
NO_FOLDER = "[Errno 17] File exists: 'setup.py'"
REFUSALS = {
    "kernel": {
        "--shapes 8,1,3136,96": BAD_SHAPE,
        "--shapes 8,1,5x5,7": "shape 8,1,5x5,7 has an odd head dimension 7; polarity attention needs an even one",
        "--shapes 8,1,5x5,8 --full": "--shapes says all; leave --full, --resolutions and --batches out",
        "--resolutions 100": "--resolutions names 100; give multiples of 32, as the models need",
        "--batches 0": "--batches names 0; give numbers above 0",
        "--growth 0 8": "--growth names 0; give numbers above 0",
        "--seconds 0": ABOVE_0.format("--seconds", "0.0"),
        "--threads -1": ABOVE_0.format("--threads", "-1"),
        "--threads 100000": TOO_MANY.format("--threads"),
    },
    "depthwise": {
        "--shapes 8,56x56,96": BAD_CONVOLUTION.format("8,56x56,96"),
        "--shapes 8,56x28,96,3x3": BAD_CONVOLUTION.format("8,56x28,96,3x3"),
        "--shapes 8,56x56,96,7x7": BAD_CONVOLUTION.format("8,56x56,96,7x7"),
        "--shapes 8,56x56,96,3x3 --batch 4": "--shapes says all; leave --models, --resolutions and --batch out",
        "--resolutions 224 100": "--resolutions names 100; give multiples of 32, as the models need",
        "--batch 0": ABOVE_0.format("--batch", "0"),
        "--seconds nan": ABOVE_0.format("--seconds", "nan"),
        "--threads -1": ABOVE_0.format("--threads", "-1"),
        "--threads 100000": TOO_MANY.format("--threads"),
    },
    "data": {
        "--images 0": ABOVE_0.format("--images", "0"),
        "--rounds -1": ABOVE_0.format("--rounds", "-1"),
        "--cores 100000": TOO_MANY.format("--cores"),
        "--size 100": "--size is 100; give a multiple of 32, as the models need",
        "--images 9 --batch 5": "9 images are fewer than 2 batches; give 10 or more, or a smaller --batch",
        "--data setup.py --images 9": "--data says which images; leave --images out",
        "--data tests": "no manifest.json in tests; write shards there with: python -m dataio.pack SOURCE tests",
        "--workloads three-augment --loaders dali": "none of --loaders does three-augment; add one of ours, timm",
        "--add --output nowhere.json": "[Errno 2] No such file or directory: 'nowhere.json'",
    },
    "pack": {
        **{f"{option} 0": ABOVE_0.format(option, "0") for option in ("--images", "--workers", "--rounds")},
        "--workers 100000": TOO_MANY.format("--workers"),
    },
    "resume": {
        f"{option} 0": f"{option} is 0; give {least} or more"
        for option, least in (("--samples", 560), ("--step", 1), ("--rounds", 1))
    },
    "checkpoint": {f"{option} 0": ABOVE_0.format(option, "0") for option in ("--resolution", "--batch", "--rounds")},
    "goodput": {
        "--minutes nan": ABOVE_0.format("--minutes", "nan"),
        "--mtbf-seconds 0": ABOVE_0.format("--mtbf-seconds", "0.0"),
        "--world-size 0": ABOVE_0.format("--world-size", "0"),
        "checkpoint.every_minutes=null": (
            "the key every_minutes of checkpoint is null; give a number, as the expectation depends on it"
        ),
        "--config tests/nowhere.yaml": "no configuration at tests/nowhere.yaml; there are: none in that folder",
    },
    "step": {
        "--models polaformerpp_b9": UNKNOWN_MODEL.format("polaformerpp_b9"),
        "--batch 0": ABOVE_0.format("--batch", "0"),
        "--resolution 0": ABOVE_0.format("--resolution", "0"),
        "--resolution 100": "--resolution is 100; polaformerpp_b5 needs a multiple of 32",
        "--seconds 0": ABOVE_0.format("--seconds", "0.0"),
        "--seconds nan": ABOVE_0.format("--seconds", "nan"),
    },
    "profile": {
        "--shapes 8,1,3136,96": BAD_SHAPE,
        "--runs 0": ABOVE_0.format("--runs", "0"),
        "--model polaformerpp_b5 --shapes 8,1,5x5,8": (
            "--model profiles a whole model in its own dtype; leave --shapes and --dtype out"
        ),
        "--model nothing": UNKNOWN_MODEL.format("nothing"),
        "--model polaformerpp_b5 --batch 0": ABOVE_0.format("--batch", "0"),
        "--model polaformerpp_b5 --resolution 100": "--resolution is 100; polaformerpp_b5 needs a multiple of 32",
        "--output launch": "[Errno 21] Is a directory: 'launch'",
    },
    "sass": {
        "--gpu b300": "GPU 'b300' is unknown; name one of h100, h200, a100, a100-40gb",
        "--shape 8,1,3136,96": BAD_SHAPE,
        "--shape 8,1,5x5,8": (
            "shape 8,1,5x5,8 has head dimension 8, which the kernels counted here do not take; give a multiple of 16 up"
            " to 128"
        ),
    },
    "parity": {"--output setup.py/x.md": NO_FOLDER, "nowhere.jpg --output x.md": "[Errno 2] No such file or directory"},
    "gpu": {
        "--parts check nothing": "there is no part 'nothing'; use some of build, check, check-awkward, kernels, ",
        "--minutes 0": ABOVE_0.format("--minutes", "0.0"),
        "--output a --archive a/b/c.tar.gz": (
            "--archive a/b/c.tar.gz is in the folder that it packs; put it elsewhere"
        ),
    },
}
for name in ("kernel", "depthwise", "data", "pack", "resume", "checkpoint", "goodput", "step", "profile", "sass"):
    if name != "sass":  # which reads the extension first; test_benchmark_sass.py has it
        REFUSALS[name]["--output setup.py/x.json"] = NO_FOLDER
    REFUSALS[name]["--show setup.py"] = f"setup.py is no report of python -m launch.benchmark {name}; name one"
UNFINISHED = ("parity", "gpu")  # commands whose messages above are only the beginning


def test_every_command_has_refusals():
    assert REFUSALS.keys() == COMMANDS.keys()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [(name, arguments, message) for name, refused in REFUSALS.items() for arguments, message in refused.items()],
)
def test_refusals(capsys, name, arguments, message):
    options = ["--device", "cpu"] if name in ON_CPU else []
    assert MODULES[name].main([*arguments.split(), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    if name in UNFINISHED:
        assert printed.err.startswith(f"error: {message}")
    else:
        assert printed.err == f"error: {message}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        *((MODULES[name].main, "--device cuda", NO_GPU) for name in ON_CPU),
        (MODULES["gpu"].main, "", NO_GPU_HERE),
        (kernel_checks.main, "errors", NO_GPU),
        (kernel_checks.main, "profiled --device cpu", "Nsight Compute profiles GPUs alone; leave --device out"),
        (kernel_checks.main, "build", NO_GPU_HERE),
    ],
)
def test_no_gpu(capsys, main, arguments, message):
    assert main(arguments.split()) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_are_valid(name, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        __main__.main([name, "--help"])
    examples = re.findall(rf"^python -m launch\.benchmark {name}.*", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) == EXAMPLES[name]
    for example in examples:
        MODULES[name].parse(shlex.split(example)[4:])


def test_the_command(command):
    helped = command("-m", "launch.benchmark", "--help")
    assert helped.returncode == 0
    assert all(f"  {name}" in helped.stdout for name in COMMANDS)
    unknown = command("-m", "launch.benchmark", "nothing")
    assert unknown.returncode == 2
    assert "invalid choice: 'nothing'" in unknown.stderr
