"""Layers around the attentions: channels-last convolutions, stem, downsampling, feed-forward.

Inside a stage activations are contiguous (B, height, width, C): linear layers and norms work on the last axis, and
convolutions view the same memory as a channels-last image.
"""

from torch import Tensor, nn

from polaformer.ops import depthwise_conv2d


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution with bias and same padding, plus a residual: (B, height, width, C) → the same shape."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve a (B, height, width, C) activation and add the residual, which may be the same tensor."""
        bias = self.bias
        assert bias is not None  # narrows the type
        return depthwise_conv2d(input, self.weight, bias, residual)


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
        out: Tensor = self.fc2(self.dwconv(x, x))
        return out
