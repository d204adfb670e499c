"""Channels-last convolution as a layer."""

import torch

from polaformer.layers import DepthwiseConv


def test_depthwise_convolution_keeps_channels_last_memory():
    x = torch.randn(2, 6, 5, 16)
    out = DepthwiseConv(16, 3)(x)
    assert out.shape == x.shape
    assert out.is_contiguous()
