"""Tensors that memory is too small for, in a temporary file."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor


class TensorFile:
    """Tensors of one shape and type in a temporary file, which the page cache keeps in memory if it can.

    The file lies where the environment variable TMPDIR says and is gone when this is.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._free: list[int] = []
        self._shape = torch.Size()
        self._dtype: torch.dtype | None = None

    def put(self, tensor: Tensor) -> int:
        """Write a tensor, and say where it is."""
        if self._dtype is None:
            self._shape, self._dtype = tensor.shape, tensor.dtype
        assert (tensor.shape, tensor.dtype) == (self._shape, self._dtype)
        offset = self._free.pop() if self._free else self._file.seek(0, os.SEEK_END)
        self._file.seek(offset)
        self._file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return offset

    def get(self, offset: int) -> Tensor:
        """The tensor at a place, as a new one on the host."""
        assert self._dtype is not None
        self._file.seek(offset)
        size = self._shape.numel() * self._dtype.itemsize
        return torch.frombuffer(bytearray(self._file.read(size)), dtype=self._dtype).view(self._shape)

    def free(self, offset: int) -> None:
        """Let the next tensor take a place."""
        self._free.append(offset)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()
