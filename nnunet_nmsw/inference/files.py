"""Predicting files and arrays as nnU-Net does, with every file written whole."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import write_json
from nnunet_nmsw.inference.cases import Case, Cases
from nnunet_nmsw.inference.export import ending_in, endings_of_one_image
from nnunet_nmsw.inference.writing import Done
from nnunet_nmsw.nnunet.predictor import PredictorHooks


class FilesPredictor(PredictorHooks):
    """nnU-Net's predictor, whose own files beside the predictions are written whole or not at all."""

    dataset_json: dict[str, Any]
    trust_model: bool = False
    """Let checkpoints and plans run code, as nnU-Net does: see `nnunet_nmsw.model.safe_loading`."""
    network_seconds: float = 0.0
    """What the last case took from its preprocessed volume to labels of the image, or to logits."""

    def predict_from_files(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = default_num_processes,
        num_processes_segmentation_export: int = default_num_processes,
        folder_with_segs_from_prev_stage: str | None = None,
        num_parts: int = 1,
        part_id: int = 0,
    ) -> Any:
        """See the parent.

        Raises:
            OSError: nothing can be written into the output folder.
            UserError: the cascade's previous stage is missing; or cases have failed, and all others are there.
        """
        previous = self.configuration_manager.previous_stage_name
        if previous is not None and folder_with_segs_from_prev_stage is None:
            raise UserError(f"the cascade needs the predictions of {previous}: give folder_with_segs_from_prev_stage")
        outputs = output_folder_or_list_of_truncated_output_files
        if outputs:
            folder = Path(outputs if isinstance(outputs, str) else os.path.dirname(outputs[0]))
            arguments = {
                "list_of_lists_or_source_folder": list_of_lists_or_source_folder,
                "output_folder_or_list_of_truncated_output_files": outputs,
                "save_probabilities": save_probabilities,
                "overwrite": overwrite,
                "num_processes_preprocessing": num_processes_preprocessing,
                "num_processes_segmentation_export": num_processes_segmentation_export,
                "folder_with_segs_from_prev_stage": folder_with_segs_from_prev_stage,
                "num_parts": num_parts,
                "part_id": part_id,
            }
            recursive_fix_for_json_export(arguments)
            write_json(folder / "predict_from_raw_data_args.json", arguments)
            # nnU-Net's tools want these beside predictions.
            write_json(folder / "dataset.json", self.dataset_json)
            write_json(folder / "plans.json", self.plans_manager.plans)
        images, files, previous_stage = self.input_and_output(
            list_of_lists_or_source_folder,
            outputs,
            folder_with_segs_from_prev_stage,
            overwrite,
            (part_id, num_parts),
            save_probabilities,
        )
        if not images:
            return None
        cases = self.cases_from_files(images, previous_stage, files, num_processes_preprocessing)
        return self.predict_from_data_iterator(cases, save_probabilities, num_processes_segmentation_export)

    def predict_file(
        self,
        images: str | Sequence[str],
        output: str,
        save_probabilities: bool = False,
        previous_stage: str | None = None,
    ) -> None:
        """Predict one image and write its labels, and nothing else beside them.

        Args:
            images: file of the image; several by channel. Of any name, with an ending that the model's reader knows.
            output: the file to be written, with such an ending.
            save_probabilities: write these, too, under the same name.
            previous_stage: for the cascade, the file of its labels.

        Raises:
            OSError: nothing can be written there.
            UserError: the image cannot be read or predicted, or the output has no ending that can be written.
        """
        files, known = [images] if isinstance(images, str) else list(images), endings_of_one_image(self.plans_manager)
        ending = ending_in(output, known)
        if ending is None:
            raise UserError(f"cannot write {output}: give a file that ends in {' or '.join(known)}")
        dataset, name = self.dataset_json, output.removesuffix(ending)
        self.bound_memory([files], 0)
        os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
        self.dataset_json = {**dataset, "file_ending": ending}
        try:
            cases = self.preprocess([files], None if previous_stage is None else [previous_stage], [name], 0)
            self.predict_from_data_iterator(cases, save_probabilities, 1)
        finally:
            self.dataset_json = dataset

    def timed(self, predict: Callable[[Case], Done]) -> Callable[[Case], Done]:
        """The same with `network_seconds`. What it returns is on the host, so that the device is done."""

        def predict_timed(case: Case) -> Done:
            start = time.perf_counter()
            done = predict(case)
            self.network_seconds = time.perf_counter() - start
            return done

        return predict_timed

    def bound_memory(self, cases: list[list[str]], num_preprocessing: int) -> int:
        """How many cases may be preprocessed beside the prediction, of those that are wanted; here all.

        Args:
            cases: files by case and channel.
            num_preprocessing: cases to preprocess beside the prediction, if memory allows.
        """
        return num_preprocessing

    def cases_from_files(self, images: Any, previous_stage: Any, outputs: Any, num_processes: int) -> Any:
        """See the parent."""
        return self.preprocess(images, previous_stage, outputs, self.bound_memory(images, num_processes))

    def preprocess(self, images: Any, previous_stage: Any, outputs: Any, num_threads: int) -> Cases:
        """Preprocessed cases for `predict_from_data_iterator`, of files; arguments as in `cases_from_files`."""
        raise NotImplementedError

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | None = None,
    ) -> Any:
        """See the parent: one case after the other, without threads that preprocess beside this."""
        return self.predict_from_files(
            list_of_lists_or_source_folder,
            output_folder_or_list_of_truncated_output_files,
            save_probabilities,
            overwrite,
            num_processes_preprocessing=0,
            num_processes_segmentation_export=1,
            folder_with_segs_from_prev_stage=folder_with_segs_from_prev_stage,
        )

    def preprocess_arrays(
        self,
        images: list[np.ndarray],
        properties: list[dict[str, Any]],
        previous_stage: list[np.ndarray | None],
        outputs: list[str | None],
        num_threads: int,
    ) -> Any:
        """Preprocessed cases for `predict_from_data_iterator`, of arrays.

        Args:
            images: shape C, Z, Y, X.
            properties: nnU-Net's.
            previous_stage: of the cascade, labels of shape 1, Z, Y, X.
            outputs: files to be written, without ending.
            num_threads: that work.
        """
        raise NotImplementedError

    def get_data_iterator_from_raw_npy_data(
        self,
        image_or_list_of_images: np.ndarray | list[np.ndarray],
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: np.ndarray | list[np.ndarray] | None,
        properties_or_list_of_properties: dict[str, Any] | list[dict[str, Any]],
        truncated_ofname: str | list[str] | None,
        num_processes: int = 3,
    ) -> Any:
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
        nothing: list[Any] = [None] * len(images)
        return self.preprocess_arrays(images, properties, previous or nothing, outputs or nothing, num_processes)

    def predict_single_npy_array(
        self,
        input_image: np.ndarray,
        image_properties: dict[str, Any],
        segmentation_previous_stage: np.ndarray | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,
    ) -> Any:
        """See the parent."""
        cases = self.get_data_iterator_from_raw_npy_data(
            input_image, segmentation_previous_stage, image_properties, output_file_truncated, 0
        )
        (result,) = self.predict_from_data_iterator(cases, save_or_return_probabilities, 1)
        return result


def _as_list(one_or_several: Any) -> list[Any]:
    """nnU-Net takes one, several or none of everything."""
    if one_or_several is None:
        return []
    return one_or_several if isinstance(one_or_several, list) else [one_or_several]
