"""A set of models calibrated with labelled images: weights of the fusion, and the threshold of "auto".

Each fine model's fused logits are an affine function of its own and of the coarse model's, with three numbers a class.
They are fitted as a logistic regression to the labels of voxels in the model's windows.

Tensor suffixes: M channels of a fine model, see `MatchedLabels`, V voxels, D H W axes of a padded volume, Z Y X axes of
the cropped image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice
from torch import Tensor

from nnunet_nmsw.evaluation.reached import Reached
from nnunet_nmsw.evaluation.set_recall import patches_alone, reached
from nnunet_nmsw.inference.cases import Case
from nnunet_nmsw.inference.claims import FinePrediction, covered
from nnunet_nmsw.inference.model_set import ModelSetPredictor
from nnunet_nmsw.inference.set_calibration import SetCalibration
from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.selection.calibration import Measured, calibration_of, mean_dice, threshold_of
from nnunet_nmsw.volume.interpolation import nearest_axis, upsample_window
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import Shape

THRESHOLDS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Of "auto": mean entropy of the coarse prediction over a window, in nats."""

VOXELS_OF_CLASS = 2000
"""Of each class that are looked at, in some planes of a case."""

PLANES_AT_ONCE, IGNORED = 16, -1

CAUTION = 1e-3
"""How much a squared change of the weights costs, in the unit of the loss."""


class Observed(NamedTuple):
    """Voxels in the windows of a fine model.

    Attributes:
        patch_VM: the model's logits, overlapping windows blended.
        coarse_VM: the coarse model's.
        label_V: the right channel, int64.
        share_V: how many voxels each stands for.
    """

    patch_VM: Tensor
    coarse_VM: Tensor
    label_V: Tensor
    share_V: Tensor

    @classmethod
    def together(cls, parts: Sequence[Observed]) -> Observed:
        """All voxels of some parts."""
        return cls(*(torch.cat(list(tensors)) for tensors in zip(*parts, strict=True)))


class Labelled(NamedTuple):
    """A case with its reference.

    Attributes:
        name: of the case.
        case: preprocessed, see `ModelSetPredictor.preprocess`.
        reference: labels with the coarse model's numbers, shape and axis order of nnU-Net's reader.
    """

    name: str
    case: Case
    reference: np.ndarray


class Calibrated(NamedTuple):
    """What calibration gives.

    Attributes:
        calibration: of the set.
        before: mean Dice of each case without it, of 1, over the classes that fine models have; NaN without any.
        left_out: the same with weights that the other cases set; empty of a single case.
        patches: mean number of patches a case with "auto".
        reached: what windows reach of each class with "auto", by the coarse model's number, over all cases; see
            `set_recall`.
    """

    calibration: SetCalibration
    before: list[float]
    left_out: list[float]
    patches: float
    reached: dict[int, Reached]


def calibrate(
    predictor: ModelSetPredictor, cases: Sequence[Labelled], max_drop: float, tell: Callable[[str], None]
) -> Calibrated:
    """Fit the weights of a set's fusion, and find the threshold of "auto".

    Args:
        predictor: of the set, without a calibration. It has the calibration afterwards.
        cases: with references, in which a fine model has a class. They are predicted with as many patches as the
            predictor is told, several times: better with the coarse model's logits under `COARSE_LOGITS`.
        max_drop: Dice, of 1, that "auto" may lose for fewer patches.
        tell: is given lines on the progress.
    """
    num_patches, predictor.calibration = predictor.num_patches, SetCalibration({}, None)
    observed: list[dict[int, Observed]] = []
    before = []
    for labelled in cases:
        observed.append(_observed(predictor, labelled))
        before.append(_mean(_dice(predictor, labelled)[1]))
        tell(f"{labelled.name}: Dice {_in_words(before[-1])} without a calibration")
    left_out = []
    for number, labelled in enumerate(cases if len(cases) > 1 else ()):
        others = [of_case for other, of_case in enumerate(observed) if other != number]
        predictor.calibration = SetCalibration(_weights(predictor, others), None)
        left_out.append(_mean(_dice(predictor, labelled)[1]))
        tell(f"{labelled.name}: Dice {_in_words(left_out[-1])} with weights that the other cases set")
    weights = _weights(predictor, observed)
    measured: Measured = {}
    predictor.num_patches = "auto"
    for threshold in THRESHOLDS:
        predictor.calibration = SetCalibration(weights, threshold)
        measured[threshold] = [_dice(predictor, labelled) for labelled in cases]
        dice = mean_dice([of_case for _, of_case in measured[threshold]]) or 0.0
        tell(f"auto, threshold {threshold}: {_patches(measured[threshold]):.1f} patches, Dice {100 * dice:.1f}")
    best = threshold_of([calibration_of([measured])], max_drop)
    predictor.calibration = SetCalibration(weights, best)
    objects = [reached(predictor, labelled.case) for labelled in cases]
    predictor.num_patches = num_patches
    by_class = {label: Reached.together([of_case[label] for of_case in objects]) for label in objects[0]}
    return Calibrated(predictor.calibration, before, left_out, _patches(measured[best]), by_class)


