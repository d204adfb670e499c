"""Layers around the attentions: rotary embedding, channels-last convolutions, stem, downsampling, feed-forward.

Inside a stage activations are contiguous (B, height, width, C): linear layers and norms work on the last axis, and
convolutions view the same memory as a channels-last image.
"""

import torch
from torch import Tensor, nn


def rotary_frequencies(features: int) -> Tensor:
    """Angular frequency of each rotated pair: (features / 4,) float32, from 1 down to 1e-4."""
    return 1 / 10000.0 ** torch.linspace(0, 1, features // 4, dtype=torch.float32)


def rotary_embedding(height: int, width: int, features: int, like: Tensor) -> Tensor:
    """Axial rotary embedding as complex numbers of modulus one: (height·width, features / 2), one column per pair.

    The first half of the pairs rotates by the token's row, the second half by its column. On the device of `like`, in
    complex64, or complex128 if `like` is float64; the frequencies are float32 values either way.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies = rotary_frequencies(features).to(like.device, dtype)
    rows = torch.arange(height, device=like.device, dtype=dtype)[:, None] * frequencies
    columns = torch.arange(width, device=like.device, dtype=dtype)[:, None] * frequencies
    angles = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=-1)
    return torch.polar(torch.ones_like(angles), angles).flatten(0, 1)


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last axis: x (…, N, F), rotary (N, F / 2) → (…, N, F) in x's dtype.

    Computed in the embedding's precision as one complex product, which on a CPU takes a tenth of the time of the four
    real ones. Invert it by `rotary.conj_physical()`: the lazy `conj()` is dropped by torch.compile inside
    an operator.
    """
    wide = x.to(rotary.real.dtype)
    # torch leaves this function unannotated
    pairs = wide.unflatten(-1, (-1, 2))  # type: ignore[no-untyped-call]
    return torch.view_as_real(torch.view_as_complex(pairs) * rotary).flatten(-2).to(x.dtype)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution with bias and same padding: (B, height, width, C) → the same shape."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a (B, height, width, C) activation."""
        x = self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias)  # TorchScript has no super()
        return x.permute(0, 2, 3, 1)


class Stem(nn.Sequential):
    """Convolutional stem, (B, in_chans, h, w) → (B, channels, h / 4, w / 4): four 3×3 convolutions with BatchNorm."""

    def __init__(self, in_chans: int, channels: int) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs, stride in (
            (in_chans, channels // 2, 2),
            (channels // 2, channels // 2, 1),
            (channels // 2, channels // 2, 1),
            (channels // 2, channels, 2),
        ):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.GELU()]
        super().__init__(*layers[:-1])  # no activation after the last norm


class Downsample(nn.Module):
    """Strided 3×3 convolution with BatchNorm: (B, C, height, width) → (B, channels, height / 2, width / 2)."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(inputs, channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Halve height and width."""
        out: Tensor = self.norm(self.reduction(x))
        return out


class FeedForward(nn.Module):
    """Feed-forward network with a residual depthwise 3×3 convolution between its linear layers.

    (B, height, width, C) → the same shape.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.dwconv = DepthwiseConv(hidden, 3)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both linear layers and the convolution."""
        x = self.act(self.fc1(x))
        out: Tensor = self.fc2(x + self.dwconv(x))
        return out
