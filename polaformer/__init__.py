"""What is computed: PolaFormer++ b0–b5, their attention and its operator.

Importing this package registers `polaformerpp_b0` … `polaformerpp_b5` with timm. It needs torch, timm and
safetensors; nothing else of this project.
"""

from polaformer.model import PRESETS, PolaFormerPP, Preset

__all__ = ["PRESETS", "PolaFormerPP", "Preset"]
