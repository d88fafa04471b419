"""A coarse stock model of many classes and fine stock models, each with some of these classes, predict together.

Tensor suffixes: C channels of the coarse model's logits, d h w axes of its volume, F channels of a fine model's fusion,
Z Y X axes of the cropped image.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.helpers import empty_cache
from torch import Tensor, nn

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.flags import FLOAT32, PYTORCH
from nnunet_nmsw.inference.case_model import Segmented
from nnunet_nmsw.inference.cases import Case, Cases, in_order
from nnunet_nmsw.inference.claims import FinePrediction, Merged, claims_of, without_windows
from nnunet_nmsw.inference.export import in_image, resampling_axes, write_labels
from nnunet_nmsw.inference.files import FilesPredictor
from nnunet_nmsw.inference.fine_model import FineModelPredictor, ModelDocuments, on_low_grid
from nnunet_nmsw.inference.model_folder import folds_to_load, initialize
from nnunet_nmsw.inference.networks import unbounded
from nnunet_nmsw.inference.openvino_branches import backend_named
from nnunet_nmsw.inference.planes import planes_for
from nnunet_nmsw.inference.preprocessing import preprocessed_array
from nnunet_nmsw.inference.set_calibration import SetCalibration, read_calibration
from nnunet_nmsw.inference.set_cases import AS_READ, COARSE_LOGITS, case_from_array, case_from_files
from nnunet_nmsw.inference.set_members import (
    FineModel,
    MatchedPatches,
    ModelFolder,
    check_folders,
    digest_of_folds,
    unmatched,
)
from nnunet_nmsw.inference.two_models import give_backend
from nnunet_nmsw.inference.volume import (
    FoldOfCase,
    Padded,
    Spending,
    Work,
    fused_prediction,
    patches_bar,
    where_it_fits,
)
from nnunet_nmsw.inference.windows import write_windows
from nnunet_nmsw.inference.writing import Done, Writing, done_one_after_the_other
from nnunet_nmsw.selection.budget import parse_num_patches
from nnunet_nmsw.selection.by_score import GREEDY_BY_ENTROPY
from nnunet_nmsw.selection.explore import body_of, explored
from nnunet_nmsw.selection.of_present import OfPresentClasses
from nnunet_nmsw.volume.labels import LabelEncoding


class ModelSetPredictor(FilesPredictor):
    """nnU-Net's predictor of a coarse model, whose labels fine models make better where their classes are.

    Classes are matched by name, and the result has the coarse model's numbers. Each fine model gets windows where the
    coarse prediction sees its classes, greedily where it is unsure of them. Models are loaded one after the other. See
    `inference.claims` for who decides where windows of several models lie.

    Args:
        fine_models: their folders.
        num_patches: K, patches of each fine model for a case: a number, a percentage of its windows, "all": every
            window in which the coarse prediction sees one of its classes, or with a calibration "auto". Where None,
            "auto" with a calibration, else 10%.
        explore: further windows of each fine model for a case, over the part of the body where it has none: a guard
            against objects that the coarse model misses.
        calibration: file of a calibration of these very models, see `set_calibration`.
        save_patches: write for every predicted file which windows were taken, into `patches/` beside it.
        precision: see `NMSWPredictor`; of the fine models, and with OpenVINO of all.
        backend: see `NMSWPredictor`; of all models.
        trust_model: see `NMSWPredictor`; of all models.
        **kwargs: those of `nnUNetPredictor`, of all models.
    """

    def __init__(
        self,
        fine_models: Sequence[ModelFolder],
        num_patches: int | str | None = None,
        explore: int = 0,
        calibration: Path | None = None,
        save_patches: bool = False,
        precision: str = FLOAT32,
        backend: str = PYTORCH,
        trust_model: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.folders, self.save_patches, self.trust_model = tuple(fine_models), save_patches, trust_model
        self.explore, self._calibration_file = explore, calibration
        self.num_patches = "auto" if num_patches is None else parse_num_patches(num_patches, "num_patches", auto=True)
        if num_patches == "auto" and calibration is None:
            raise UserError('num_patches "auto" needs a calibration of the set: make one with --calibrate')
        self.calibration = SetCalibration({}, None)
        of_fine = {**kwargs, "precision": precision, "backend": backend, "trust_model": trust_model}
        with contextlib.redirect_stdout(None):  # nnU-Net says of each predictor on a CPU that it is none on a GPU
            self._fine_predictors = [
                FineModelPredictor(lambda: self.configuration_manager.spacing, **of_fine) for _ in fine_models
            ]
        self._backend = backend_named(backend, precision, self.device)
        self.fine_models: list[FineModel] = []
        self.checkpoint = ""

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Sequence[int | str] | None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """Load the coarse model, and see that the fine models fit it; see the parent.

        Raises:
            UserError: a model cannot be loaded, is not to be trusted, is no stock 3D model, or does not fit.
        """
        folder, self.checkpoint = Path(model_training_output_dir), checkpoint_name
        folds = folds_to_load(folder, use_folds, checkpoint_name)
        check_folders(folder, [fine.path for fine in self.folders])
        load = super().initialize_from_trained_model_folder
        initialize(load, self, folder, folds, checkpoint_name, self.trust_model)
        coarse = ModelDocuments.of(f"--global_model {folder}", self)
        coarse.check()
        give_backend(self, self._backend)
        known = checkpoint_name, self.trust_model, self.device
        self.fine_models = [FineModel.of(fine, coarse, *known) for fine in self.folders]
        for line in unmatched(coarse, self.fine_models):
            print(line)
        if self._calibration_file is not None:
            self.calibration = read_calibration(self._calibration_file, self.digest, self.fine_models)

    @property
    def digest(self) -> str:
        """Says which coarse model it is, by its weights."""
        return digest_of_folds(self.list_of_parameters)

    def preprocess(self, images: Any, previous_stage: Any, outputs: Any, num_threads: int) -> Cases:
        """See the parent."""
        files: list[Any] = outputs if outputs is not None else [None] * len(images)
        jobs = [
            partial(case_from_files, self, channels, output) for channels, output in zip(images, files, strict=True)
        ]
        return in_order(jobs, num_threads)

    def preprocess_arrays(
        self, images: Any, properties: Any, previous_stage: Any, outputs: Any, num_threads: int
    ) -> Cases:
        """See the parent."""
        of_cases = zip(images, properties, outputs, strict=True)
        return in_order([partial(case_from_array, self, *of_case) for of_case in of_cases], num_threads)

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[Case],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
    ) -> list[Any]:
        """See the parent. A case that fails is reported, and the others go on; see `done_one_after_the_other`.

        Raises:
            UserError: cases have failed, or probabilities are asked for, which a set does not have.
        """
        if save_probabilities:
            raise UserError("a set of models gives labels alone: leave out --save_probabilities")
        writers = max(1, num_processes_segmentation_export)
        writing = Writing(self.dataset_json["file_ending"], writers, self.allow_tqdm)
        emptied = partial(empty_cache, self.device)
        return done_one_after_the_other(data_iterator, self.timed(self._done), emptied, writing)

    def predict_case(self, case: Case) -> Segmented:
        """Labels of a case's image with the coarse model's numbers, and the windows of each fine model.

        Args:
            case: of `preprocess` or `preprocess_arrays`.
        """
        return self.predict_in_windows(case, self.chosen)

    @torch.inference_mode()
    def predict_in_windows(self, case: Case, choose: Callable[[Case, Tensor], list[FoldOfCase]]) -> Segmented:
        """The same with windows that are chosen otherwise.

        Args:
            case: of `preprocess` or `preprocess_arrays`.
            choose: as `chosen` does.
        """
        return where_it_fits(partial(self._segmented, case, self.coarse_logits(case), choose), self.work)

    def _segmented(
        self, case: Case, logits_Cdhw: Tensor, choose: Callable[[Case, Tensor], list[FoldOfCase]], work: Work
    ) -> Segmented:
        logits_Cdhw, properties = logits_Cdhw.to(work.device), case["data_properties"]
        chosen = choose(case, logits_Cdhw)
        classes = [model.labels.coarse for model in self.fine_models]
        merged = Merged(properties["shape_after_cropping_and_before_resampling"], classes)
        for number, fine in self.fine_predictions(case, chosen, work):
            for claims in claims_of(fine):
                merged.add(number, claims)
            del fine  # holds the network, beside which the next one would be loaded
        windows = [
            fold.in_volume(model.empty_volume(properties)) for model, fold in zip(self.fine_models, chosen, strict=True)
        ]
        del chosen  # which holds as much as the coarse logits
        labels_ZYX = self._labels(logits_Cdhw, merged, properties)
        return Segmented(in_image(labels_ZYX, self.plans_manager, self.label_manager, properties), windows)

    @property
    def work(self) -> Work:
        """How volumes are worked through."""
        device = self.device if self.perform_everything_on_device else torch.device("cpu")
        patch_size = [model.patch_size for model in self.fine_models]
        return Work(unbounded(max(patch_size, key=math.prod), self.device), device, self.allow_tqdm)

    def coarse_logits(self, case: Case) -> Tensor:
        """The coarse model's logits, float32 in voxels of its own, on the host."""
        if COARSE_LOGITS in case:
            return case[COARSE_LOGITS].float()
        return self.predict_logits_from_preprocessed_data(case["data"]).float()

    def chosen(self, case: Case, logits_Cdhw: Tensor) -> list[FoldOfCase]:
        """The windows of each fine model, whose networks are not loaded yet.

        Args:
            case: preprocessed.
            logits_Cdhw: of `coarse_logits`.
        """
        body_1dhw = body_of(case["data"][0])[None].to(logits_Cdhw.device) if self.explore else None
        properties, chosen = case["data_properties"], []
        spending = Spending(OfPresentClasses(GREEDY_BY_ENTROPY), self.num_patches, self.calibration.threshold)
        for model in self.fine_models:
            fold = model.choose(logits_Cdhw, properties, spending, self.calibration.weights_of(model))
            if body_1dhw is not None:
                body_dhw = on_low_grid(body_1dhw, model.empty_volume(properties), model.factor)[0]
                fold = fold._replace(windows=explored(fold.windows, body_dhw, fold.grid, self.explore))
            chosen.append(fold)
        return chosen

    def fine_predictions(
        self, case: Case, chosen: Sequence[FoldOfCase], work: Work
    ) -> Iterator[tuple[int, FinePrediction]]:
        """The predictions of the models that have windows, with the models' numbers; one is loaded at a time.

        Args:
            case: preprocessed.
            chosen: of `chosen`.
            work: how volumes are worked through.
        """
        needed = [number for number, fold in enumerate(chosen) if len(fold.windows.starts_K3)]
        # Models that see the image in the same way one after the other: it is resampled once for them.
        needed.sort(key=lambda number: self.fine_models[number].preprocessing)
        groups = [list(g) for _, g in groupby(needed, key=lambda number: self.fine_models[number].preprocessing)]
        image, as_read = case[AS_READ]
        jobs = [partial(preprocessed_array, self.fine_models[g[0]], image, as_read, None, None) for g in groups]
        for group, seen in zip(groups, in_order(jobs, 1), strict=True):
            if "error" in seen:
                raise seen["error"]
            for number in group:
                yield from self._predicted(number, chosen[number], seen, work)

    def _predicted(
        self, number: int, chosen: FoldOfCase, seen: Case, work: Work
    ) -> Iterator[tuple[int, FinePrediction]]:
        model, predictor = self.fine_models[number], self._fine_predictors[number]
        padded = Padded.of(seen["data"], model.patch_size).on(work.device)
        try:
            predictor.initialize_from_trained_model_folder(str(model.folder.path), model.folder.folds, self.checkpoint)
            folds = [chosen._replace(networks=MatchedPatches(fold, model.labels)) for fold in predictor.folds()]
            of_plans = model.plans_manager, model.configuration_manager, seen["data_properties"]
            axes = resampling_axes(*of_plans, padded.inside)
            planes = planes_for(work.share.planes, model.labels.num_channels, *padded.inside[1:])
            with patches_bar(folds, work) as bar:
                prediction = fused_prediction(padded, folds, work, bar)
                yield number, FinePrediction(prediction, model.labels, chosen.windows.starts_K3, axes, padded, planes)
        finally:  # before the next one is loaded
            predictor.network, predictor.list_of_parameters = nn.Identity(), []

    def _labels(self, logits_Cdhw: Tensor, merged: Merged, properties: dict[str, Any]) -> Tensor:
        """Labels of the cropped image."""
        num_channels, d, h, w = logits_Cdhw.shape
        coarse = without_windows(logits_Cdhw, LabelEncoding.of(self.label_manager))
        axes = resampling_axes(self.plans_manager, self.configuration_manager, properties, (d, h, w))
        return merged.labels(coarse, axes, planes_for(self.work.share.planes, num_channels, h, w))

    def _done(self, case: Case) -> Done:
        segmentation, windows = self.predict_case(case)
        properties, ending = case["data_properties"], self.dataset_json["file_ending"]

        def write(folder: Path, name: str) -> None:
            write_labels(segmentation, folder / (name + ending), self.plans_manager, properties)
            if self.save_patches:
                write_windows(folder / "patches", name, windows, properties, self.plans_manager, ending)

        return Done(lambda: segmentation, write)
