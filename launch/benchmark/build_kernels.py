"""Kernels for this machine's GPU: built in place, unless those that are there already run on it.

python -m launch.benchmark.build_kernels

A part of gpu.py. The build is setup.py's, for the GPU's own architecture alone. Kernels for this GPU that fail or hang
are kept: another build would not mend them, and the other parts find out more.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from launch.benchmark.report import ROOT

_LONGEST_SECONDS = 60
_TRY = """
import torch
from polaformer import ops
fault = ops.kernels_unavailable_reason("cuda")
if fault:
    raise SystemExit(fault)
x = torch.ones(1, 1, 4, 32, device="cuda", dtype=torch.bfloat16)
logits = torch.zeros(1, 64, device="cuda")
try:
    ops.polarity_attention(x, x, x, logits, logits, 2, 2).sum().item()
except RuntimeError as error:
    fault = str(error).partition("\\n")[0]  # advice follows
    if any(words in fault for words in ("no kernel image", "invalid device function", "PTX")):
        raise SystemExit(fault)
    print(f"kernels load, but the first run of one failed: {fault}", flush=True)
else:
    print("kernels run", flush=True)
"""


def find_fault() -> str:
    """Why those that are there are no kernels for this GPU, in one line; empty if they are. Prints how they ran."""
    command = [sys.executable, "-c", _TRY]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"kernels are there, but the first run of one took more than {_LONGEST_SECONDS} s", flush=True)
        return ""
    print(done.stdout, end="", flush=True)
    if done.stdout or not done.returncode:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def build() -> int:
    """Builds the kernels beside polaformer/ops.py; the build's exit status."""
    architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    for library in Path(ROOT, "polaformer").glob("_cuda*.so"):
        library.unlink()  # all that are there are loaded, and this one does not run
    print(f"building for {architecture}", flush=True)
    wanted = {"POLAFORMER_KERNELS": "all", "TORCH_CUDA_ARCH_LIST": architecture, "MAX_JOBS": str(os.cpu_count())}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | wanted).returncode


def main() -> int:
    if not torch.cuda.is_available():
        print("error: PyTorch sees no NVIDIA GPU; run this where nvidia-smi lists one", file=sys.stderr)
        return 2
    fault = find_fault()
    if not fault:
        return 0
    print(fault, flush=True)
    status = build()
    if fault := find_fault():
        print(fault)
    return status or int(bool(fault))


if __name__ == "__main__":
    sys.exit(main())
