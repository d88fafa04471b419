"""The windows of a network that some planes of a volume touch, asked for when they are needed.

Tensor suffixes: C channels of the logits, D H W axes of a window, d h w axes of the low-resolution view, K windows,
3 one coordinate per axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from nnunet_nmsw.inference.tensor_file import TensorFile
from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.volume.windows import Shape

Windows = Callable[[Tensor], Tensor]
"""Logits of windows, K × C × patch size, floating, of their first voxels, K × 3."""


class FusedModel(NamedTuple):
    """One network's part in the prediction of a volume.

    Attributes:
        coarse_logits_Cdhw: coarse logits, float32.
        starts_K3: first voxels of the windows in the padded volume, int64 on the host.
        weights: of the fusion, on the device of the coarse logits.
        windows: gives the windows' logits, on any device.
    """

    coarse_logits_Cdhw: Tensor
    starts_K3: Tensor
    weights: FusionWeights
    windows: Windows


class OpenWindows:
    """The windows of one model that the present planes touch; asked for when they begin, dropped when they end.

    Args:
        model: whose they are.
        patch_size: voxels of a window.
        at_once: how many windows to ask for at a time.
        memory: bytes for their logits; those of further ones lie in a temporary file.
    """

    def __init__(self, model: FusedModel, patch_size: Shape, at_once: int, memory: float) -> None:
        self.model, self.patch_size, self.at_once = model, patch_size, at_once
        order = sorted(range(len(model.starts_K3)), key=lambda index: model.starts_K3[index].tolist())
        self.left_K3 = model.starts_K3[order]
        self.windows: list[tuple[list[int], Tensor | int]] = []
        """First voxel, and logits or where these are in the file."""
        self.free_memory = memory
        self.file: TensorFile | None = None

    def move_to(self, first: int, end: int) -> None:
        """Hold all windows that touch planes `first` to `end`, and maybe some later ones."""
        for start, logits in self.windows:
            if start[0] + self.patch_size[0] <= first:
                self._drop(logits)
        self.windows = [window for window in self.windows if window[0][0] + self.patch_size[0] > first]
        while len(self.left_K3) and int(self.left_K3[0, 0]) < end:
            starts_K3, self.left_K3 = self.left_K3[: self.at_once], self.left_K3[self.at_once :]
            for start, logits_CDHW in zip(starts_K3.tolist(), self.model.windows(starts_K3), strict=True):
                if start[0] + self.patch_size[0] > first:
                    self.windows.append((start, self._keep(logits_CDHW)))

    def touching(self, start: Shape, size: Shape) -> Iterator[tuple[list[int], Tensor]]:
        """First voxel and logits of the windows that overlap a box."""
        for window, logits in self.windows:
            if not self._overlaps(window, start, size):
                continue
            if isinstance(logits, int):
                assert self.file is not None
                logits = self.file.get(logits)
            yield window, logits

    def touched(self, start: Shape, size: Shape) -> bool:
        """Whether a window overlaps a box."""
        return any(self._overlaps(window, start, size) for window, _ in self.windows)

    def _overlaps(self, window: Sequence[int], start: Shape, size: Shape) -> bool:
        return all(a < b + n and b < a + m for a, m, b, n in zip(window, self.patch_size, start, size, strict=True))

    def _keep(self, logits_CDHW: Tensor) -> Tensor | int:
        if logits_CDHW.nbytes <= self.free_memory:
            self.free_memory -= logits_CDHW.nbytes
            return logits_CDHW.clone()  # without the others of its batch
        self.file = self.file or TensorFile()
        return self.file.put(logits_CDHW)

    def _drop(self, logits: Tensor | int) -> None:
        if isinstance(logits, Tensor):
            self.free_memory += logits.nbytes
        else:
            assert self.file is not None
            self.file.free(logits)
