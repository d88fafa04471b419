"""The device that commands compute on."""

from __future__ import annotations

import multiprocessing
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from nnunetv2.utilities.helpers import empty_cache

from nnunet_nmsw.errors import UserError

T = TypeVar("T")


def prepare_device(name: str, on_host: bool = False) -> torch.device:
    """The device of this name, with as many threads as go with it.

    Args:
        name: "cpu", "cuda" or "mps".
        on_host: results of a GPU are kept and worked out on the host.

    Raises:
        UserError: there is none.
    """
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA device: give -device cpu, or -device mps on a Mac")
        torch.set_num_threads(multiprocessing.cpu_count() if on_host else 1)
    elif name == "mps" and not torch.backends.mps.is_available():
        raise UserError("there is no MPS device, which Macs with Apple's processors have: give -device cpu")
    elif name == "cpu":
        torch.set_num_threads(multiprocessing.cpu_count())
    return torch.device(name)


def lacks_bfloat16() -> bool:
    """Whether the processor is known to have no instructions for bfloat16. Linux alone tells of them."""
    try:
        features = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"^(flags|Features)\s*:", features, re.MULTILINE) is not None and "bf16" not in features


MESSAGES_OF_FULL_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "DEVICE_ALLOCATION_FAILED",
    "Unable to find a valid cuDNN algorithm",
    "unable to find an engine to execute this computation",
)
"""Of libraries that raise a RuntimeError where PyTorch would raise an OutOfMemoryError."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device has too little memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(message.lower() in str(error).lower() for message in MESSAGES_OF_FULL_MEMORY)


def unless_out_of_memory(compute: Callable[[], T], otherwise: Callable[[], T], device: torch.device) -> T:
    """What the one computation gives; of the other one where the device has too little memory, after it was freed.

    Args:
        compute: on the device.
        otherwise: with less memory.
        device: whose cache is emptied. A CPU has too little for nothing else: errors pass.
    """
    try:
        return compute()
    except RuntimeError as error:
        if device.type == "cpu" or not is_out_of_memory(error):
            raise
    # Not while the error is handled, which keeps what was computed.
    empty_cache(device)
    return otherwise()


@contextmanager
def all_threads() -> Iterator[None]:
    """Compute on the host with all of its processors, where a prediction on a GPU leaves it one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, multiprocessing.cpu_count()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def without_trials() -> Iterator[None]:
    """Let cuDNN not try its algorithms for each new shape: each volume has another one."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def stream_of_its_own(device: torch.device) -> Iterator[None]:
    """Let a thread's work on a GPU not queue behind the prediction's, for which the thread would else have to wait."""
    if device.type != "cuda":
        yield
        return
    if not hasattr(_of_thread, "stream"):  # one for good: memory that a stream has had stays with it
        _of_thread.stream = torch.cuda.Stream(device)
    with torch.cuda.stream(_of_thread.stream):
        yield


_of_thread = threading.local()
