"""PolaFormer++ b0–b5 and polarity attention as a PyTorch operator with compiled kernels.

Importing this package registers `polaformerpp_b0` … `polaformerpp_b5` with timm. It requires torch, timm and
safetensors only.
"""

from polaformer.model import PRESETS, PolaFormerPP, Preset

__version__ = "0.2.0"  # setup.py reads it from here

__all__ = ["PRESETS", "PolaFormerPP", "Preset"]
