"""Small tensors from the host to a device, without waiting for the device.

A copy of pageable memory, and a tensor made of numbers on a GPU, let the host wait until the GPU has done all that it
was asked for before.
"""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. PyTorch keeps the pinned memory until the copy is done."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
