"""NMSW inference without any training: two stock models of one dataset, a coarse and a fine one.

Tensor suffixes: C classes, D H W axes of the volume, d h w axes of the low-resolution view, l voxels of the view along
one axis, m voxels of the coarse model's volume along it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.cases import Case, Cases, loaded
from nnunet_nmsw.inference.networks import Fold
from nnunet_nmsw.inference.openvino_branches import StockNetwork
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.preprocessing import preprocessed_arrays, preprocessed_cases
from nnunet_nmsw.inference.volume import Networks, Padded, spatial_shape
from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.model.plans import settings_of
from nnunet_nmsw.selection.by_score import GreedyBenefit
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.volume.interpolation import axis_between, interpolated
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import Shape, WindowGrid, low_shape


class TwoModelPredictor(NMSWPredictor):
    """Takes the coarse prediction from one stock model and patches from another.

    The coarse model, nnU-Net's `3d_lowres` say, slides its window over the image at its own spacing. Windows of the
    fine model are placed greedily where the entropy of that prediction is, and fused with it by the weights that
    training would start from. Used as its parent is.

    Args:
        global_model: predictor of the coarse model, initialised. The backend computes its network, too.
        **kwargs: of `NMSWPredictor`.
    """

    network: nn.Module
    list_of_parameters: list[dict[str, Tensor]]

    def __init__(self, global_model: nnUNetPredictor, **kwargs: Any) -> None:
        super().__init__(**{"selector": GreedyBenefit(), **kwargs})
        self.global_model = global_model

    def initialize_from_trained_model_folder(self, *args: Any, **kwargs: Any) -> None:
        """Load the fine model; see the parent.

        Raises:
            UserError: the two models do not belong together, or one is no stock 3D model.
        """
        super().initialize_from_trained_model_folder(*args, **kwargs)
        check_pair(self.global_model, self)
        coarse_network, local_branch = uncompiled(self.global_model.network), uncompiled(self.network)
        if self.backend is not None and not isinstance(coarse_network, StockNetwork):
            self.global_model.network = StockNetwork(coarse_network, self.backend)
        configuration, coarse = self.configuration_manager, self.global_model.configuration_manager
        factor = factor_between(configuration.spacing, coarse.spacing)
        changed = {"downsampling_factor": factor, "context_channels": 0}
        settings = settings_of(configuration.configuration).model_copy(update=changed)
        d, h, w = configuration.patch_size
        images = determine_num_input_channels(self.plans_manager, configuration, self.dataset_json)
        channels = images, self.label_manager.num_segmentation_heads
        self.network = NMSWNetwork(nn.Identity(), local_branch, channels, (d, h, w), settings)
        others = {k: v for k, v in self.network.state_dict().items() if not k.startswith("local_branch.")}
        self.list_of_parameters = [
            {**others, **{f"local_branch.{name}": weight for name, weight in parameters.items()}}
            for parameters in self.list_of_parameters
        ]

    def networks_of(self, case: Case) -> Sequence[Networks]:
        """See the parent. The coarse model predicts the case for all folds.

        Raises:
            UserError: the coarse model has not preprocessed the case.
        """
        if VOLUME_OF_GLOBAL_MODEL not in case:
            raise UserError(
                "two models need an image, which each of them preprocesses: give files or arrays of images, not a "
                "preprocessed volume"
            )
        logits_Cdhw = self.global_model.predict_logits_from_preprocessed_data(loaded(case[VOLUME_OF_GLOBAL_MODEL]))
        logits_Cdhw = logits_Cdhw.to(self.device).float()
        factor, encoding = self.nmsw_network.settings.downsampling_factor, LabelEncoding.of(self.label_manager)
        return [GivenCoarse(fold, logits_Cdhw, factor, encoding) for fold in self.folds()]

    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """Raises what `networks_of` raises: the coarse model needs the image."""
        return self.predict_case_logits({"data": input_image}).logits_CDHW

    def preprocess(self, *args: Any) -> Cases:
        """See the parent."""
        return _with_coarse(super().preprocess(*args), preprocessed_cases(self.global_model, *args))

    def preprocess_arrays(self, *args: Any) -> Cases:
        """See the parent."""
        return _with_coarse(super().preprocess_arrays(*args), preprocessed_arrays(self.global_model, *args))


class GivenCoarse:
    """The patches of a fold with another model's coarse prediction; see `volume.Networks`.

    Args:
        fold: predicts patches.
        logits_Cdhw: of the other model, over the volume without padding, in voxels of its own.
        factor: voxels of the volume per low-resolution voxel.
        encoding: of the labels.
    """

    def __init__(self, fold: Fold, logits_Cdhw: Tensor, factor: Shape, encoding: LabelEncoding) -> None:
        self.fold, self.logits_Cdhw, self.factor, self.encoding = fold, logits_Cdhw, factor, encoding

    @property
    def weights(self) -> FusionWeights:
        """Weights of the fusion."""
        return self.fold.weights

    def grid(self, volume_shape: Shape) -> WindowGrid:
        """The windows of a padded volume."""
        return self.fold.grid(volume_shape)

    def coarse(self, padded: Padded) -> CoarsePrediction:
        """The other model's logits on the low-resolution grid of the padded volume, and their entropy."""
        matrices: list[Tensor | None] = []
        for axis, low in enumerate(low_shape(spatial_shape(padded.volume_CDHW), self.factor)):
            centres = (torch.arange(low, dtype=torch.float64) + 0.5) * self.factor[axis] - padded.offset[axis]
            size = self.logits_Cdhw.shape[axis + 1]
            axis_of_view = axis_between(centres / padded.inside[axis] * size - 0.5, size)
            matrices.append(axis_of_view.matrix(size).to(self.logits_Cdhw.device))
        logits_Cdhw = interpolated(self.logits_Cdhw, matrices)
        return CoarsePrediction(logits_Cdhw, self.encoding.entropy(logits_Cdhw), self.encoding)

    def patches(self, padded: Padded, coarse: CoarsePrediction, starts_K3: Tensor) -> Tensor:
        """Logits of windows."""
        return self.fold.patches(padded, coarse, starts_K3)


