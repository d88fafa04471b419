"""A loaded model that predicts preprocessed cases: between a volume's labels and an image's.

Tensor suffixes: C channels or classes, D H W axes of the volume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from nnunet_nmsw.inference.cases import Case, loaded
from nnunet_nmsw.inference.export import in_image, resampling_axes
from nnunet_nmsw.inference.volume import (
    Chosen,
    ChosenWindows,
    Networks,
    Padded,
    Share,
    Spending,
    Work,
    choose,
    predict_labels,
    predict_logits,
)

Result = TypeVar("Result")


class OfModel(NamedTuple):
    """What nnU-Net's export wants to know of a model.

    Attributes:
        plans: the model's.
        configuration: the model's.
        dataset: the model's dataset.json.
    """

    plans: PlansManager
    configuration: ConfigurationManager
    dataset: dict[str, Any]


class Segmented(NamedTuple):
    """A predicted case.

    Attributes:
        segmentation: labels in the axis order and shape of nnU-Net's reader.
        windows: that were taken, one entry a fold.
    """

    segmentation: np.ndarray
    windows: list[ChosenWindows]


class WithLogits(NamedTuple):
    """A predicted case.

    Attributes:
        logits_CDHW: float16, on the device of the results.
        windows: that were taken, one entry a fold.
    """

    logits_CDHW: Tensor
    windows: list[ChosenWindows]


@dataclasses.dataclass(frozen=True)
class CaseModel:
    """Predicts preprocessed cases.

    Attributes:
        networks_of: the networks that predict a case, one entry a fold.
        patch_size: voxels by axis.
        spending: what may be spent on a case.
        share: what may go on at a time.
        device: for results; the host where they do not fit.
        of_model: for the way to the image.
        progress_bar: show one over patches.
    """

    networks_of: Callable[[Case], Sequence[Networks]]
    patch_size: tuple[int, ...]
    spending: Spending
    share: Share
    device: torch.device
    of_model: OfModel
    progress_bar: bool = False

    @torch.inference_mode()
    def labels(self, case: Case) -> Segmented:
        """Labels of a case's image, without a volume of logits; see `inference.planes`.

        Args:
            case: with `data`, shape C, D, H, W, and `data_properties`.
        """
        properties, (plans, configuration, dataset) = case["data_properties"], self.of_model
        padded, folds = self._choose(case)
        axes = resampling_axes(plans, configuration, properties, padded.inside)
        decided = self._where_it_fits(lambda work: predict_labels(padded, folds, axes, work))
        segmentation = in_image(decided, plans, plans.get_label_manager(dataset), properties)
        return Segmented(segmentation, [fold.in_volume(padded) for fold in folds])

    @torch.inference_mode()
    def logits(self, case: Case) -> WithLogits:
        """Logits of a case's volume.

        Args:
            case: with `data`, shape C, D, H, W.
        """
        padded, folds = self._choose(case)
        logits_CDHW = self._where_it_fits(lambda work: predict_logits(padded, folds, work))
        return WithLogits(logits_CDHW, [fold.in_volume(padded) for fold in folds])

    def _choose(self, case: Case) -> tuple[Padded, list[Chosen]]:
        padded = Padded.of(loaded(case["data"]), self.patch_size)
        return padded, [choose(networks, padded, self.spending) for networks in self.networks_of(case)]

    def _where_it_fits(self, predict: Callable[[Work], Result]) -> Result:
        """What is predicted with results on the device, or on the host if the device has too little memory."""
        if self.device.type != "cpu":
            try:
                return predict(Work(self.share, self.device, self.progress_bar))
            except torch.OutOfMemoryError:
                print("The results do not fit on the device; predicting again with results on the host")
                empty_cache(self.device)
        return predict(Work(self.share, torch.device("cpu"), self.progress_bar))
