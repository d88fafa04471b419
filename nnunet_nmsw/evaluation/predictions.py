"""All methods on one case, from coarse predictions and patches that are computed once.

Methods of NMSW are predicted as `nmsw_predict` predicts, sliding windows as `nnUNetv2_predict` does.

Tensor suffixes: K windows, C channels or classes, D H W axes of the padded volume or of a patch, 3 one coordinate per
axis.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.evaluation.methods import Method
from nnunet_nmsw.evaluation.models import Case, Model
from nnunet_nmsw.evaluation.oracle import Oracle
from nnunet_nmsw.evaluation.predicted import Prediction, Shown
from nnunet_nmsw.evaluation.shared import Costs, PatchStore, Position, SharedFold, SharedSlidingWindow
from nnunet_nmsw.evaluation.yardsticks import WAYS, CaseFacts
from nnunet_nmsw.flags import FLOAT32, PYTORCH
from nnunet_nmsw.inference.export import can_stream
from nnunet_nmsw.inference.loading import load_model
from nnunet_nmsw.inference.networks import Ensemble
from nnunet_nmsw.inference.openvino_branches import backend_named
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.preprocessing import is_stock, read_images, read_labels
from nnunet_nmsw.inference.volume import (
    FoldOfCase,
    Padded,
    Spending,
    choose,
    spatial_shape,
)
from nnunet_nmsw.inference.windows import edges_in_image
from nnunet_nmsw.selection.by_score import placement_grid
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import window_slices


@dataclasses.dataclass(frozen=True)
class ComparedCase:
    """A case as a model sees it.

    Attributes:
        padded: the volume.
        properties: nnU-Net's.
        reference_DHW: integer labels of the padded volume, 0 outside of nnU-Net's crop; empty for the baseline.
        seed: of the case.
    """

    padded: Padded
    properties: dict[str, Any]
    reference_DHW: Tensor
    seed: int


class FoldPredictor:
    """Predicts cases with every method of one model of a fold.

    Args:
        model: the model.
        fold: the fold.
        device: to predict on.
        threshold: of the number of patches "auto", see `Model.threshold`.
    """

    def __init__(self, model: Model, fold: int, device: torch.device, threshold: float | None = None) -> None:
        self.roles, self.device, self.threshold = (model.role,), device, threshold
        common: dict[str, Any] = {
            "perform_everything_on_device": device.type == "cuda",
            "device": device,
            "allow_tqdm": False,
        }
        self.costs = Costs()
        self.sliding_window = SharedSlidingWindow(self.costs, **common)
        self._ensembles: dict[tuple[bool, str], Ensemble] = {}
        self.nmsw: NMSWPredictor | None = None
        if model.role == "nmsw":
            self.nmsw = NMSWPredictor("all", **common)
            load_model(self.nmsw, model.folder, [fold], model.checkpoint, model.trusted)
            self.sliding_window.manual_initialization(
                self.nmsw.network,
                self.nmsw.plans_manager,
                self.nmsw.configuration_manager,
                self.nmsw.list_of_parameters,
                self.nmsw.dataset_json,
                self.nmsw.trainer_name,
                self.nmsw.allowed_mirroring_axes,
            )
        else:
            load_model(self.sliding_window, model.folder, [fold], model.checkpoint, model.trusted)
        self.plans_manager = self.sliding_window.plans_manager
        self.configuration_manager = self.sliding_window.configuration_manager
        self.dataset_json = self.sliding_window.dataset_json

    @property
    def own_selection(self) -> str | None:
        """The way in which the model itself chooses windows, a key of `WAYS`; None of the baseline."""
        if self.nmsw is None:
            return None
        name = self.nmsw.nmsw_network.sampler.at_inference.name
        if name not in WAYS:
            raise UserError(
                f'the model chooses windows by "{name}", which is no row of WAYS in evaluation/yardsticks.py'
            )
        return name

    @torch.inference_mode()
    def predict(self, case: Case, methods: Sequence[Method]) -> Iterator[Prediction]:
        """Predict a case with one method after the other, only one result alive at a time.

        Raises:
            UserError: an image cannot be read.
        """
        of_case = self._preprocess(case)
        for mirrored, of_one_kind in itertools.groupby(methods, lambda method: method.mirrored):
            of_kind = list(of_one_kind)
            store = PatchStore(self._shared_positions(of_case.padded))
            # What another backend computes is not shared with PyTorch's methods.
            of_backend = PatchStore(store.positions)
            # Patches of a sliding window are patches of the image alone.
            with_context = self.nmsw is not None and self.nmsw.nmsw_network.context is not None
            of_image = PatchStore(store.positions) if with_context else store
            try:
                self.sliding_window.store, self.sliding_window.use_mirroring = of_image, mirrored
                fold = self._fold(mirrored, store)
                others = {method.backend for method in of_kind} - {PYTORCH}
                folds = {PYTORCH: fold, **{name: self._fold(mirrored, of_backend, name) for name in others}}
                facts = self._facts(of_case, fold)
                for method in of_kind:
                    if method.selection is None:
                        yield self._slide(method, of_case)
                    else:
                        yield self._select(method, of_case, folds, facts)
            finally:
                for opened in (store, of_backend, of_image):
                    opened.close()

    def _fold(self, mirrored: bool, store: PatchStore, backend: str = PYTORCH) -> SharedFold | None:
        if self.nmsw is None:
            return None
        key = mirrored, backend
        if key not in self._ensembles:  # another backend converts the networks, once for all cases
            self._ensembles[key] = Ensemble(
                self.nmsw.nmsw_network,
                self.nmsw.list_of_parameters,
                LabelEncoding.of(self.nmsw.label_manager),
                self.device,
                (self.nmsw.allowed_mirroring_axes or ()) if mirrored else (),
                backend=backend_named(backend, FLOAT32, self.device),
            )
        return SharedFold(self._ensembles[key].folds()[0], mirrored, store, self.costs)

    def _facts(self, case: ComparedCase, fold: SharedFold | None) -> CaseFacts:
        if fold is None or self.nmsw is None:
            return CaseFacts()
        devices = (self.device, torch.device("cpu"))
        make = partial(Oracle, partial(fold.patch, case.padded), fold.weights, case.reference_DHW, devices)
        return CaseFacts(case.seed, make)

    def _shared_positions(self, padded: Padded) -> list[Position]:
        """Of the windows that several methods look at."""
        if self.nmsw is None:
            return []
        grid = self.nmsw.nmsw_network.grid(spatial_shape(padded.volume_CDHW))
        positions = torch.cat([grid.starts_N3, placement_grid(grid).starts_N3])
        return list(map(tuple, positions.tolist()))

    def _preprocess(self, case: Case) -> ComparedCase:
        patch_size = self.configuration_manager.patch_size
        data, _, properties = self._run_preprocessor(case, None)
        padded = Padded.of(torch.from_numpy(np.asarray(data)), patch_size)
        reference_DHW = torch.zeros(0)
        if self.nmsw is not None:
            # Preprocessed apart, since nnU-Net's normalisation of an image looks at labels where it gets some.
            _, labels, _ = self._run_preprocessor(case, case.reference)
            # nnU-Net marks voxels outside of its crop with -1.
            reference_1DHW = torch.from_numpy(np.asarray(labels)[:1]).clamp_min(0)
            reference_DHW = Padded.of(reference_1DHW, patch_size).volume_CDHW[0]
        return ComparedCase(padded, properties, reference_DHW, zlib.crc32(case.name.encode()))

    def _run_preprocessor(self, case: Case, reference: str | None) -> tuple[Any, Any, dict[str, Any]]:
        preprocessor = self.configuration_manager.preprocessor_class(verbose=False)
        of_model = (self.plans_manager, self.configuration_manager, self.dataset_json)
        image, properties = read_images(self.sliding_window, list(case.images))
        labels = None if reference is None else read_labels(self.sliding_window, reference, image.shape[1:])
        preprocessed: tuple[Any, Any, dict[str, Any]]
        if is_stock(preprocessor):
            preprocessed = preprocessor.run_case_npy(image, labels, properties, *of_model)
        else:
            preprocessed = preprocessor.run_case(list(case.images), reference, *of_model)
        return preprocessed

    def _slide(self, method: Method, case: ComparedCase) -> Prediction:
        a, b, c = (slice(o, o + n) for o, n in zip(case.padded.offset, case.padded.inside, strict=True))
        self.sliding_window.tile_step_size = method.tile_step_size
        self.sliding_window.skips_background = method.skips_background
        logits = self.sliding_window.predict_logits_from_preprocessed_data(case.padded.volume_CDHW[:, a, b, c])
        looked_at = self.sliding_window.num_looked_at
        patches = self.sliding_window.num_windows(spatial_shape(case.padded.volume_CDHW))
        patches = patches if looked_at is None else looked_at
        macs = patches * self.costs.per_patch[method.mirrored]
        return Prediction(method, logits.cpu(), None, case.properties, patches, macs)

    def _select(
        self, method: Method, case: ComparedCase, folds: dict[str, SharedFold | None], facts: CaseFacts
    ) -> Prediction:
        fold, counted = folds[method.backend], folds[PYTORCH]  # no other backend's operations can be counted
        assert method.selection is not None
        assert self.nmsw is not None
        assert fold is not None
        assert counted is not None
        selector = WAYS[method.selection].selector(facts)
        # A way that decides itself may take as many as there are.
        spending = Spending(selector, method.num_patches or "all", self.threshold)
        model = dataclasses.replace(self.nmsw.case_model(), spending=spending)
        chosen = choose(fold, case.padded, spending)
        starts, patch_size = chosen.windows.starts_K3.tolist(), chosen.grid.patch_size
        logits_CDHW = segmentation = None
        if can_stream(self.configuration_manager):
            segmentation = model.labels_of(case.padded, [chosen], case.properties)
        else:
            logits_CDHW = model.logits_of(case.padded, [chosen])
        foreground_DHW = chosen.coarse.encoding.foreground(case.reference_DHW)
        covered_DHW = torch.zeros_like(foreground_DHW)
        for start in starts:
            covered_DHW[window_slices(start, patch_size)] = True
        foreground = int(foreground_DHW.sum())
        return Prediction(
            method,
            logits_CDHW,
            segmentation,
            case.properties,
            len(starts),
            len(starts) * self.costs.per_patch.get(method.mirrored, 0) + counted.coarse_macs,
            float((foreground_DHW & covered_DHW).sum()) / foreground if foreground else float("nan"),
            partial(self._shown, chosen, case),
        )

    def _shown(self, fold: FoldOfCase, case: ComparedCase) -> Shown:
        windows, properties, backward = (
            fold.in_volume(case.padded),
            case.properties,
            self.plans_manager.transpose_backward,
        )
        factor, offset = np.array(fold.grid.downsampling_factor), case.padded.offset
        cropped = np.array(properties["shape_after_cropping_and_before_resampling"], float)
        scale = np.array(windows.volume_shape) / cropped
        shift = np.array(offset) - np.array(properties["bbox_used_for_cropping"], float)[:, 0] * scale
        return Shown(
            edges_in_image(windows, properties, backward).tolist(),
            range(1, len(windows.starts) + 1),
            fold.coarse.score_map_dhw.float().cpu().numpy().transpose(backward).astype(np.float16),
            (scale / factor)[backward].tolist(),
            (shift / factor)[backward].tolist(),
        )
