"""Weights of a network: how they lie in memory, and what tells them from others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def lay_out_(network: nn.Module, device: torch.device) -> None:
    """Keep the weights of 3D convolutions as the device convolves fastest. Their values stay.

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


def digest_of_weights(weights: Mapping[str, Tensor], also: str = "") -> str:
    """What tells the state of a network from all others, and something else with it."""
    digest = hashlib.sha256(also.encode())
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
