"""From images to labels in files, without volumes of logits between.

Tensor suffixes: 1 a batch of one, C channels or classes, D H W axes of the volume, d h w axes of the low-resolution
view, K chosen windows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from torch import Tensor
from tqdm import tqdm

from nnunet_nmsw.errors import Failures, UserError
from nnunet_nmsw.files import written_whole
from nnunet_nmsw.fusion import FusionWeights
from nnunet_nmsw.geometry import Shape, crop_windows
from nnunet_nmsw.inference.automatic import DEFAULT_MAX_DROP, stop_at_of_folds
from nnunet_nmsw.inference.bounded import BoundedPredictor
from nnunet_nmsw.inference.export import can_stream, in_image, resampling_axes, write_labels, write_logits
from nnunet_nmsw.inference.interpolation import Axis
from nnunet_nmsw.inference.logits import spatial_shape
from nnunet_nmsw.inference.preprocessing import Case, preprocessed_arrays, preprocessed_cases
from nnunet_nmsw.inference.streaming import FusedModel, FusedPrediction, planes_for, segment
from nnunet_nmsw.inference.windows import ChosenWindows, write_windows
from nnunet_nmsw.labels import LabelEncoding
from nnunet_nmsw.network import WindowChoice


class NMSWPredictor(BoundedPredictor):
    """Predicts with an NMSW model. Used as nnU-Net's predictor is, on files and on arrays.

    Args:
        num_patches: K, a number of patches, a percentage of the windows such as "10%", "all", or "auto": as many as
            have a predicted benefit, by the calibration of the model's validation; the model's setting where None.
        save_patches: write for every predicted file which windows were taken, into `patches/` beside it.
        use_global_branch: fuse with the coarse prediction. Without it and with all windows the result is nnU-Net's
            sliding window, bit for bit.
        max_drop: with "auto", how much Dice, of 1, may be lost for fewer patches.
        max_memory: bytes that this process may have on the host while it predicts files; see `inference.memory`.
        bfloat16: let the networks compute in it where the device is a CPU.
        trust_model: let checkpoints and plans run code, as nnU-Net does: see `nnunet_nmsw.checkpoint`.
        **kwargs: those of `nnUNetPredictor`. The step of the windows is the model's.
    """

    def __init__(
        self,
        num_patches: int | str | None = None,
        save_patches: bool = False,
        use_global_branch: bool = True,
        max_drop: float = DEFAULT_MAX_DROP,
        max_memory: int | None = None,
        bfloat16: bool = False,
        trust_model: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            max_memory,
            num_patches=num_patches,
            use_global_branch=use_global_branch,
            bfloat16=bfloat16,
            trust_model=trust_model,
            **kwargs,
        )
        self.save_patches = save_patches
        self.max_drop = max_drop
        self._num_cases: int | None = None

    keeps_logits = False
    """Build volumes of logits, whether or not they are needed for the labels."""

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Sequence[int | str] | None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """See the parent. With the number of patches "auto", reads the calibration of each fold.

        Raises:
            UserError: a fold has none.
        """
        super().initialize_from_trained_model_folder(model_training_output_dir, use_folds, checkpoint_name)
        if self.num_patches == "auto":
            self.stop_at = stop_at_of_folds(Path(model_training_output_dir), use_folds, self.max_drop)

    @torch.inference_mode()
    def predict_segmentation(self, data: Tensor, properties: dict[str, Any]) -> np.ndarray:
        """Labels of an image, without a volume of logits; see `inference.streaming`.

        Args:
            data: preprocessed volume, shape C, D, H, W.
            properties: nnU-Net's of it.

        Returns:
            Labels in the axis order and shape of nnU-Net's reader.
        """
        self._start_case(data)
        axes = resampling_axes(self.plans_manager, self.configuration_manager, properties, data.shape[1:])
        return in_image(self.decide(data, axes), self.plans_manager, self.label_manager, properties)

    @torch.inference_mode()
    def decide(self, data: Tensor, axes: list[Axis]) -> Tensor:
        """Labels of a preprocessed volume on another grid, see `streaming.segment`.

        Args:
            data: preprocessed volume, shape C, D, H, W.
            axes: to the grid.
        """
        network = self._ready_network()
        padded, unpad = pad_nd_image(data, network.patch_size, "constant", {"value": 0}, True)
        offset, grid = [axis.start for axis in unpad[1:]], network.grid(spatial_shape(padded))
        of_folds = []
        for parameters in self.list_of_parameters:
            self._load(parameters)
            coarse = self.predict_coarse(padded)
            windows = self.choose_windows(coarse, grid)
            self._remember(grid, windows, offset, spatial_shape(data))
            of_folds.append((parameters, coarse.logits_Cdhw, windows, network.fusion_weights))
        devices = [self.device, torch.device("cpu")] if self.perform_everything_on_device else [torch.device("cpu")]
        for device in devices:
            try:
                return self._segment(padded, of_folds, axes, offset, spatial_shape(data), device)
            except torch.OutOfMemoryError:
                if device.type == "cpu":
                    raise
                print("The results do not fit on the device; predicting again with results on the host")
                empty_cache(self.device)
        raise AssertionError

    def _segment(
        self,
        padded: Tensor,
        of_folds: list[tuple[Any, Tensor, WindowChoice, FusionWeights]],
        axes: list[Axis],
        offset: list[int],
        inside: Shape,
        device: torch.device,
    ) -> Tensor:
        network, share = self.nmsw_network, self.share
        total = sum(len(windows.starts_K3) for _, _, windows, _ in of_folds)
        with tqdm(total=total, desc="patches", disable=not self.allow_tqdm, leave=False) as bar:

            def windows_of(parameters: Any, starts_K3: Tensor) -> Tensor:
                self._load(parameters)
                logits_KCDHW = self._patch_logits(crop_windows(padded[None], starts_K3, network.patch_size))
                bar.update(len(starts_K3))
                return logits_KCDHW.to(device, torch.float16)

            models = [
                FusedModel(
                    logits_Cdhw.to(device),
                    windows.starts_K3,
                    windows.trust_K,
                    weights.to(device),
                    partial(windows_of, parameters),
                )
                for parameters, logits_Cdhw, windows, weights in of_folds
            ]
            prediction = FusedPrediction(
                models,
                network.patch_size,
                network.config.downsampling_factor,
                LabelEncoding.of(self.label_manager),
                share.patches_at_once,
                share.windows / len(models) if device.type == "cpu" else math.inf,
            )
            _, height, width = inside
            planes = planes_for(share.planes, self.label_manager.num_segmentation_heads, height, width)
            return segment(prediction, axes, offset, inside, planes)

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[Case],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
    ) -> list[Any]:
        """See the parent. Shows a progress bar over cases and writes the windows where `save_patches` asks for it.

        Labels are worked out without a volume of logits where neither probabilities nor the plans' way to resample need
        one. A case's files are written by threads while the next cases are predicted, each whole, the labels last. A
        case that fails is reported, and the others go on.

        Returns:
            For each case None where it was written; else its labels, with probabilities a pair.

        Raises:
            UserError: cases have failed; all others are there. Its attribute `results` is what would have been
                returned, with None for what failed.
        """
        reason_for_logits = self._reason_for_logits(save_probabilities)
        if reason_for_logits is not None and self.max_memory is not None:
            raise UserError(f"--max_memory cannot be kept with volumes of logits, and {reason_for_logits}")
        if reason_for_logits is not None:
            print(f"Logits of whole volumes are kept, which takes time and memory: {reason_for_logits}")
        by_logits = partial(self._logits_of_case, save_probabilities)
        predict = self._labels_of_case if reason_for_logits is None else by_logits
        num_writers = max(1, min(num_processes_segmentation_export, self.share.num_writers))
        failures = Failures()
        results: list[Any] = []
        writing: dict[Future[Any], str] = {}

        def collect(at_most: int) -> None:
            while len(writing) > at_most:
                done, _ = wait(writing, return_when=FIRST_COMPLETED)
                for job in done:
                    what, error = writing.pop(job), job.exception()
                    if isinstance(error, Exception):
                        failures.add(what, error)

        bar = tqdm(total=self._num_cases, desc="cases", disable=not self.allow_tqdm, position=1, leave=False)
        with bar, ThreadPoolExecutor(num_writers, "writing") as writers:
            for case in data_iterator:
                results.append(None)
                if "error" in case:
                    failures.add(case["what"], case["error"])
                    bar.update()
                    continue
                file = case["ofile"]
                try:
                    result, write = predict(case)
                    if file is None:
                        results[-1] = result()
                except Exception as error:  # noqa: BLE001 - `Failures` tells apart what is the case's fault
                    failures.add(f"cannot predict {file or 'an array'}", error)
                    empty_cache(self.device)
                    bar.update()
                    continue
                if file is not None:
                    windows = self.chosen_windows if self.save_patches else []
                    collect(num_writers - 1)  # results must not pile up before a slow disk
                    job = writers.submit(self._write_case, file, write, windows, case["data_properties"])
                    writing[job] = f"cannot write {file}{self.dataset_json['file_ending']}"
                del result, write  # which hold the labels or the logits
                bar.update()
            collect(0)
        compute_gaussian.cache_clear()
        empty_cache(self.device)
        failures.raise_any(results)
        return results

    def _labels_of_case(self, case: Case) -> tuple[Callable[[], Any], Callable[[Path, str], None]]:
        """Predict a case's labels; what gives them, and what writes them."""
        properties = case["data_properties"]
        segmentation = self.predict_segmentation(_loaded(case["data"]), properties)
        ending = self.dataset_json["file_ending"]

        def write(folder: Path, name: str) -> None:
            write_labels(segmentation, folder / (name + ending), self.plans_manager, properties)

        return lambda: segmentation, write

    def _logits_of_case(
        self, save_probabilities: bool, case: Case
    ) -> tuple[Callable[[], Any], Callable[[Path, str], None]]:
        """Predict a case's logits; what makes labels of them as nnU-Net does, and what writes these."""
        logits = self.predict_logits_from_preprocessed_data(_loaded(case["data"])).cpu()
        properties = case["data_properties"]

        def labels() -> Any:
            return convert_predicted_logits_to_segmentation_with_correct_shape(
                logits.numpy(),
                self.plans_manager,
                self.configuration_manager,
                self.label_manager,
                properties,
                save_probabilities,
                torch.get_num_threads(),
            )

        def write(folder: Path, name: str) -> None:
            of_model = (self.plans_manager, self.configuration_manager, self.dataset_json)
            write_logits(logits.numpy(), folder, name, *of_model, properties, save_probabilities)

        return labels, write

    def _write_case(
        self, file: str, write: Callable[[Path, str], None], windows: list[ChosenWindows], properties: dict[str, Any]
    ) -> None:
        """Write all files of a case, the labels last: where they are, a continued prediction leaves the case out."""
        path = Path(file)
        ending = self.dataset_json["file_ending"]
        with written_whole(path.parent, last=path.name + ending) as folder:
            write(folder, path.name)
            if windows:
                write_windows(folder / "patches", path.name, windows, properties, self.plans_manager, ending)

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | None = None,
    ) -> Any:
        """See the parent: one case after the other, without processes beside this."""
        return self.predict_from_files(
            list_of_lists_or_source_folder,
            output_folder_or_list_of_truncated_output_files,
            save_probabilities,
            overwrite,
            num_processes_preprocessing=0,
            num_processes_segmentation_export=1,
            folder_with_segs_from_prev_stage=folder_with_segs_from_prev_stage,
        )

    def _reason_for_logits(self, save_probabilities: bool) -> str | None:
        if save_probabilities:
            return "probabilities are asked for"
        if self.keeps_logits:
            return "the cascade's next stage needs them"
        if not self.use_global_branch:
            return "there is no global branch"
        if not can_stream(self.configuration_manager):
            function = self.configuration_manager.configuration["resampling_fn_probabilities"]
            return f"the plans resample probabilities with {function} and settings of their own"
        return None

    def _internal_get_data_iterator_from_lists_of_filenames(
        self,
        input_list_of_lists: list[list[str]],
        seg_from_prev_stage_files: list[str] | None,
        output_filenames_truncated: list[str] | None,
        num_processes: int,
    ) -> Any:
        self._num_cases = len(input_list_of_lists)
        num_threads = self.bound_memory(input_list_of_lists, num_processes)
        return self.preprocess(input_list_of_lists, seg_from_prev_stage_files, output_filenames_truncated, num_threads)

    def preprocess(
        self,
        images: list[list[str]],
        previous_stage: list[str] | None,
        outputs: list[str] | None,
        num_threads: int,
    ) -> Iterator[Case]:
        """Preprocessed cases for `predict_from_data_iterator`; see `preprocessed_cases`."""
        return preprocessed_cases(self, images, previous_stage, outputs, num_threads)

    def get_data_iterator_from_raw_npy_data(
        self,
        image_or_list_of_images: np.ndarray | list[np.ndarray],
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: np.ndarray | list[np.ndarray] | None,
        properties_or_list_of_properties: dict[str, Any] | list[dict[str, Any]],
        truncated_ofname: str | list[str] | None,
        num_processes: int = 3,
    ) -> Iterator[Case]:
        """See the parent. In threads: a script needs no guard against being run again by every process."""
        images, previous, properties, outputs = map(
            _as_list,
            (
                image_or_list_of_images,
                segs_from_prev_stage_or_list_of_segs_from_prev_stage,
                properties_or_list_of_properties,
                truncated_ofname,
            ),
        )
        self._num_cases = len(images)
        nothing: list[Any] = [None] * len(images)
        return self.preprocess_arrays(images, properties, previous or nothing, outputs or nothing, num_processes)

    def preprocess_arrays(
        self,
        images: list[np.ndarray],
        properties: list[dict[str, Any]],
        previous_stage: list[np.ndarray | None],
        outputs: list[str | None],
        num_threads: int,
    ) -> Iterator[Case]:
        """Preprocessed cases for `predict_from_data_iterator`; see `preprocessed_arrays`."""
        return preprocessed_arrays(self, images, properties, previous_stage, outputs, num_threads)


def _as_list(one_or_several: Any) -> list[Any]:
    """nnU-Net takes one, several or none of everything."""
    if one_or_several is None:
        return []
    return one_or_several if isinstance(one_or_several, list) else [one_or_several]


def _loaded(data: Tensor | str) -> Tensor:
    """A volume, which nnU-Net's iterators pass in a file where it is large."""
    if not isinstance(data, str):
        return data
    array = np.load(data)
    os.remove(data)
    return torch.from_numpy(array)
