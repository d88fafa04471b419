"""The device that commands compute on."""

from __future__ import annotations

import multiprocessing

import torch

from nnunet_nmsw.errors import UserError


def prepare_device(name: str) -> torch.device:
    """The device of this name, with as many threads as go with it.

    Raises:
        UserError: there is none.
    """
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA device: give -device cpu, or -device mps on a Mac")
        torch.set_num_threads(1)
    elif name == "mps" and not torch.backends.mps.is_available():
        raise UserError("there is no MPS device, which Macs with Apple's processors have: give -device cpu")
    elif name == "cpu":
        torch.set_num_threads(multiprocessing.cpu_count())
    return torch.device(name)
