"""Shapes of polarity attention, and the memory traffic that no implementation can avoid.

Axes: B batch, H heads, N = height·width tokens, D head dimension.
"""

import re
from dataclasses import dataclass

#: Elements per token, head and channel that every implementation reads or writes. Forward: q, k, v and the output;
#: backward: those, the gradient of the output, and the gradients of q, k and v.
MIN_TRAFFIC_ELEMENTS = {"forward": 4, "backward": 7, "both": 11}


@dataclass(frozen=True)
class Shape:
    """The shape of one attention call; written B,H,HEIGHTxWIDTH,D."""

    batch: int
    heads: int
    height: int
    width: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.batch},{self.heads},{self.height}x{self.width},{self.head_dim}"

    @property
    def tokens(self) -> int:
        """N, of one image."""
        return self.height * self.width

    @property
    def elements(self) -> int:
        """Elements of q; k, v and the output have as many."""
        return self.batch * self.heads * self.tokens * self.head_dim


def parse_shape(text: str) -> Shape:
    """Parse a shape. Raises ValueError if it is not of the form B,H,HEIGHTxWIDTH,D or D is odd."""
    if not re.fullmatch(r"[1-9]\d*,[1-9]\d*,[1-9]\d*x[1-9]\d*,[1-9]\d*", text):
        raise ValueError(f"shape {text!r} is not B,H,HEIGHTxWIDTH,D; write for example 8,1,56x56,96")
    shape = Shape(*(int(number) for number in re.split("[,x]", text)))
    if shape.head_dim % 2:
        raise ValueError(
            f"shape {text} has an odd head dimension {shape.head_dim}; polarity attention needs an even one"
        )
    return shape
