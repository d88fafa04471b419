"""NMSW inference without any training: two stock models of one dataset, a coarse and a fine one.

Tensor suffixes: C classes, D H W axes of the volume, d h w axes of the low-resolution view, l voxels of the view along
one axis, m voxels of the coarse model's volume along it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.data_iterators import PreprocessAdapterFromNpy
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from nnunet_nmsw.config import NMSWConfig
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.geometry import Shape, low_shape
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.preprocessing import Case, preprocessed_arrays, preprocessed_cases
from nnunet_nmsw.network import CoarsePrediction, NMSWNetwork


class TwoModelPredictor(NMSWPredictor):
    """Takes the coarse prediction from one stock model and patches from another.

    The coarse model, nnU-Net's `3d_lowres` say, slides its window over the image at its own spacing. Windows of the
    fine model are placed greedily where the entropy of that prediction is, and fused with it by the weights that
    training would start from. Used as its parent is.

    Args:
        global_model: predictor of the coarse model, initialised.
        **kwargs: of `NMSWPredictor`.
    """

    network: nn.Module
    list_of_parameters: list[dict[str, Tensor]]

    def __init__(self, global_model: nnUNetPredictor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.global_model = global_model
        self._volume_of_global_model: Tensor | None = None
        self._global_logits_Cdhw: Tensor
        self._volume_shape: Shape

    def initialize_from_trained_model_folder(self, *args: Any, **kwargs: Any) -> None:
        """Load the fine model; see the parent.

        Raises:
            UserError: the two models do not belong together, or one is no stock 3D model.
        """
        super().initialize_from_trained_model_folder(*args, **kwargs)
        check_pair(self.global_model, self)
        local_branch = self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network
        configuration, coarse = self.configuration_manager, self.global_model.configuration_manager
        config = dataclasses.replace(
            NMSWConfig.from_configuration(configuration.configuration),
            downsampling_factor=factor_between(configuration.spacing, coarse.spacing),
            regions=self.label_manager.has_regions,
            score_map="free",
            trust="full",
        )
        d, h, w = configuration.patch_size
        classes = self.label_manager.num_segmentation_heads
        self.network = NMSWNetwork(nn.Identity(), local_branch, classes, (d, h, w), config)
        others = {k: v for k, v in self.network.state_dict().items() if not k.startswith("local_branch.")}
        self.list_of_parameters = [
            {**others, **{f"local_branch.{name}": weight for name, weight in parameters.items()}}
            for parameters in self.list_of_parameters
        ]

    def _start_case(self, data: Tensor) -> None:
        super()._start_case(data)
        assert self._volume_of_global_model is not None, "the coarse model has not seen this volume"
        self._global_logits_Cdhw = self.global_model.predict_logits_from_preprocessed_data(self._volume_of_global_model)
        d, h, w = data.shape[1:]
        self._volume_shape = d, h, w

    def predict_coarse(self, volume_CDHW: Tensor) -> CoarsePrediction:
        """The coarse model's logits on the low-resolution grid of the padded volume, and their entropy."""
        factor = self.nmsw_network.config.downsampling_factor
        logits_Cdhw = self._global_logits_Cdhw.to(self.device).float()
        padded: Sequence[int] = volume_CDHW.shape[1:]
        for axis, low in enumerate(low_shape(padded, factor)):
            inside = self._volume_shape[axis]
            before = (padded[axis] - inside) // 2  # as nnU-Net pads
            centres_l = (torch.arange(low, device=self.device) + 0.5) * factor[axis] - before
            weights_lm = interpolation(centres_l / inside, logits_Cdhw.shape[axis + 1])
            logits_Cdhw = torch.tensordot(logits_Cdhw, weights_lm, dims=([axis + 1], [1])).movedim(-1, axis + 1)
        return CoarsePrediction(logits_Cdhw, self.nmsw_network.entropy(logits_Cdhw))

    def predict_single_npy_array(
        self, input_image: np.ndarray, image_properties: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """See the parent."""
        preprocess = PreprocessAdapterFromNpy(
            [input_image],
            [None],
            [deepcopy(image_properties)],
            [None],
            self.global_model.plans_manager,
            self.global_model.dataset_json,
            self.global_model.configuration_manager,
        )
        self._volume_of_global_model = next(preprocess)["data"]
        return super().predict_single_npy_array(input_image, image_properties, *args, **kwargs)

    def preprocess(self, *args: Any) -> Iterator[Case]:
        """See the parent."""
        return self._with_coarse(super().preprocess(*args), preprocessed_cases(self.global_model, *args))

    def preprocess_arrays(self, *args: Any) -> Iterator[Case]:
        """See the parent."""
        return self._with_coarse(super().preprocess_arrays(*args), preprocessed_arrays(self.global_model, *args))

    def _with_coarse(self, cases: Iterable[Case], of_global_model: Iterable[Case]) -> Iterator[Case]:
        """The cases as both models see them. Both preprocess the same images in the same order."""
        for case, coarse in zip(cases, of_global_model, strict=True):
            yield coarse if "error" in coarse else {**case, VOLUME_OF_GLOBAL_MODEL: coarse.get("data")}

    def predict_from_data_iterator(self, data_iterator: Iterable[Case], *args: Any, **kwargs: Any) -> list[Any]:
        """See the parent."""

        def one_after_the_other() -> Iterator[Case]:
            for case in data_iterator:
                self._volume_of_global_model = case.get(VOLUME_OF_GLOBAL_MODEL)
                yield case  # predicted by the time the next is asked for

        return super().predict_from_data_iterator(one_after_the_other(), *args, **kwargs)


VOLUME_OF_GLOBAL_MODEL = "data_of_global_model"
"""Key of a preprocessed case: the volume as the coarse model sees it."""


def check_pair(coarse: nnUNetPredictor, fine: nnUNetPredictor) -> None:
    """See that two models can be used together.

    Raises:
        UserError: they cannot, and why.
    """
    for flag, model in (("--global_model", coarse), ("--local_model", fine)):
        network = model.network._orig_mod if isinstance(model.network, OptimizedModule) else model.network
        if isinstance(network, NMSWNetwork):
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


def factor_between(fine: Sequence[float], coarse: Sequence[float]) -> Shape:
    """Voxels of the fine spacing per voxel of the coarse one, by axis, rounded, at least 1."""
    d, h, w = (max(1, round(b / a)) for a, b in zip(fine, coarse, strict=True))
    return d, h, w


def interpolation(position_l: Tensor, size: int) -> Tensor:
    """Weights of linear interpolation along an axis, edges replicated.

    Args:
        position_l: where, 0 being the lower edge of the first voxel and 1 the upper edge of the last.
        size: voxels of the axis, m.

    Returns:
        float32, shape l, m; rows sum to 1.
    """
    voxel_l1 = (position_l * size - 0.5).clamp(0, size - 1)[:, None]
    return (1 - (voxel_l1 - torch.arange(size, device=position_l.device)).abs()).clamp_min(0)
