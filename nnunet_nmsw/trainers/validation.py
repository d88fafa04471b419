"""The validation at the end of a training: the fold's cases predicted as `nmsw_predict` would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join, maybe_mkdir_p
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.inference.export_prediction import resample_and_save
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from torch.nn.parallel import DistributedDataParallel

from nnunet_nmsw.files import written_whole
from nnunet_nmsw.inference.automatic import FILE, STOP_AT, Measured, write_calibration
from nnunet_nmsw.inference.export import labels_of
from nnunet_nmsw.inference.interpolation import linear_axis
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.labels import LabelEncoding
from nnunet_nmsw.network import NMSWNetwork
from nnunet_nmsw.trainers.distributed import DistributedTrainer, gather_over_processes
from nnunet_nmsw.trainers.pretrained import AlreadyLoaded

CASES_BETWEEN_BARRIERS = 20
"""As in nnU-Net: a process that waits too long for the others fails, so all wait for each other every so many cases."""


class TrainerWithNMSWValidation(DistributedTrainer):
    """nnU-Net's trainer of an NMSW network, validated by NMSW inference."""

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the validation cases as `nmsw_predict` would and write `validation/summary.json`."""
        self.set_deep_supervision_enabled(False)
        network = self._plain_network()
        network.eval()
        next_stages = self.configuration_manager.next_stage_names
        predictor = (PredictorThatRemembers if next_stages else NMSWPredictor)(device=self.device, allow_tqdm=False)
        predictor.manual_initialization(
            network,
            self.plans_manager,
            self.configuration_manager,
            [network.state_dict()],
            self.dataset_json,
            type(self).__name__,
            self.inference_allowed_mirroring_axes,
        )
        output_folder = join(self.output_folder, "validation")
        maybe_mkdir_p(output_folder)
        _, keys = self.do_split()
        predictor.predict_from_data_iterator(
            self._validation_cases(keys, output_folder, predictor), save_probabilities, default_num_processes
        )
        calibrations = gather_over_processes(self._calibrate(predictor, self.own_share(keys)))
        if self.local_rank == 0:
            write_calibration(Path(output_folder, FILE), calibrations)
            labels = self.label_manager
            metrics = compute_metrics_on_folder(
                join(self.preprocessed_dataset_folder_base, "gt_segmentations"),
                output_folder,
                join(output_folder, "summary.json"),
                self.plans_manager.image_reader_writer_class(),
                self.dataset_json["file_ending"],
                labels.foreground_regions if labels.has_regions else labels.foreground_labels,
                labels.ignore_label,
                chill=True,
                num_processes=default_num_processes,
            )
            for label, of_label in metrics["mean"].items():
                self.logger.log_summary(f"final_val/class_{label}_dice", of_label["Dice"])
            self.logger.log_summary("final_val/foreground_dice", metrics["foreground_mean"]["Dice"])
            self.print_to_log_file("Mean Validation Dice: ", metrics["foreground_mean"]["Dice"])
        self.set_deep_supervision_enabled(self.enable_deep_supervision)

    @torch.inference_mode()
    def _calibrate(self, predictor: NMSWPredictor, keys: list[str]) -> Measured:
        """Measure on cases where -k auto may stop; see `inference.automatic`.

        At the spacing of training and without mirroring, so that all thresholds together cost no more than the
        validation itself.
        """
        encoding = LabelEncoding.of(self.label_manager)
        measured: Measured = {stop_at: [] for stop_at in STOP_AT}
        predictor.num_patches, predictor.use_mirroring = "auto", False
        for _, volume, segmentation, _ in self._preprocessed_cases(keys):
            labels_DHW = torch.from_numpy(np.asarray(segmentation[0], dtype=np.int64)).clamp_min(0)
            axes = [linear_axis(n, n) for n in volume.shape[1:]]
            for predictor.stop_at in STOP_AT:
                predictor.chosen_windows = []
                prediction = labels_of(predictor.decide(volume, axes), self.label_manager)
                dice_C = encoding.dice(labels_DHW, torch.from_numpy(prediction.astype(np.int64))).numpy()
                measured[predictor.stop_at].append((len(predictor.chosen_windows[0].starts), dice_C))
        return measured

    def _preprocessed_cases(self, keys: list[str]) -> Iterator[tuple[str, torch.Tensor, Any, dict[str, Any]]]:
        """Key, volume with the cascade's channels, segmentation as nnU-Net loads it, and properties of cases."""
        dataset = self.dataset_class(
            self.preprocessed_dataset_folder,
            keys,
            folder_with_segs_from_previous_stage=self.folder_with_segs_from_previous_stage,
        )
        for key in dataset.identifiers:
            data, segmentation, previous, properties = dataset.load_case(key)
            yield key, self._with_previous(np.array(data[:]), previous), segmentation, properties

    def _validation_cases(
        self, keys: list[str], output_folder: str, predictor: NMSWPredictor
    ) -> Iterator[dict[str, Any]]:
        cases_of_every_process = len(keys) // self.num_processes
        for number, (key, volume, _, properties) in enumerate(self._preprocessed_cases(self.own_share(keys)), 1):
            self.print_to_log_file(f"predicting {key}")
            if isinstance(predictor, PredictorThatRemembers):
                predictor.logits = None
            yield {"data": volume, "data_properties": properties, "ofile": join(output_folder, key)}
            # It is predicted by the time the next one is asked for, unless that has failed and been told.
            if isinstance(predictor, PredictorThatRemembers) and predictor.logits is not None:
                self._save_for_next_stages(key, predictor.logits, properties)
            if number % CASES_BETWEEN_BARRIERS == 0 and number <= cases_of_every_process:
                self.wait_for_all()

    def _with_previous(self, data: np.ndarray, previous: np.ndarray | None) -> torch.Tensor:
        """A preprocessed volume with a channel for each label of the cascade's previous stage, where there is one."""
        if previous is not None:
            labels = self.label_manager.foreground_labels
            data = np.vstack((data, convert_labelmap_to_one_hot(previous[:], labels, output_dtype=data.dtype)))
        return torch.from_numpy(data)

    def _save_for_next_stages(self, key: str, logits: torch.Tensor, properties: dict[str, Any]) -> None:
        """Write a validation case's prediction for the cascade's next stages, in their resolution."""
        for name in self.configuration_manager.next_stage_names or []:
            next_stage = self.plans_manager.get_configuration(name)
            folder = join(self.preprocessed_dataset_folder_base, next_stage.data_identifier)
            dataset_class = infer_dataset_class(folder)
            try:
                data, _, _, _ = dataset_class(folder, [key]).load_case(key)
            except FileNotFoundError:
                self.print_to_log_file(f"no prediction of {key} for {name}: preprocess that configuration first")
                continue
            with written_whole(Path(self.output_folder_base, "predicted_next_stage", name)) as unfinished:
                resample_and_save(
                    logits,
                    data.shape[1:],
                    str(unfinished / key),
                    self.plans_manager,
                    self.configuration_manager,
                    properties,
                    self.dataset_json,
                    default_num_processes,
                    dataset_class,
                )

    def _plain_network(self) -> NMSWNetwork:
        network = self.network.network if isinstance(self.network, AlreadyLoaded) else self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        assert isinstance(network, NMSWNetwork)
        return network


class PredictorThatRemembers(NMSWPredictor):
    """Keeps the logits of the last case, for the cascade's next stage."""

    logits: torch.Tensor | None = None
    keeps_logits = True

    def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        """See the parent."""
        logits: torch.Tensor = super().predict_logits_from_preprocessed_data(data).cpu()
        self.logits = logits
        return logits
