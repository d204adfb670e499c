"""The parts between the attentions: rotary embeddings, channels-last convolutions, stem, downsampling, feed-forward.

Inside a stage an activation is (B, height, width, C) and contiguous, so that linear layers and norms work on the
last axis and a convolution sees the very same memory as a channels-last image.
"""

import torch
from torch import Tensor, nn


def rotary_frequencies(features: int) -> Tensor:
    """The angular frequency of each rotated pair: (features / 4,) float32, from 1 down to 1e-4."""
    return 1 / 10000.0 ** torch.linspace(0, 1, features // 4, dtype=torch.float32)


def rotary_embedding(height: int, width: int, features: int, like: Tensor) -> Tensor:
    """Every token's rotation as complex numbers of length one: (height·width, features / 2), one column a pair.

    The first half of the pairs rotates with the token's row, the second half with its column. On the device of `like`,
    complex64, or complex128 if `like` is float64 (the frequencies themselves are float32 numbers either way).
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies = rotary_frequencies(features).to(like.device, dtype)
    rows = torch.arange(height, device=like.device, dtype=dtype)[:, None] * frequencies
    columns = torch.arange(width, device=like.device, dtype=dtype)[:, None] * frequencies
    angles = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=-1)
    return torch.polar(torch.ones_like(angles), angles).flatten(0, 1)


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotates neighbouring pairs of the last axis: x (…, N, F), rotary (N, F / 2) → (…, N, F) in x's dtype.

    Computed in the embedding's precision, as one complex product: a tenth of the time of the four real ones on a CPU.
    With `rotary.conj_physical()` it rotates back; inside an operator, torch.compile loses the lazy `conj()`.
    """
    pairs = x.to(rotary.real.dtype).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * rotary).flatten(-2).to(x.dtype)


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution with bias that keeps the size: (B, height, width, C) → the same."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias)  # TorchScript knows no super()
        return x.permute(0, 2, 3, 1)


class Stem(nn.Sequential):
    """Image (B, in_chans, h, w) → (B, channels, h / 4, w / 4): four 3×3 convolutions, each normalised."""

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
    """(B, C, height, width) → (B, channels, height / 2, width / 2)."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(inputs, channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class FeedForward(nn.Module):
    """Linear, GELU, a depthwise 3×3 convolution added to its own input, linear: (B, height, width, C) → the same."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.dwconv = DepthwiseConv(hidden, 3)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))
        return self.fc2(x + self.dwconv(x))