def _with_coarse(cases: Cases, of_global_model: Iterable[Case]) -> Cases:
    """The cases as both models see them. Both preprocess the same images in the same order."""

    def both() -> Generator[Case, None, None]:
        for case, coarse in zip(cases, of_global_model, strict=True):
            yield coarse if "error" in coarse else {**case, VOLUME_OF_GLOBAL_MODEL: coarse.get("data")}

    return Cases(both(), len(cases))


VOLUME_OF_GLOBAL_MODEL = "data_of_global_model"
"""Key of a preprocessed case: the volume as the coarse model sees it."""


def check_pair(coarse: nnUNetPredictor, fine: nnUNetPredictor) -> None:
    """See that two models can be used together.

    Raises:
        UserError: they cannot, and why.
    """
    for flag, model in (("--global_model", coarse), ("--local_model", fine)):
        if isinstance(uncompiled(model.network), NMSWNetwork):
            raise UserError(f"{flag} is an NMSW model, which has both branches: predict with it alone, with -m")
        if len(model.configuration_manager.patch_size) != 3:
            raise UserError(f"{flag} is a 2D model: give 3D models, such as 3d_lowres and 3d_fullres")
        if model.configuration_manager.previous_stage_name is not None:
            raise UserError(f"{flag} is the second stage of a cascade: give models that need no other's prediction")

    def of(model: nnUNetPredictor) -> dict[str, Any]:
        labels = model.label_manager
        return {
            "labels": model.dataset_json["labels"],
            "regions_class_order": list(labels.regions_class_order) if labels.has_regions else None,
            "channels": model.dataset_json.get("channel_names") or model.dataset_json.get("modality"),
            "file ending": model.dataset_json["file_ending"],
            "axis order (transpose_forward)": list(model.plans_manager.transpose_forward),
        }

    for (what, of_coarse), of_fine in zip(of(coarse).items(), of(fine).values(), strict=True):
        if of_coarse != of_fine:
            raise UserError(
                f"the two models differ in their {what}: {of_coarse} of --global_model, {of_fine} of --local_model"
            )


def uncompiled(network: nn.Module) -> nn.Module:
    """A network without `torch.compile`."""
    original: nn.Module = network._orig_mod if isinstance(network, OptimizedModule) else network
    return original


def factor_between(fine: Sequence[float], coarse: Sequence[float]) -> Shape:
    """Voxels of the fine spacing per voxel of the coarse one, by axis, rounded, at least 1."""
    d, h, w = (max(1, round(b / a)) for a, b in zip(fine, coarse, strict=True))
    return d, h, w
