"""A case as a method predicts it.

Tensor suffixes: C classes, D H W axes of the preprocessed volume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from nnunet_nmsw.evaluation.methods import Method
from nnunet_nmsw.evaluation.reached import Reached


class Shown(NamedTuple):
    """What the report's viewer shows of a prediction, with the image's axes.

    Attributes:
        windows: lower and upper edges of each, in voxels of the image.
        ranks: of each among its model's, from 1.
        score_map: float16; None where there is none.
        scale: voxel i of an axis is in voxel floor((i + 0.5) · scale + shift) of the map.
        shift: see there.
    """

    windows: list[list[list[float]]]
    ranks: Sequence[int]
    score_map: np.ndarray | None = None
    scale: Sequence[float] = ()
    shift: Sequence[float] = ()


@dataclasses.dataclass
class Prediction:
    """A case as a method predicts it.

    Attributes:
        method: the method.
        logits_CDHW: float16, on the grid of the preprocessed volume, on the host; None where there are labels.
        segmentation: labels in the axis order and shape of nnU-Net's reader; None where there are logits.
        properties: nnU-Net's of the preprocessed case.
        patches: how many it took.
        macs: multiply-accumulates of all networks it ran.
        covered_foreground: share of the reference's foreground voxels that lie in a window; NaN without foreground.
        show: makes what the report's viewer shows of it; None where there is nothing to choose.
        reached: of stock models, by nnU-Net's key of each label, what the windows reach of the objects that sliding
            windows find.
    """

    method: Method
    logits_CDHW: Tensor | None
    segmentation: np.ndarray | None
    properties: dict[str, Any]
    patches: int
    macs: int
    covered_foreground: float = 1.0
    show: Callable[[], Shown] | None = None
    reached: dict[str, Reached] | None = None
