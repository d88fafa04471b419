"""What volumes a network takes: its total strides, padding up to them, and whether one volume is slower than two.

Tensor suffixes: 1 a batch of one, C channels, d h w axes of the low-resolution view.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNKNOWN_STRIDE = 32
"""Total stride of five stages, as many as most networks have at most."""

SLOW_ALONE = 20_480
"""On a CPU, PyTorch convolves a single volume in single precision by a slow path where its channels times depth times
height are at most this, and takes the time of five. Two volumes go to oneDNN: docs/design-notes.md."""


def total_stride(network: nn.Module) -> list[int] | None:
    """By axis what a network's input must be a multiple of; None where it does not tell.

    nnU-Net's networks tell it by their encoder's strides, others by an attribute `total_stride`, three integers.
    """
    strides = getattr(getattr(network, "encoder", None), "strides", None)
    if strides is None:
        stride: list[int] | None = getattr(network, "total_stride", None)
        return stride
    by_stage = [[stride] * 3 if isinstance(stride, int) else stride for stride in strides]
    return [math.prod(of_axis) for of_axis in zip(*by_stage, strict=True)]


def padded_for(network: nn.Module, volume_1Cdhw: Tensor) -> Tensor:
    """A volume with zeros behind, up to what the network's strides divide.

    At its bottleneck there are two voxels an axis at least, which instance normalisation needs.
    """
    shape = volume_1Cdhw.shape[2:]
    strides = total_stride(network) or [UNKNOWN_STRIDE] * 3
    multiples = [max(2, -(-n // stride)) * stride for n, stride in zip(shape, strides, strict=True)]
    padding = [p for n, m in zip(reversed(shape), reversed(multiples), strict=True) for p in (0, m - n)]
    return F.pad(volume_1Cdhw, padding)


def convolves_one_slowly(network: nn.Module, volume_1Cdhw: Tensor) -> bool:
    """Whether PyTorch is faster with two volumes than with one: see `SLOW_ALONE`."""
    if volume_1Cdhw.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    convolution = next((module for module in network.modules() if isinstance(module, nn.Conv3d)), None)
    depth, height = volume_1Cdhw.shape[2:4]
    return convolution is not None and convolution.out_channels * depth * height <= SLOW_ALONE
