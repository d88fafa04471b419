"""nnU-Net's predictor with the sliding window replaced by chosen windows: a face of `CaseModel` for nnU-Net's users.

Tensor suffixes: C channels or classes, D H W axes of the volume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from torch import Tensor
from torch._dynamo import OptimizedModule

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.flags import BFLOAT16, DEFAULT_MAX_DROP, FLOAT32, PYTORCH
from nnunet_nmsw.inference.case_model import CaseModel, OfModel, Segmented, WithLogits
from nnunet_nmsw.inference.cases import Case, Cases
from nnunet_nmsw.inference.export import labels_from_logits, reason_for_logits, write_labels, write_logits
from nnunet_nmsw.inference.files import FilesPredictor
from nnunet_nmsw.inference.memory import share_within
from nnunet_nmsw.inference.model_folder import folds_to_load, initialize, threshold_for
from nnunet_nmsw.inference.networks import Ensemble, Fold, unbounded
from nnunet_nmsw.inference.openvino_branches import backend_named
from nnunet_nmsw.inference.preprocessing import preprocessed_arrays, preprocessed_cases
from nnunet_nmsw.inference.volume import ChosenWindows, Networks, Share, Spending, Work
from nnunet_nmsw.inference.windows import write_windows
from nnunet_nmsw.inference.writing import Done, Writing, done_one_after_the_other
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.selection.budget import parse_num_patches
from nnunet_nmsw.selection.calibration import check_auto
from nnunet_nmsw.selection.interface import Selector
from nnunet_nmsw.volume.labels import LabelEncoding


class NMSWPredictor(FilesPredictor):
    """Predicts with an NMSW model. Used as nnU-Net's predictor is, on files and on arrays.

    nnU-Net's own predictor takes an NMSW model, too, and slides its window with the model's local branch.

    Args:
        num_patches: K, a number of patches, a percentage of the windows such as "10%", "all", or "auto": as many as
            have a predicted benefit, by the calibration of the model's validation; the model's setting where None.
        save_patches: write for every predicted file which windows were taken, into `patches/` beside it.
        max_drop: with "auto", how much Dice, of 1, may be lost for fewer patches.
        max_memory: bytes that this process may have on the host while it predicts files; see `inference.memory`.
        precision: "float32", "bfloat16" or "int8", what the networks compute in where the device is a CPU.
        backend: "pytorch", "openvino" on a CPU, or "auto": openvino on a CPU where it is installed.
        trust_model: let checkpoints and plans run code, as nnU-Net does: see `nnunet_nmsw.model.safe_loading`.
        selector: chooses windows; the model's own where None.
        threshold: with "auto", in the place of what `max_drop` and the calibration say.
        take_logits: is given each case that is written, and its logits C, D, H, W, which are built for that.
        **kwargs: those of `nnUNetPredictor`. `tile_step_size` and `use_gaussian` have no effect: 0.5, and yes.
    """

    network: Any

    def __init__(
        self,
        num_patches: int | str | None = None,
        save_patches: bool = False,
        max_drop: float = DEFAULT_MAX_DROP,
        max_memory: int | None = None,
        precision: str = FLOAT32,
        trust_model: bool = False,
        selector: Selector | None = None,
        threshold: float | None = None,
        take_logits: Callable[[Case, Tensor], None] | None = None,
        backend: str = PYTORCH,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_patches = None if num_patches is None else parse_num_patches(num_patches, "num_patches", auto=True)
        self.save_patches, self.max_drop, self.max_memory = save_patches, max_drop, max_memory
        self.backend = backend_named(backend, precision, self.device)
        self.bfloat16 = precision == BFLOAT16
        self.selector, self.threshold, self.trust_model = selector, threshold, trust_model
        self.take_logits, self._given_threshold = take_logits, threshold
        self._bounds: tuple[set[str], Share] | None = None
        self._folds_of_run: list[Fold] | None = None

    @property
    def nmsw_network(self) -> NMSWNetwork:
        """The network.

        Raises:
            UserError: the model was not trained with an NMSW trainer.
        """
        if not isinstance(self.network, NMSWNetwork):
            raise UserError(
                f"the model was trained with {self.trainer_name}, which is no NMSW trainer: "
                "predict with nnUNetv2_predict, or train with -tr nnUNetTrainerNMSW"
            )
        return self.network

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Sequence[int | str] | None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """See the parent. Code that comes with the model does not run, unless `trust_model` allows it.

        Raises:
            UserError: the model cannot be loaded, is not to be trusted, or lacks what "auto" or "int8" need.
        """
        folder = Path(model_training_output_dir)
        folds = folds_to_load(folder, use_folds, checkpoint_name)
        load = super().initialize_from_trained_model_folder
        calibrations = initialize(load, self, folder, folds, checkpoint_name, self.trust_model)
        self._compile_branches()
        if self.backend is not None:
            self.backend = self.backend.of_folder(folder, folds, self.list_of_parameters)
        if self._given_threshold is None:
            check_auto(self.num_patches, self.network)
            own = getattr(self.network, "num_patches", None)  # which a stock network does not have
            self.threshold = threshold_for(self.num_patches, own, calibrations, self.max_drop)

    def manual_initialization(self, *args: Any, **kwargs: Any) -> None:
        """See the parent."""
        super().manual_initialization(*args, **kwargs)
        self._compile_branches()

    def _compile_branches(self) -> None:
        """Compile the branches where nnU-Net has wrapped the network to be compiled as a whole."""
        if isinstance(self.network, OptimizedModule) and isinstance(self.network._orig_mod, NMSWNetwork):
            self.network = self.network._orig_mod
            self.network.compile_branches()

    @property
    def spending(self) -> Spending:
        """What may be spent on a case, by this predictor's arguments and the model's settings."""
        num_patches = self.nmsw_network.num_patches if self.num_patches is None else self.num_patches
        return Spending(self.selector or self.nmsw_network.sampler.at_inference, num_patches, self.threshold)

    @property
    def of_model(self) -> OfModel:
        """What exports want to know of the model."""
        return OfModel(self.plans_manager, self.configuration_manager, self.dataset_json)

    def folds(self, parameters: Sequence[dict[str, Any]] | None = None) -> list[Fold]:
        """The networks of the ensemble, made once for a run over cases; or of other weights."""
        if parameters is None and self._folds_of_run:
            return self._folds_of_run
        folds = Ensemble(
            self.nmsw_network,
            self.list_of_parameters if parameters is None else parameters,
            LabelEncoding.of(self.label_manager),
            self.device,
            (self.allowed_mirroring_axes or ()) if self.use_mirroring else (),
            self.bfloat16,
            self.backend,
        ).folds()
        if parameters is None and self._folds_of_run is not None:
            self._folds_of_run = folds
        return folds

    def keep_folds(self) -> None:
        """Make the networks of `folds` once from now on, and not for each case."""
        self._folds_of_run = []

    def networks_of(self, case: Case) -> Sequence[Networks]:
        """The networks that predict a case, one entry a fold."""
        return self.folds()

    def case_model(self, networks_of: Callable[[Case], Sequence[Networks]] | None = None) -> CaseModel:
        """The loaded model, or other networks in its place, with this predictor's arguments."""
        device = self.device if self.perform_everything_on_device else torch.device("cpu")
        work = Work(self.share, device, self.allow_tqdm)
        patch_size = self.nmsw_network.patch_size
        return CaseModel(networks_of or self.networks_of, patch_size, self.spending, work, self.of_model)

    def predict_case(self, case: Case) -> Segmented:
        """Labels of a preprocessed case, and the windows that were taken; see `CaseModel.labels`."""
        return self.case_model().labels(case)

    def predict_case_logits(self, case: Case) -> WithLogits:
        """Logits of a preprocessed case, and the windows that were taken; see `CaseModel.logits`."""
        return self.case_model().logits(case)

    def predict_segmentation(self, data: Tensor, properties: dict[str, Any]) -> np.ndarray:
        """Labels of an image in the axis order and shape of nnU-Net's reader.

        Args:
            data: preprocessed volume, shape C, D, H, W.
            properties: nnU-Net's of it.
        """
        return self.predict_case({"data": data, "data_properties": properties}).segmentation

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """Logits of a preprocessed volume, averaged over the folds of the ensemble: float16, shape C, D, H, W."""
        return self.predict_case_logits({"data": data}).logits_CDHW

    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """Logits of a preprocessed volume by the weights that are in the network: float16, shape C, D, H, W."""
        of_weights = self.case_model(lambda _: self.folds([self.nmsw_network.state_dict()]))
        return of_weights.logits({"data": input_image}).logits_CDHW

    @property
    def share(self) -> Share:
        """What may go on at a time."""
        return self._bounds[1] if self._bounds is not None else unbounded(self.nmsw_network.patch_size, self.device)

    def bound_memory(self, cases: list[list[str]], num_preprocessing: int) -> int:
        """Keep within `max_memory` with these cases from now on. Predicts a patch to see what that takes.

        Args:
            cases: files by case and channel.
            num_preprocessing: cases to preprocess beside the prediction, if memory allows.

        Returns:
            How many it allows.

        Raises:
            UserError: it is too small for one of the cases.
        """
        if self.max_memory is None:
            return num_preprocessing
        images = {files[0] for files in cases}
        if self._bounds is None or not images <= self._bounds[0]:
            wanted = unbounded(self.nmsw_network.patch_size, self.device, num_preprocessing)
            self._bounds = images, share_within(self.max_memory, cases, self, self.folds()[0], wanted)
            if self.verbose:
                print(f"within --max_memory: {self._bounds[1]}")
        return self._bounds[1].num_preprocessing

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[Case],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
    ) -> list[Any]:
        """See the parent. Writes the windows where `save_patches` asks for it.

        Labels are worked out without a volume of logits where neither probabilities nor the plans' way to resample need
        one. A case that fails is reported, and the others go on; see `done_one_after_the_other`. Returns for each case
        None where it was written; else its labels, with probabilities a pair.

        Raises:
            UserError: cases have failed. Its attribute `results` is what would have been returned, None for these.
        """
        why = reason_for_logits(self.configuration_manager, save_probabilities, self.take_logits is not None)
        if why is not None and self.max_memory is not None:
            raise UserError(f"--max_memory cannot be kept with volumes of logits, and {why}")
        if why is not None:
            print(f"Logits of whole volumes are kept, which takes time and memory: {why}")
        predict = self._by_labels if why is None else partial(self._by_logits, save_probabilities)
        num_writers = max(1, min(num_processes_segmentation_export, self.share.num_writers))
        free = partial(empty_cache, self.device)  # after a failure, for the next case
        writing = Writing(self.dataset_json["file_ending"], num_writers, self.allow_tqdm)
        self._folds_of_run = []
        try:
            return done_one_after_the_other(data_iterator, self.timed(predict), free, writing)
        finally:
            self._folds_of_run = None
            compute_gaussian.cache_clear()
            free()

    def _by_labels(self, case: Case) -> Done:
        segmentation, windows = self.predict_case(case)

        def write(folder: Path, name: str) -> None:
            file = folder / (name + self.dataset_json["file_ending"])
            write_labels(segmentation, file, self.plans_manager, case["data_properties"])
            self._write_windows(folder, name, windows, case["data_properties"])

        return Done(lambda: segmentation, write)

    def _by_logits(self, save_probabilities: bool, case: Case) -> Done:
        logits_CDHW, windows = self.predict_case_logits(case)
        properties = case["data_properties"]

        def write(folder: Path, name: str) -> None:
            write_logits(logits_CDHW.numpy(), folder, name, *self.of_model, properties, save_probabilities)
            self._write_windows(folder, name, windows, properties)

        labels = partial(labels_from_logits, logits_CDHW.numpy(), *self.of_model, properties, save_probabilities)
        then = None if self.take_logits is None else partial(self.take_logits, case, logits_CDHW)
        return Done(labels, write, then)

    def _write_windows(self, folder: Path, name: str, windows: list[ChosenWindows], properties: dict[str, Any]) -> None:
        if self.save_patches:
            ending = self.dataset_json["file_ending"]
            write_windows(folder / "patches", name, windows, properties, self.plans_manager, ending)

    def preprocess(self, images: Any, previous_stage: Any, outputs: Any, num_threads: int) -> Cases:
        """Preprocessed cases for `predict_from_data_iterator`, of files; see `preprocessed_cases`."""
        return preprocessed_cases(self, images, previous_stage, outputs, num_threads)

    def preprocess_arrays(
        self, images: Any, properties: Any, previous_stage: Any, outputs: Any, num_threads: int
    ) -> Cases:
        """Preprocessed cases for `predict_from_data_iterator`, of arrays; see `preprocessed_arrays`."""
        return preprocessed_arrays(self, images, properties, previous_stage, outputs, num_threads)
