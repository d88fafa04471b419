"""The fine models of a set, each with some of the coarse model's classes: found and checked before they are loaded.

Tensor suffixes: C channels of the coarse model, F channels of a fusion, K windows, d h w axes of the coarse model's
volume, 3 one coordinate per axis.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.export import can_stream
from nnunet_nmsw.inference.fine_model import ModelDocuments, coarse_prediction_of, factor_between
from nnunet_nmsw.inference.model_folder import check_model, read_document
from nnunet_nmsw.inference.networks import Fold
from nnunet_nmsw.inference.preprocessing import is_stock
from nnunet_nmsw.inference.volume import FoldOfCase, Padded, Spending
from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.model.safe_loading import configuration_of
from nnunet_nmsw.model.weights import digest_of_weights
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.matched_labels import MatchedLabels, is_class
from nnunet_nmsw.volume.windows import Shape, WindowGrid


class ModelFolder(NamedTuple):
    """Where a trained model is.

    Attributes:
        path: of the folder.
        folds: to ensemble.
    """

    path: Path
    folds: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class FineModel:
    """A fine model of a set, without its weights. Images are preprocessed for it as for a predictor.

    Attributes:
        folder: of the model.
        model: its plans and labels.
        labels: the classes that the coarse model has, too.
        factor: voxels of its volume per voxel of the coarse one.
        weights: of each fold, by name, on the disk.
        device: to preprocess on.
        verbose_preprocessing: tell of it.
    """

    folder: ModelFolder
    model: ModelDocuments
    labels: MatchedLabels
    factor: Shape
    weights: tuple[Mapping[str, Tensor], ...]
    device: torch.device
    verbose_preprocessing: bool = False

    @classmethod
    def of(
        cls, folder: ModelFolder, coarse: ModelDocuments, checkpoint: str, trust: bool, device: torch.device
    ) -> FineModel:
        """Read what is known of a model before it is loaded.

        Args:
            folder: of the model.
            coarse: the model that it is to be used with.
            checkpoint: file name of the checkpoints.
            trust: see `check_model`.
            device: to preprocess on.

        Raises:
            UserError: it cannot be loaded, or not be used with the coarse model.
        """
        checkpoints = check_model(folder.path, folder.folds, checkpoint, trust)
        file, first = next(iter(checkpoints.items()))
        plans, dataset = (read_document(folder.path, name) for name in ("plans.json", "dataset.json"))
        manager = PlansManager(plans)
        configuration = manager.get_configuration(configuration_of(first, file))
        model = ModelDocuments(f"--local_model {folder.path}", manager, configuration, dataset, first["trainer_name"])
        labels = check_member(coarse, model)
        factor = factor_between(configuration.spacing, coarse.configuration.spacing)
        weights = tuple(read["network_weights"] for read in checkpoints.values())
        return cls(folder, model, labels, factor, weights, device)

    @property
    def plans_manager(self) -> PlansManager:
        """As a predictor has it."""
        return self.model.plans

    @property
    def configuration_manager(self) -> ConfigurationManager:
        """As a predictor has it."""
        return self.model.configuration

    @property
    def dataset_json(self) -> dict[str, Any]:
        """As a predictor has it."""
        return self.model.dataset

    @cached_property
    def digest(self) -> str:
        """Says which model it is, by its weights."""
        return digest_of_folds(self.weights)

    @property
    def patch_size(self) -> Shape:
        """Voxels by axis."""
        d, h, w = self.configuration_manager.patch_size
        return d, h, w

    def choose(
        self, logits_Cdhw: Tensor, properties: dict[str, Any], spending: Spending, weights: FusionWeights
    ) -> FoldOfCase:
        """Its windows on a case by the coarse prediction of its classes. Its networks are not loaded.

        Args:
            logits_Cdhw: of the coarse model, in voxels of that model.
            properties: nnU-Net's of the case as the coarse model has it.
            spending: what may be spent.
            weights: of the fusion, for the classes that both models have.
        """
        padded, encoding = self.empty_volume(properties), LabelEncoding(self.labels.num_shared)
        coarse = coarse_prediction_of(self.labels.of_coarse(logits_Cdhw), padded, self.factor, encoding)
        d, h, w = padded.volume_CDHW.shape[1:]
        grid = WindowGrid((d, h, w), self.patch_size, self.factor)
        windows = spending.choose(coarse, grid)
        logits_Fdhw, encoding = self.labels.for_fusion(coarse.logits_Cdhw), LabelEncoding(self.labels.num_channels)
        coarse = coarse._replace(logits_Cdhw=logits_Fdhw, encoding=encoding)
        return FoldOfCase(NotLoaded(), coarse, grid, windows, FusionWeights(*map(self.labels.for_fusion, weights)))

    @property
    def preprocessing(self) -> str:
        """All that the preprocessed image depends on, beside the image: models of the same share it."""
        configuration = self.configuration_manager.configuration
        keys = ("spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name")
        resampling = ("resampling_fn_data", "resampling_fn_data_kwargs")
        of_plans = [
            self.plans_manager.transpose_forward,
            self.plans_manager.foreground_intensity_properties_per_channel,
        ]
        return json.dumps([*(configuration.get(key) for key in (*keys, *resampling)), *of_plans], sort_keys=True)

    def empty_volume(self, properties: dict[str, Any]) -> Padded:
        """The padded volume of an image without its voxels, to choose windows in.

        Args:
            properties: nnU-Net's of the image, preprocessed for the coarse model.
        """
        shape = properties["shape_after_cropping_and_before_resampling"]
        spacing = [properties["spacing"][axis] for axis in self.plans_manager.transpose_forward]
        new_shape = compute_new_shape(shape, spacing, self.configuration_manager.spacing)
        volume_CDHW = torch.empty((1, *map(int, new_shape)), device="meta")
        return Padded.of(volume_CDHW, self.patch_size)


def digest_of_folds(weights: Sequence[Mapping[str, Tensor]]) -> str:
    """Says which model it is that has these weights, by fold, in any order."""
    return hashlib.sha256(" ".join(sorted(map(digest_of_weights, weights))).encode()).hexdigest()


class MatchedPatches:
    """The patches of a fold, whose logits are those of the matched channels; see `volume.Patches`.

    Args:
        fold: predicts patches.
        labels: the classes.
    """

    def __init__(self, fold: Fold, labels: MatchedLabels) -> None:
        self.fold, self.labels = fold, labels

    def patches(self, padded: Padded, coarse: CoarsePrediction, starts_K3: Tensor) -> Tensor:
        """Logits of windows."""
        return self.labels.of_fine(self.fold.patches(padded, coarse, starts_K3))


class NotLoaded:
    """The patches of a model that is not loaded yet."""

    def patches(self, padded: Padded, coarse: CoarsePrediction, starts_K3: Tensor) -> Tensor:
        """A model is loaded before it is asked."""
        raise AssertionError("the model is not loaded")


def check_member(coarse: ModelDocuments, fine: ModelDocuments) -> MatchedLabels:
    """See that a fine model can be used with a coarse one.

    Returns:
        The classes that both have.

    Raises:
        UserError: it cannot, and why.
    """

    def facts(model: ModelDocuments) -> dict[str, Any]:
        return {
            "channels": model.channels,
            "reader of images": model.plans.plans["image_reader_writer"],
            "axis order (transpose_forward)": list(model.plans.transpose_forward),
        }

    fine.check()
    for model in (coarse, fine):
        if model.plans.get_label_manager(model.dataset).has_regions:
            raise UserError(f"{model.what} has regions, which can overlap: a set takes models of plain labels")
        if not is_stock(model.configuration.preprocessor_class(verbose=False)):
            raise UserError(f"{model.what}: its plans name a preprocessor of their own, which a set does not know")
        if not can_stream(model.configuration):
            raise UserError(
                f"{model.what}: its plans resample probabilities with a function or settings of their own, which a set "
                "does not know"
            )
    coarse.check_same(fine, facts)
    labels = MatchedLabels.of(coarse.dataset["labels"], fine.dataset["labels"])
    if not labels.coarse:
        raise UserError(
            f"{fine.what} has no class of {coarse.what}, and classes are matched by name: it has "
            f"{names_of(fine.dataset['labels'])}"
        )
    return labels


def names_of(labels: dict[str, int]) -> str:
    """Names of classes, for a message."""
    return ", ".join(name for name, number in labels.items() if is_class(name, number))


def check_folders(coarse: Path, fine: Sequence[Path]) -> None:
    """See that no folder is named twice.

    Raises:
        UserError: one is.
    """
    for number, folder in enumerate(fine):
        if folder in (coarse, *fine[:number]):
            raise UserError(f"{folder} is named twice: give each model once, with --global_model or --local_model")


def unmatched(coarse: ModelDocuments, models: Sequence[FineModel]) -> list[str]:
    """Lines for people: which classes only one side has."""
    labels = {name: number for name, number in coarse.dataset["labels"].items() if is_class(name, number)}
    found = {number for model in models for number in model.labels.coarse}
    lines = []
    alone = [name for name, number in labels.items() if number not in found]
    if alone:
        lines.append(f"No fine model has {', '.join(alone)}: they stay as {coarse.what} predicts them")
    lines += [
        f"{model.model.what} has {', '.join(model.labels.only_fine)}, which {coarse.what} does not: left out"
        for model in models
        if model.labels.only_fine
    ]
    return lines
