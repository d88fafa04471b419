"""All methods on one case, by stock models: their sliding windows, and the windows that `nmsw_predict` chooses.

Tensor suffixes: C channels, d h w axes of the coarse model's volume, Z Y X axes of the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from nnunet_nmsw.evaluation.methods import Method
from nnunet_nmsw.evaluation.metrics import Label
from nnunet_nmsw.evaluation.models import Case
from nnunet_nmsw.evaluation.predicted import Prediction, Shown
from nnunet_nmsw.evaluation.reached import FoundObjects
from nnunet_nmsw.evaluation.reference import reference_labels
from nnunet_nmsw.evaluation.set_recall import whole
from nnunet_nmsw.evaluation.shared import count_macs
from nnunet_nmsw.evaluation.stock_models import StockModels
from nnunet_nmsw.flags import PYTORCH
from nnunet_nmsw.inference.case_model import Segmented
from nnunet_nmsw.inference.cases import Case as PreprocessedCase
from nnunet_nmsw.inference.export import can_stream, labels_from_logits
from nnunet_nmsw.inference.files import FilesPredictor
from nnunet_nmsw.inference.model_set import ModelSetPredictor
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.set_cases import COARSE_LOGITS
from nnunet_nmsw.inference.volume import FoldOfCase, Padded
from nnunet_nmsw.inference.windows import edges_in_image
from nnunet_nmsw.selection.by_score import GreedyBenefit


def spend(predictor: FilesPredictor, method: Method, explore: int) -> None:
    """Let a predictor of stock models take the windows of a method; without any, the coarse model is alone.

    Args:
        predictor: of a set, or of two models.
        method: of role "nmsw".
        explore: further windows of each fine model of a set.
    """
    assert isinstance(predictor, ModelSetPredictor | NMSWPredictor)
    predictor.num_patches = 0 if method.num_patches is None else method.num_patches
    if isinstance(predictor, ModelSetPredictor):
        predictor.explore = 0 if method.num_patches is None else explore


class StockModelsPredictor:
    """Predicts cases with every method of a comparison of stock models.

    Args:
        models: in any role.
        labels: that are measured, labels or regions.
        device: to predict on.
    """

    roles = ("baseline", "nmsw")
    own_selection: str | None = GreedyBenefit.name

    def __init__(self, models: StockModels, labels: Sequence[Label], device: torch.device) -> None:
        self.models, self.labels, self.device = models, labels, device
        self._predictors: dict[tuple[bool, str], FilesPredictor] = {}
        self._macs: dict[Method, int] = {}

    @property
    def plans_manager(self) -> PlansManager:
        """Of the model whose labels the predictions have."""
        return self._any.plans_manager

    @property
    def configuration_manager(self) -> ConfigurationManager:
        """Of that model."""
        return self._any.configuration_manager

    @property
    def dataset_json(self) -> dict[str, Any]:
        """Of that model."""
        return self._any.dataset_json

    @property
    def _any(self) -> FilesPredictor:
        """One of the predictors, for what all of them have."""
        return next(iter(self._predictors.values()))

    def predict(self, case: Case, methods: Sequence[Method]) -> Iterator[Prediction]:
        """Predict a case with one method after the other, the sliding windows first.

        Raises:
            UserError: an image or its labels cannot be read, or do not fit.
        """
        first = self._predictor(methods[0].mirrored, PYTORCH)
        (read,) = first.preprocess([list(case.images)], None, [None], 0)
        if "error" in read:
            raise read["error"]
        properties = read["data_properties"]
        reference_ZYX = None
        if case.has_reference:
            reference_ZYX = reference_labels(first, Path(case.reference), properties)
        as_seen: dict[tuple[bool, str], tuple[PreprocessedCase, int]] = {}
        facts: dict[bool, SlidingFacts] = {}
        for method in methods:
            kind = method.mirrored, method.backend
            predictor = self._predictor(*kind)
            if kind not in as_seen:
                as_seen[kind] = _seen(predictor, read)
            seen, coarse_macs = as_seen[kind]
            if method.selection is None:
                segmented, macs = _slide(predictor, seen)
                found_ZYX = segmented.segmentation
                facts[method.mirrored] = self._facts(found_ZYX, found_ZYX if reference_ZYX is None else reference_ZYX)
            else:
                spend(predictor, method, self.models.explore)
                segmented, macs = count_macs(partial(_segmented, predictor, seen))
            self._macs[method] = macs + coarse_macs
            # Another backend's operations cannot be counted, and are PyTorch's.
            macs = self._macs[dataclasses.replace(method, backend=PYTORCH)]
            # Of two models, each fold has windows of its own, as many as the first.
            windows = segmented.windows if self.models.is_set else segmented.windows[:1]
            patches = sum(len(of_model.starts) for of_model in windows)
            prediction = Prediction(method, None, segmented.segmentation, properties, patches, macs)
            if method.selection is None:
                yield prediction
                continue
            edges = [edges_in_image(of, properties, self.plans_manager.transpose_backward) for of in windows]
            yield self._with_windows(prediction, edges, facts[method.mirrored])

    def _predictor(self, mirrored: bool, backend: str) -> FilesPredictor:
        key = mirrored, backend
        if key not in self._predictors:
            self._predictors[key] = predictor = self.models.make(str(self.device), mirrored, backend)
            if isinstance(predictor, NMSWPredictor):
                predictor.keep_folds()
        return self._predictors[key]

    @property
    def _fine_classes(self) -> list[Sequence[int] | None]:
        """By fine model, the numbers of its classes; None where it has all."""
        if isinstance(self._any, ModelSetPredictor):
            return [model.labels.coarse for model in self._any.fine_models]
        return [None]

    def _facts(self, found_ZYX: np.ndarray, reference_ZYX: np.ndarray) -> SlidingFacts:
        classes = self._fine_classes
        have_it = {label: [of is None or label in of for of in classes] for label in self.labels}
        objects = {label: FoundObjects.of(np.isin(found_ZYX, label)) for label in self.labels if any(have_it[label])}
        numbers = [number for label in objects for number in (label if isinstance(label, tuple) else [label])]
        return SlidingFacts(objects, have_it, np.isin(reference_ZYX, numbers))

    def _with_windows(self, prediction: Prediction, edges: Sequence[np.ndarray], facts: SlidingFacts) -> Prediction:
        """A prediction with what is told of its windows.

        Args:
            prediction: without.
            edges: of the windows of each fine model, see `edges_in_image`.
            facts: of the case.
        """
        inside = [_inside(of_model, facts.foreground_ZYX.shape) for of_model in edges]
        covered = np.any(inside, axis=0)[facts.foreground_ZYX]
        reached = {}
        for label, of_class in facts.objects.items():
            of_its_models = [windows for windows, has_it in zip(inside, facts.have_it[label], strict=True) if has_it]
            reached[label_or_region_to_key(label)] = of_class.reached(np.any(of_its_models, axis=0))
        windows = [(window.tolist(), rank) for of_model in edges for rank, window in enumerate(of_model, 1)]
        return dataclasses.replace(
            prediction,
            covered_foreground=float(covered.mean()) if covered.size else float("nan"),
            show=lambda: Shown([window for window, _ in windows], [rank for _, rank in windows]),
            reached=None if prediction.method.num_patches is None else reached,
        )


class SlidingFacts(NamedTuple):
    """What all choices of windows of a case are held against.

    Attributes:
        objects: that the sliding windows find, by label or region, where a fine model has it.
        have_it: by label or region, whether each fine model has it.
        foreground_ZYX: bool, the reference's voxels of these classes.
    """

    objects: dict[Label, FoundObjects]
    have_it: dict[Label, list[bool]]
    foreground_ZYX: np.ndarray


def _seen(predictor: FilesPredictor, read: PreprocessedCase) -> tuple[PreprocessedCase, int]:
    """A case, of a set with the coarse logits that all methods share, and the multiply-accumulates of that."""
    if not isinstance(predictor, ModelSetPredictor):
        return read, 0
    with torch.inference_mode():
        logits_Cdhw, macs = count_macs(partial(predictor.coarse_logits, read))
    return {**read, COARSE_LOGITS: logits_Cdhw}, macs


def _slide(predictor: FilesPredictor, case: PreprocessedCase) -> tuple[Segmented, int]:
    """What the sliding window of each fine model finds, and its multiply-accumulates.

    The coarse model of a set gives the classes that no fine model has, and of two models nothing.
    """
    if isinstance(predictor, ModelSetPredictor):

        def everywhere(of_case: PreprocessedCase, logits_Cdhw: Tensor) -> list[FoldOfCase]:
            return list(map(whole, predictor.chosen(of_case, logits_Cdhw)))

        return count_macs(partial(predictor.predict_in_windows, case, everywhere))
    assert isinstance(predictor, NMSWPredictor)
    padded, folds = predictor.case_model().choose(case)
    return count_macs(partial(_in_windows, predictor, case, padded, list(map(whole, folds))))


def _segmented(predictor: FilesPredictor, case: PreprocessedCase) -> Segmented:
    """What `nmsw_predict` makes of a case."""
    if isinstance(predictor, ModelSetPredictor):
        return predictor.predict_case(case)
    assert isinstance(predictor, NMSWPredictor)
    return _in_windows(predictor, case, *predictor.case_model().choose(case))


def _in_windows(
    predictor: NMSWPredictor, case: PreprocessedCase, padded: Padded, folds: Sequence[FoldOfCase]
) -> Segmented:
    """Labels of a case by two models, as the plans' way to resample wants it."""
    model, properties = predictor.case_model(), case["data_properties"]
    windows = [fold.in_volume(padded) for fold in folds]
    if can_stream(predictor.configuration_manager):
        return Segmented(model.labels_of(padded, folds, properties), windows)
    logits = model.logits_of(padded, folds).numpy()
    return Segmented(labels_from_logits(logits, *predictor.of_model, properties), windows)


def _inside(edges: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The voxels whose centres lie in windows.

    Args:
        edges: of `edges_in_image`.
        shape: of the image.
    """
    inside = np.zeros(shape, bool)
    for first, end in np.ceil(edges - 0.5).astype(int).clip(0, shape):
        inside[tuple(slice(a, b) for a, b in zip(first, end, strict=True))] = True
    return inside
