"""How much of what a fine model finds by its own sliding window its chosen windows reach.

An object that the coarse model misses altogether gets no window: the known failure of coarse-to-fine tools.

Tensor suffixes: D H W axes of a padded volume, Z Y X axes of the cropped image, N windows of the grid.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nnunet_nmsw.evaluation.reached import Reached
from nnunet_nmsw.inference.cases import Case
from nnunet_nmsw.inference.claims import FinePrediction, claims_of, covered, nearest
from nnunet_nmsw.inference.model_set import ModelSetPredictor
from nnunet_nmsw.inference.volume import FoldOfCase
from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.selection.interface import WindowChoice


@torch.inference_mode()
def reached(predictor: ModelSetPredictor, case: Case) -> dict[int, Reached]:
    """By the coarse model's number of each class that fine models have, what the windows of a case reach.

    Each fine model slides its window over the whole image, which takes what it takes nnU-Net.

    Args:
        predictor: of the set. Its number of patches and its exploration count.
        case: preprocessed, see `ModelSetPredictor.preprocess`.
    """
    chosen = predictor.chosen(case, predictor.coarse_logits(case))
    shape = case["data_properties"]["shape_after_cropping_and_before_resampling"]
    found: dict[int, list[Reached]] = {}
    for number, fine in predictor.fine_predictions(case, [whole(fold) for fold in chosen], predictor.work):
        own_ZYX = np.zeros(shape, np.int16)
        for claims in claims_of(fine):
            own_ZYX[claims.box] = claims.labels_ZYX.numpy()
        windows_ZYX = _windows(fine, chosen[number]).numpy()
        for channel, label in enumerate(predictor.fine_models[number].labels.coarse, 1):
            found.setdefault(label, []).append(Reached.of(own_ZYX == channel, windows_ZYX))
    return {label: Reached.together(of_models) for label, of_models in sorted(found.items())}


def patches_alone(fold: FoldOfCase) -> FoldOfCase:
    """The same with a fusion in which the coarse prediction does not count."""
    return fold._replace(weights=FusionWeights.convex(torch.ones_like(fold.weights.patch_C)))


def whole(fold: FoldOfCase) -> FoldOfCase:
    """The same with all windows of the sliding window, whose patches alone count."""
    everywhere = WindowChoice(fold.grid.starts_N3, torch.zeros(len(fold.grid)))
    return patches_alone(fold._replace(windows=everywhere))


def _windows(fine: FinePrediction, fold: FoldOfCase) -> Tensor:
    """Where the chosen windows are, in the cropped image."""
    padded, patch_size = fine.padded, fold.grid.patch_size
    covered_DHW = covered(fold.windows.starts_K3, patch_size, padded.offset, padded.inside)
    return nearest(covered_DHW, fine.axes)
