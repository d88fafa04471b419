"""Predicting files as nnU-Net does, with every file written whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import write_json


class FilesPredictor(nnUNetPredictor):
    """nnU-Net's predictor, whose own files beside the predictions are written whole or not at all."""

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
        images, files, previous_stage = self._manage_input_and_output_lists(
            list_of_lists_or_source_folder,
            outputs,
            folder_with_segs_from_prev_stage,
            overwrite,
            part_id,
            num_parts,
            save_probabilities,
        )
        if not images:
            return None
        cases = self._internal_get_data_iterator_from_lists_of_filenames(
            images, previous_stage, files, num_processes_preprocessing
        )
        return self.predict_from_data_iterator(cases, save_probabilities, num_processes_segmentation_export)
