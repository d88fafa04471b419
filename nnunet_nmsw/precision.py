"""Where half precision is used: as in nnU-Net by autocast on CUDA, and never for scores and sums over a volume."""

from contextlib import AbstractContextManager, nullcontext

import torch


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """Automatic mixed precision on CUDA, nothing elsewhere (nnU-Net found it slow on CPU and absent on MPS)."""
    return torch.autocast("cuda") if device.type == "cuda" else nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager:
    """Keep an enclosing autocast from rounding what is computed inside."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cuda", "cpu") else nullcontext()
