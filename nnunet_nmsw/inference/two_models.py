"""NMSW inference without any training: two stock models of one dataset, a coarse and a fine one.

Tensor suffixes: C classes, D H W axes of the volume, K windows, d h w axes of the coarse model's volume, 3 one
coordinate per axis.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Any

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.cases import Case, Cases, loaded
from nnunet_nmsw.inference.fine_model import FineModelPredictor, ModelDocuments, coarse_prediction_of, uncompiled
from nnunet_nmsw.inference.networks import Fold
from nnunet_nmsw.inference.openvino_branches import StockNetwork
from nnunet_nmsw.inference.preprocessing import preprocessed_arrays, preprocessed_cases
from nnunet_nmsw.inference.volume import Networks, Padded
from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.selection.by_score import GREEDY_BY_ENTROPY
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import Shape, WindowGrid


class TwoModelPredictor(FineModelPredictor):
    """Takes the coarse prediction from one stock model and patches from another.

    The coarse model, nnU-Net's `3d_lowres` say, slides its window over the image at its own spacing. Windows of the
    fine model are placed greedily where the entropy of that prediction is, and fused with it by the weights that
    training would start from. Used as its parent is.

    Args:
        global_model: predictor of the coarse model, initialised. The backend computes its network, too.
        **kwargs: of `NMSWPredictor`.
    """

    def __init__(self, global_model: nnUNetPredictor, **kwargs: Any) -> None:
        of_parent = {"selector": GREEDY_BY_ENTROPY, **kwargs}
        super().__init__(lambda: global_model.configuration_manager.spacing, **of_parent)
        self.global_model = global_model

    def initialize_from_trained_model_folder(self, *args: Any, **kwargs: Any) -> None:
        """Load the fine model; see the parent.

        Raises:
            UserError: the two models do not belong together, or one is no stock 3D model.
        """
        super().initialize_from_trained_model_folder(*args, **kwargs)
        check_pair(ModelDocuments.of("--global_model", self.global_model), ModelDocuments.of("--local_model", self))
        give_backend(self.global_model, self.backend)

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
        return coarse_prediction_of(self.logits_Cdhw, padded, self.factor, self.encoding)

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


def give_backend(coarse: nnUNetPredictor, backend: Any) -> None:
    """Let a backend compute the network of nnU-Net's predictor; nothing changes where it is None, or done."""
    network = uncompiled(coarse.network)
    if backend is not None and not isinstance(network, StockNetwork):
        coarse.network = StockNetwork(network, backend)


def check_pair(coarse: ModelDocuments, fine: ModelDocuments) -> None:
    """See that two models of one dataset can be used together.

    Raises:
        UserError: they cannot, and why.
    """

    def facts(model: ModelDocuments) -> dict[str, Any]:
        labels = model.plans.get_label_manager(model.dataset)
        return {
            "labels": model.dataset["labels"],
            "regions_class_order": list(labels.regions_class_order) if labels.has_regions else None,
            "channels": model.channels,
            "file ending": model.dataset["file_ending"],
            "image reader": model.plans.image_reader_writer_class.__name__,
            "axis order (transpose_forward)": list(model.plans.transpose_forward),
        }

    coarse.check()
    fine.check()
    coarse.check_same(fine, facts)
