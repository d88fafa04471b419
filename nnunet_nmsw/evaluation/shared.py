"""Coarse predictions and patches of a case that several methods share, and what they cost.

Tensor suffixes: K windows, C channels, D H W axes of the padded volume or of a patch, 3 one coordinate per axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nnunet_nmsw.evaluation.skipping import Index, looked_at
from nnunet_nmsw.inference.networks import Fold
from nnunet_nmsw.inference.tensor_file import TensorFile
from nnunet_nmsw.inference.volume import Padded
from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.nnunet.predictor import PatchHooks
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import Shape, WindowGrid

Result = TypeVar("Result")

CERTAIN = 10.0
"""Logit of background in a window that is skipped."""

Position = tuple[int, ...]
"""First voxel of a patch in the padded volume."""


def count_macs(call: Callable[[], Result]) -> tuple[Result, int]:
    """Make a call.

    Returns:
        What it returned, and the multiply-accumulates of its convolutions and matrix products.
    """
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops() // 2


class PatchStore:
    """Patch logits of one network on one case, in a `TensorFile`.

    Args:
        positions: what to keep; other patches are for one method alone.
    """

    def __init__(self, positions: Iterable[Position]) -> None:
        self.positions = frozenset(positions)
        self._file = TensorFile()
        self._offsets: dict[Position, int] = {}

    def __contains__(self, position: Position) -> bool:
        return position in self._offsets

    def put(self, position: Position, logits: Tensor) -> None:
        """Keep a patch if its position is to be kept; all have one shape and type."""
        if position in self.positions:
            self._offsets[position] = self._file.put(logits)

    def get(self, position: Position) -> Tensor:
        """A patch that was put, as a new tensor on the host."""
        return self._file.get(self._offsets[position])

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


class Costs:
    """Multiply-accumulates of a patch, counted at the first one that is predicted with or without mirroring."""

    def __init__(self) -> None:
        self.per_patch: dict[bool, int] = {}

    def counted(self, mirrored: bool, predict: Callable[[], Result]) -> Result:
        """Predict one patch."""
        if mirrored in self.per_patch:
            return predict()
        result, self.per_patch[mirrored] = count_macs(predict)
        return result


class SharedSlidingWindow(PatchHooks):
    """nnU-Net's predictor, taking patches from a store where they are there and putting them there if not.

    Everything else is the parent's, so that its result is what `nnUNetv2_predict` would give.
    """

    def __init__(self, costs: Costs, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.store: PatchStore | None = None
        self.costs = costs
        self.skips_background = False
        self._looked_at: dict[Position, Tensor] | None = None

    @property
    def num_looked_at(self) -> int | None:
        """Windows of the last volume that were not skipped; None where none is skipped."""
        return None if self._looked_at is None else len(self._looked_at)

    def before_windows(self, starts: Sequence[Position], patch_logits: Callable[[Position], Tensor]) -> None:
        """Find what to skip, where windows are skipped: see `evaluation.skipping`."""
        self._looked_at = None
        if not self.skips_background:
            return
        encoding, seen = LabelEncoding.of(self.label_manager), {}
        along_axes = [sorted({start[axis] for start in starts}) for axis in range(3)]

        def has_foreground(index: Index) -> bool:
            start = tuple(positions[i] for positions, i in zip(along_axes, index, strict=True))
            seen[start] = patch_logits(start).cpu()
            return bool((encoding.decided(seen[start][0]) > 0).any())

        looked_at([len(positions) for positions in along_axes], has_foreground)
        self._looked_at = seen

    def patch_logits(self, patch_1CDHW: Tensor, start: Position, predict: Callable[[Tensor], Tensor]) -> Tensor:
        """See the parent. A window that is skipped is background."""
        if self._looked_at is not None:
            if start in self._looked_at:
                return self._looked_at[start].to(self.device)
            classes = self.label_manager.num_segmentation_heads
            logits_1CDHW = patch_1CDHW.new_full((1, classes, *patch_1CDHW.shape[2:]), -CERTAIN)
            if not self.label_manager.has_regions:
                logits_1CDHW[:, 0] = CERTAIN
            return logits_1CDHW
        if self.store is not None and start in self.store:
            return self.store.get(start).to(self.device)[None]
        logits_1CDHW = self.costs.counted(self.use_mirroring, partial(predict, patch_1CDHW))
        if self.store is not None:
            self.store.put(start, logits_1CDHW[0])
        return logits_1CDHW


class SharedFold:
    """The networks of a fold on one case, of which nothing is predicted twice; see `volume.Networks`.

    Args:
        fold: predicts.
        mirrored: whether it mirrors.
        store: of patches.
        costs: of patches.

    Attributes:
        coarse_macs: multiply-accumulates of the coarse prediction.
    """

    def __init__(self, fold: Fold, mirrored: bool, store: PatchStore, costs: Costs) -> None:
        self.fold, self.mirrored, self.store, self.costs = fold, mirrored, store, costs
        self._coarse: CoarsePrediction | None = None
        self.coarse_macs = 0

    @property
    def weights(self) -> FusionWeights:
        """Weights of the fusion."""
        return self.fold.weights

    def grid(self, volume_shape: Shape) -> WindowGrid:
        """The windows of nnU-Net's sliding window over a padded volume."""
        return self.fold.grid(volume_shape)

    def coarse(self, padded: Padded) -> CoarsePrediction:
        """The coarse prediction, made once."""
        if self._coarse is not None:
            return self._coarse
        coarse: CoarsePrediction
        coarse, self.coarse_macs = count_macs(partial(self.fold.coarse, padded))
        self._coarse = coarse
        return coarse

    def patches(self, padded: Padded, coarse: CoarsePrediction, starts_K3: Tensor) -> Tensor:
        """Logits of windows, on the host."""
        return torch.stack([self.patch(padded, start) for start in starts_K3.tolist()])

    def patch(self, padded: Padded, start: Sequence[int]) -> Tensor:
        """Logits of a window, on the host."""
        position = tuple(start)
        if position in self.store:
            return self.store.get(position)
        predict = partial(self.fold.patches, padded, self.coarse(padded), torch.tensor([list(start)]))
        logits_CDHW = self.costs.counted(self.mirrored, predict)[0].cpu()
        self.store.put(position, logits_CDHW)
        return logits_CDHW
