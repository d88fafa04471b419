"""Where half precision is used: as in nnU-Net by autocast on CUDA, for the networks and nothing before and after."""

from contextlib import AbstractContextManager, nullcontext

import torch


def mixed_precision(device: torch.device, bfloat16: bool = False) -> AbstractContextManager:
    """Automatic mixed precision on CUDA, nothing elsewhere (nnU-Net found it slow on CPU and absent on MPS).

    Args:
        device: that computes.
        bfloat16: use this type where the device is a CPU.
    """
    if device.type == "cpu" and bfloat16:
        return torch.autocast("cpu", torch.bfloat16)
    return torch.autocast("cuda") if device.type == "cuda" else nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager:
    """Keep an enclosing autocast from rounding what is computed inside."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cuda", "cpu") else nullcontext()
