"""Patches of a stock model at windows that another model's coarse prediction chooses.

Tensor suffixes: C classes, K windows, d h w axes of the low-resolution view, 3 one coordinate per axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.volume import Padded, spatial_shape
from nnunet_nmsw.model.by_trainer import parts_by_trainer
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.model.plans import settings_of
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.volume.interpolation import axis_between, interpolated
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import Shape, low_shape


class FineModelPredictor(NMSWPredictor):
    """A stock model whose network predicts patches: the local branch of an NMSW network without a global one.

    Args:
        coarse_spacing: gives the spacing of the coarse prediction in mm by axis, when the model is loaded.
        **kwargs: of `NMSWPredictor`.
    """

    network: nn.Module
    list_of_parameters: list[dict[str, Tensor]]

    def __init__(self, coarse_spacing: Callable[[], Sequence[float]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.coarse_spacing = coarse_spacing

    def initialize_from_trained_model_folder(self, *args: Any, **kwargs: Any) -> None:
        """See the parent. The model's network becomes a local branch.

        Raises:
            UserError: it is no stock 3D model; and what the parent raises.
        """
        super().initialize_from_trained_model_folder(*args, **kwargs)
        ModelDocuments.of("--local_model", self).check()
        configuration = self.configuration_manager
        factor = factor_between(configuration.spacing, self.coarse_spacing())
        changed = {"downsampling_factor": factor, "context_channels": 0}
        settings = settings_of(configuration.configuration).model_copy(update=changed)
        d, h, w = configuration.patch_size
        images = determine_num_input_channels(self.plans_manager, configuration, self.dataset_json)
        channels = images, self.label_manager.num_segmentation_heads
        self.network = NMSWNetwork(nn.Identity(), uncompiled(self.network), channels, (d, h, w), settings)
        others = {k: v for k, v in self.network.state_dict().items() if not k.startswith("local_branch.")}
        self.list_of_parameters = [
            {**others, **{f"local_branch.{name}": weight for name, weight in parameters.items()}}
            for parameters in self.list_of_parameters
        ]


def coarse_prediction_of(
    logits_Cdhw: Tensor, padded: Padded, factor: Shape, encoding: LabelEncoding
) -> CoarsePrediction:
    """Another model's logits on the low-resolution grid of a padded volume, and their entropy.

    Args:
        logits_Cdhw: over the volume without padding, in voxels of the other model.
        padded: the volume; its shape alone is looked at.
        factor: voxels of the volume per low-resolution voxel.
        encoding: of the labels.
    """
    on_grid_Cdhw = on_low_grid(logits_Cdhw, padded, factor)
    return CoarsePrediction(on_grid_Cdhw, encoding.entropy(on_grid_Cdhw), encoding)


def on_low_grid(map_Cdhw: Tensor, padded: Padded, factor: Shape) -> Tensor:
    """A map in voxels of another model on the low-resolution grid of a padded volume, edges replicated.

    Args:
        map_Cdhw: over the volume without padding.
        padded: the volume; its shape alone is looked at.
        factor: voxels of the volume per low-resolution voxel.
    """
    matrices: list[Tensor | None] = []
    for axis, low in enumerate(low_shape(spatial_shape(padded.volume_CDHW), factor)):
        centres = (torch.arange(low, dtype=torch.float64) + 0.5) * factor[axis] - padded.offset[axis]
        size = map_Cdhw.shape[axis + 1]
        axis_of_view = axis_between(centres / padded.inside[axis] * size - 0.5, size)
        matrices.append(axis_of_view.matrix(size).to(map_Cdhw.device))
    return interpolated(map_Cdhw, matrices)


def uncompiled(network: nn.Module) -> nn.Module:
    """A network without `torch.compile`."""
    original: nn.Module = network._orig_mod if isinstance(network, OptimizedModule) else network
    return original


def factor_between(fine: Sequence[float], coarse: Sequence[float]) -> Shape:
    """Voxels of the fine spacing per voxel of the coarse one, by axis, rounded, at least 1."""
    d, h, w = (max(1, round(b / a)) for a, b in zip(fine, coarse, strict=True))
    return d, h, w


class ModelDocuments(NamedTuple):
    """What the documents of a model say, and has to fit where stock models are used together.

    Attributes:
        what: it is, for messages.
        plans: of the model.
        configuration: of the plans.
        dataset: the model's dataset.json.
        trainer: name of the class that trained it.
    """

    what: str
    plans: PlansManager
    configuration: ConfigurationManager
    dataset: dict[str, Any]
    trainer: str

    @classmethod
    def of(cls, what: str, predictor: nnUNetPredictor) -> ModelDocuments:
        """Of a predictor that has its model."""
        loaded = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        return cls(what, *loaded, predictor.trainer_name)

    @property
    def channels(self) -> dict[str, str]:
        """Names of the image's channels, by number."""
        names: dict[str, str] = self.dataset.get("channel_names") or self.dataset["modality"]
        return names

    def check(self) -> None:
        """See that it is a stock 3D model that needs no other model's prediction.

        Raises:
            UserError: it is not.
        """
        if parts_by_trainer(self.trainer) is not None:
            raise UserError(f"{self.what} is an NMSW model, which has both branches: predict with it alone, with -m")
        if len(self.configuration.patch_size) != 3:
            raise UserError(f"{self.what} is a 2D model: give 3D models, such as 3d_lowres and 3d_fullres")
        if self.configuration.previous_stage_name is not None:
            raise UserError(
                f"{self.what} is the second stage of a cascade: give models that need no other's prediction"
            )

    def check_same(self, other: ModelDocuments, facts: Callable[[ModelDocuments], dict[str, Any]]) -> None:
        """See that two models agree on what has to be the same.

        Args:
            other: the other model.
            facts: of a model, by name.

        Raises:
            UserError: they do not.
        """
        for (what, mine), others in zip(facts(self).items(), facts(other).values(), strict=True):
            if mine != others:
                raise UserError(f"the models differ in their {what}: {mine} of {self.what}, {others} of {other.what}")
