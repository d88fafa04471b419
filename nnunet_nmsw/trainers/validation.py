"""Validation: of the epochs of a training, and of its end, where cases are predicted as `nmsw_predict` would.

Tensor suffixes: C channels or classes, D H W axes of the volume, K windows, 3 one coordinate per axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.inference.export_prediction import resample_and_save
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import write_json, written_whole
from nnunet_nmsw.flags import DEFAULT_MAX_DROP
from nnunet_nmsw.inference.cases import Case
from nnunet_nmsw.inference.networks import Ensemble, filled_up, unbounded
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.volume import (
    FoldOfCase,
    Padded,
    Spending,
    Work,
    choose,
    predict_labels,
    spatial_shape,
    where_it_fits,
)
from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.selection.calibration import FILE, THRESHOLDS, Measured, calibration_of, threshold_of
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.trainers.cases import PreprocessedCase, read_cases
from nnunet_nmsw.trainers.checkpoints import keep_calibration
from nnunet_nmsw.trainers.distributed import Processes, gather_over_processes
from nnunet_nmsw.trainers.step import TrainingStep, finest_scale
from nnunet_nmsw.volume.interpolation import linear_axis
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.precision import mixed_precision
from nnunet_nmsw.volume.windows import Shape, WindowGrid

CASES_BETWEEN_BARRIERS = 20
"""As in nnU-Net: a process that waits too long for the others fails, so all wait for each other every so many cases."""


def check_losses(losses: Sequence[float], network: NMSWNetwork, epoch: int) -> None:
    """See that a training can go on after an epoch.

    Raises:
        UserError: a weight is no number, or no step of the epoch had a finite loss.
    """
    finite = np.isfinite(losses)
    if not finite.all():
        check_weights(network, epoch)
    if not finite.any():
        raise UserError(
            f"training stopped in epoch {epoch}: no step had a finite loss. Look for images that are "
            "not normalised or hold no numbers; the checkpoints of earlier epochs are as they were"
        )


def check_weights(network: NMSWNetwork, epoch: int) -> None:
    """See that the network can still learn: once a weight is no number, every later prediction is none, either.

    Raises:
        UserError: a weight is no number.
    """
    for name, weights in network.state_dict().items():
        if weights.is_floating_point() and not weights.isfinite().all():
            raise UserError(
                f"training stopped in epoch {epoch}: the loss is not finite and weights of {name} are "
                "no numbers any more. Look for images that are not normalised or hold no numbers, or lower the "
                "learning rate; the checkpoints of earlier epochs are as they were"
            )


class InTraining:
    """The networks of a validation step, which has seen its volume coarsely; see `volume.Networks`.

    Args:
        network: being trained.
        step: that was done.
        device: of the network.
    """

    def __init__(self, network: NMSWNetwork, step: TrainingStep, device: torch.device) -> None:
        self.network, self.step, self.device = network, step, device

    @property
    def weights(self) -> FusionWeights:
        """Weights of the fusion."""
        return self.network.fusion_weights

    def grid(self, volume_shape: Shape) -> WindowGrid:
        """The windows of the volume."""
        return self.network.grid(volume_shape)

    def coarse(self, padded: Padded) -> CoarsePrediction:
        """Of the step."""
        return self.step.result.coarse

    def patches(self, padded: Padded, coarse: CoarsePrediction, starts_K3: Tensor) -> Tensor:
        """Logits of windows of the step's volume."""
        patches_KCDHW, _ = self.step.volume.windows(starts_K3, self.network.patch_size)
        patches_KCDHW = self.network.with_context(patches_KCDHW, coarse, starts_K3)
        if self.device.type != "cpu":
            patches_KCDHW = filled_up(patches_KCDHW)
        with mixed_precision(self.device):
            return finest_scale(self.network(patches_KCDHW))[: len(starts_K3)]


@torch.no_grad()
def predicted_in_training(network: NMSWNetwork, step: TrainingStep, device: torch.device) -> Tensor:
    """Labels of a validation step's volume, with the windows that inference would take.

    Returns:
        int16 of the volume's shape, on the device.
    """
    volume_CDHW = step.volume.volume_1CDHW[0]
    padded = Padded(volume_CDHW, (0, 0, 0), spatial_shape(volume_CDHW))
    spending = Spending(network.sampler.at_inference, network.num_patches)
    fold = choose(InTraining(network, step, device), padded, spending)
    return labels_of(padded, fold, device).to(device)


def labels_of(padded: Padded, fold: FoldOfCase, device: torch.device) -> Tensor:
    """Labels of a volume on its own grid, int16 on the host."""
    axes = [linear_axis(n, n) for n in padded.inside]
    work = Work(unbounded(fold.grid.patch_size, device), device)
    decided = where_it_fits(lambda work: predict_labels(padded, [fold], axes, work), work)
    return fold.coarse.encoding.labels_of(decided)