def fitted(observed: Observed, start: FusionWeights) -> FusionWeights:
    """Weights of a fusion by logistic regression.

    Args:
        observed: voxels.
        start: weights to stay close to.
    """
    start_3M = torch.stack(list(start)).cpu()
    weights_3M = start_3M.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([weights_3M], max_iter=100, line_search_fn="strong_wolfe")
    share_V = observed.share_V / observed.share_V.sum()

    def loss() -> Tensor:
        optimiser.zero_grad()
        patch_M, coarse_M, bias_M = weights_3M
        fused_VM = patch_M * observed.patch_VM + coarse_M * observed.coarse_VM + bias_M
        cross_entropy_V = F.cross_entropy(fused_VM, observed.label_V, reduction="none")
        total = (share_V * cross_entropy_V).sum() + CAUTION * (weights_3M - start_3M).square().sum()
        total.backward()
        return total

    optimiser.step(loss)
    return FusionWeights(*weights_3M.detach())


def _weights(predictor: ModelSetPredictor, observed: Sequence[dict[int, Observed]]) -> dict[str, FusionWeights]:
    """Weights by the digest of the models; of models that had no window those that they start from."""
    weights = {}
    for number, model in enumerate(predictor.fine_models):
        start = SetCalibration({}, None).weights_of(model)
        parts = [of_case[number] for of_case in observed if number in of_case]
        weights[model.digest] = fitted(Observed.together(parts), start) if parts else start
    return weights


@torch.inference_mode()
def _dice(predictor: ModelSetPredictor, labelled: Labelled) -> tuple[int, np.ndarray]:
    """Patches of all models, and the Dice of each class that a fine model has; NaN of others."""
    segmentation, windows = predictor.predict_case(labelled.case)
    tensors = (torch.from_numpy(array.astype(np.int64)) for array in (labelled.reference, segmentation))
    dice = LabelEncoding.of(predictor.label_manager).dice(*tensors).numpy()
    fine = {number for model in predictor.fine_models for number in model.labels.coarse}
    dice[[number - 1 for number in range(1, len(dice) + 1) if number not in fine]] = np.nan
    return sum(len(chosen.starts) for chosen in windows), dice


def _patches(measured: Sequence[tuple[int, np.ndarray]]) -> float:
    """Mean over cases."""
    return float(np.mean([number for number, _ in measured]))


def _mean(dice: np.ndarray) -> float:
    """Over classes; NaN of a case in which neither the reference nor the prediction has a class."""
    mean = mean_dice([dice])
    return math.nan if mean is None else mean


def _in_words(dice: float) -> str:
    return "without any class" if math.isnan(dice) else f"{100 * dice:.1f}"


def _observed(predictor: ModelSetPredictor, labelled: Labelled) -> dict[int, Observed]:
    """What each model that has windows says of a case's voxels in them."""
    case = labelled.case
    with torch.inference_mode():
        chosen = predictor.chosen(case, predictor.coarse_logits(case))
        found = {}
        for number, fine in predictor.fine_predictions(case, list(map(patches_alone, chosen)), predictor.work):
            labels = predictor.fine_models[number].labels
            encoding = LabelEncoding.of(predictor.label_manager)
            channels = torch.zeros(encoding.num_labels, dtype=torch.int64)
            if encoding.ignore_label is not None:
                channels[encoding.ignore_label] = IGNORED
            channels[list(labels.coarse)] = torch.arange(1, labels.num_shared)
            transposed = labelled.reference.transpose(predictor.plans_manager.transpose_forward)
            cropped = transposed[bounding_box_to_slice(case["data_properties"]["bbox_used_for_cropping"])]
            reference_ZYX = channels[torch.from_numpy(cropped.astype(np.int64))]
            coarse_Mdhw = chosen[number].coarse.logits_Cdhw[: labels.num_shared].cpu()
            factor = predictor.fine_models[number].factor
            parts = list(_voxels(fine, coarse_Mdhw, factor, reference_ZYX))
            if parts:
                found[number] = Observed.together(parts)
    return {number: Observed(*(tensor.clone() for tensor in parts)) for number, parts in found.items()}


def _voxels(fine: FinePrediction, coarse_Mdhw: Tensor, factor: Shape, reference_ZYX: Tensor) -> Iterator[Observed]:
    """Some voxels of each class in the windows, plane by plane."""
    padded, prediction = fine.padded, fine.prediction
    reference_DHW = reference_ZYX
    for axis, (of_image, of_volume) in enumerate(zip(reference_ZYX.shape, padded.inside, strict=True)):
        reference_DHW = reference_DHW.index_select(axis, nearest_axis(of_image, of_volume).lower)
    generator = torch.Generator().manual_seed(0)
    before, *offset = padded.offset
    depth, height, width = padded.inside
    box = [slice(a, a + n) for a, n in zip(offset, (height, width), strict=True)]
    for first in range(0, depth, PLANES_AT_ONCE):
        end = min(depth, first + PLANES_AT_ONCE)
        start, size = (before + first, box[0].start, box[1].start), (end - first, height, width)
        covered_DHW = covered(fine.starts_K3, prediction.patch_size, start, size)
        if not covered_DHW.any():
            continue
        patch_MDHW = fine.labels.of_shared(prediction.dense(before + first, before + end, box).cpu())
        coarse_MDHW = upsample_window(coarse_Mdhw, start, size, factor)
        labels_DHW = reference_DHW[first:end]
        covered_DHW &= labels_DHW != IGNORED
        for label in labels_DHW[covered_DHW].unique().tolist():
            voxels_V3 = (covered_DHW & (labels_DHW == label)).nonzero()
            taken = torch.randperm(len(voxels_V3), generator=generator)[:VOXELS_OF_CLASS]
            at = (slice(None), *voxels_V3[taken].unbind(1))
            share = len(voxels_V3) / len(taken)
            yield Observed(
                patch_MDHW[at].T,
                coarse_MDHW[at].T,
                torch.full((len(taken),), label),
                torch.full((len(taken),), share),
            )
