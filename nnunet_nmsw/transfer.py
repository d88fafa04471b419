"""Small tensors to a device without waiting for it, and large ones back."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. PyTorch keeps the pinned memory until the copy is done.

    A copy of pageable memory, and a tensor made of numbers on a GPU, let the host wait until the GPU has done all that
    it was asked for before.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetched(tensor: Tensor) -> Tensor:
    """A large tensor on the host.

    The host's memory is filled first, by all threads: a copy into new memory waits for one page after the other. Labels
    of 177 MB took 135 ms from an H200.
    """
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu").fill_(0).copy_(tensor)
