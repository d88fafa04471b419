"""The layout of weights in which a device convolves fastest. Values stay as they are."""

from __future__ import annotations

import torch
from torch import nn


def lay_out_(network: nn.Module, device: torch.device) -> None:
    """Keep the weights of 3D convolutions as the device convolves fastest.

    On a CPU, oneDNN is faster in the layout "channels last", forward and above all backward. On a GPU that layout is
    slower (docs/performance.md).

    Args:
        network: on the device. Parameters stay the same objects, as an optimiser needs.
        device: that convolves.
    """
    if device.type != "cpu":
        return
    for parameter in network.parameters():
        if parameter.ndim == 5:  # `Module.to` would fail at parameters of four axes
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