def validate(trainer: nnUNetTrainer, network: NMSWNetwork, processes: Processes, save_probabilities: bool) -> None:
    """Calibrate -k auto on the validation cases of a fold, predict them, and write nnU-Net's summary of metrics.

    Where scores predict no benefits there is nothing to calibrate.

    Args:
        trainer: whose fold it is.
        network: that was trained.
        processes: that share the cases.
        save_probabilities: write these, too.

    Raises:
        UserError: cases have failed; all others are predicted.
    """
    network.eval()
    folder = Path(trainer.output_folder, "validation")
    folder.mkdir(parents=True, exist_ok=True)
    _, keys = trainer.do_split()
    dataset = trainer.dataset_class(
        trainer.preprocessed_dataset_folder,
        keys,
        folder_with_segs_from_previous_stage=trainer.folder_with_segs_from_previous_stage,
    )
    keys, encoding = dataset.identifiers, LabelEncoding.of(trainer.label_manager)
    cases = partial(read_cases, dataset, processes.own_share(keys), encoding)
    in_step = partial(processes.in_step, total=len(keys), every=CASES_BETWEEN_BARRIERS)
    threshold = None
    if network.sampler.measures_benefit:
        measured = gather_over_processes(calibrate(network, in_step(cases()), encoding, trainer.device))
        calibration = calibration_of(measured)
        threshold = threshold_of([calibration], DEFAULT_MAX_DROP)
        if trainer.local_rank == 0:
            write_json(folder / FILE, calibration)
            keep_calibration(folder.parent, network, calibration)
    next_stages = trainer.configuration_manager.next_stage_names
    predictor = NMSWPredictor(
        threshold=threshold,
        take_logits=partial(_save_for_next_stages, trainer) if next_stages else None,
        device=trainer.device,
        allow_tqdm=False,
    )
    predictor.manual_initialization(
        network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )

    def told() -> Iterator[Case]:
        for case in in_step(cases()):
            trainer.print_to_log_file(f"predicting {case.key}")
            yield {"data": case.volume_CDHW, "data_properties": case.properties, "ofile": str(folder / case.key)}

    try:
        predictor.predict_from_data_iterator(told(), save_probabilities, default_num_processes)
    except UserError:  # of cases that have failed, when all others are predicted
        processes.wait()  # or the end of this process would end the others
        raise
    processes.wait()  # or the summary would be of the cases that are written by now
    if trainer.local_rank == 0:
        _write_summary(trainer, folder)


@torch.inference_mode()
def calibrate(
    network: NMSWNetwork, cases: Iterator[PreprocessedCase], encoding: LabelEncoding, device: torch.device
) -> Measured:
    """Measure on cases where -k auto may stop; see `selection.calibration`.

    At the spacing of training and without mirroring, so that all thresholds together cost no more than the validation
    itself.
    """
    (fold,) = Ensemble(network, [network.state_dict()], encoding, device).folds()
    measured: Measured = {threshold: [] for threshold in THRESHOLDS}
    for case in cases:
        reference_DHW = torch.from_numpy(np.asarray(case.segmentation[0], dtype=np.int64)).clamp_min(0)
        padded = Padded.of(case.volume_CDHW, network.patch_size)
        grid = fold.grid(spatial_shape(padded.volume_CDHW))
        coarse = fold.coarse(padded)
        for threshold in THRESHOLDS:
            windows = Spending(network.sampler.at_inference, "auto", threshold).choose(coarse, grid)
            labels_DHW = labels_of(padded, FoldOfCase(fold, coarse, grid, windows, fold.weights), device)
            measured[threshold].append((len(windows.starts_K3), encoding.dice(reference_DHW, labels_DHW).numpy()))
    return measured


def _write_summary(trainer: nnUNetTrainer, folder: Path) -> None:
    """Write nnU-Net's `summary.json` of the predictions, and log it."""
    labels = trainer.label_manager
    metrics = compute_metrics_on_folder(
        str(Path(trainer.preprocessed_dataset_folder_base, "gt_segmentations")),
        str(folder),
        str(folder / "summary.json"),
        trainer.plans_manager.image_reader_writer_class(),
        trainer.dataset_json["file_ending"],
        labels.foreground_regions if labels.has_regions else labels.foreground_labels,
        labels.ignore_label,
        chill=True,
        num_processes=default_num_processes,
    )
    for label, of_label in metrics["mean"].items():
        trainer.logger.log_summary(f"final_val/class_{label}_dice", of_label["Dice"])
    trainer.logger.log_summary("final_val/foreground_dice", metrics["foreground_mean"]["Dice"])
    trainer.print_to_log_file("Mean Validation Dice: ", metrics["foreground_mean"]["Dice"])


def _save_for_next_stages(trainer: nnUNetTrainer, case: Case, logits_CDHW: Tensor) -> None:
    """Write a validation case's prediction for the cascade's next stages, in their resolution."""
    key = Path(case["ofile"]).name
    for name in trainer.configuration_manager.next_stage_names or []:
        next_stage = trainer.plans_manager.get_configuration(name)
        folder = str(Path(trainer.preprocessed_dataset_folder_base, next_stage.data_identifier))
        dataset_class = infer_dataset_class(folder)
        try:
            data, _, _, _ = dataset_class(folder, [key]).load_case(key)
        except FileNotFoundError:
            trainer.print_to_log_file(f"no prediction of {key} for {name}: preprocess that configuration first")
            continue
        with written_whole(Path(trainer.output_folder_base, "predicted_next_stage", name)) as unfinished:
            resample_and_save(
                logits_CDHW,
                data.shape[1:],
                str(unfinished / key),
                trainer.plans_manager,
                trainer.configuration_manager,
                case["data_properties"],
                trainer.dataset_json,
                default_num_processes,
                dataset_class,
            )
