"""A loaded model that predicts preprocessed cases: between a volume's labels and an image's.

Tensor suffixes: C channels or classes, D H W axes of the volume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from nnunet_nmsw.inference.cases import Case, loaded
from nnunet_nmsw.inference.export import in_image, resampling_axes
from nnunet_nmsw.inference.volume import (
    ChosenWindows,
    FoldOfCase,
    Networks,
    Padded,
    Spending,
    Work,
    choose,
    predict_labels,
    predict_logits,
    where_it_fits,
)


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
        logits_CDHW: float16, on the host.
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
        work: how a volume is worked through.
        of_model: for the way to the image.
    """

    networks_of: Callable[[Case], Sequence[Networks]]
    patch_size: tuple[int, ...]
    spending: Spending
    work: Work
    of_model: OfModel

    def labels(self, case: Case) -> Segmented:
        """Labels of a case's image, without a volume of logits; see `inference.planes`.

        Args:
            case: with `data`, shape C, D, H, W, and `data_properties`.
        """
        padded, folds = self.choose(case)
        segmentation = self.labels_of(padded, folds, case["data_properties"])
        return Segmented(segmentation, [fold.in_volume(padded) for fold in folds])

    def logits(self, case: Case) -> WithLogits:
        """Logits of a case's volume.

        Args:
            case: with `data`, shape C, D, H, W.
        """
        padded, folds = self.choose(case)
        return WithLogits(self.logits_of(padded, folds), [fold.in_volume(padded) for fold in folds])

    @torch.inference_mode()
    def choose(self, case: Case) -> tuple[Padded, list[FoldOfCase]]:
        """The padded volume of a case, predicted coarsely, and its windows, for each fold."""
        padded = Padded.of(loaded(case["data"]), self.patch_size).on(self.work.device)
        return padded, [choose(networks, padded, self.spending) for networks in self.networks_of(case)]

    @torch.inference_mode()
    def labels_of(self, padded: Padded, folds: Sequence[FoldOfCase], properties: dict[str, Any]) -> np.ndarray:
        """Labels of the image, in the axis order and shape of nnU-Net's reader.

        Args:
            padded: the volume.
            folds: with their windows.
            properties: nnU-Net's of the case.
        """
        plans, configuration, dataset = self.of_model
        axes = resampling_axes(plans, configuration, properties, padded.inside)
        decided = where_it_fits(lambda work: predict_labels(padded, folds, axes, work), self.work)
        return in_image(decided, plans, plans.get_label_manager(dataset), properties)

    @torch.inference_mode()
    def logits_of(self, padded: Padded, folds: Sequence[FoldOfCase]) -> Tensor:
        """Logits of the volume without padding, float16 of shape C, D, H, W, on the host."""
        return where_it_fits(lambda work: predict_logits(padded, folds, work), self.work).cpu()
