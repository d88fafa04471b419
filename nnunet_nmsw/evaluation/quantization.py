"""Quantising the local branches of a model: calibrated on training cases, measured on validation cases.

Tensor suffixes: 1 a batch of one, K windows, C channels, D H W axes of a volume or of a patch, 3 one coordinate
per axis.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from torch import Tensor

from nnunet_nmsw.documents import SPLITS, read_json
from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.files import written_whole
from nnunet_nmsw.flags import INT8, OPENVINO
from nnunet_nmsw.inference.networks import Ensemble
from nnunet_nmsw.inference.openvino_branches import OpenVINO, OpenVINOBranch, backend_named
from nnunet_nmsw.inference.openvino_models import cache_folder
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.quantized import FACTS, keep_quantized, quantized
from nnunet_nmsw.inference.volume import Padded, Spending, choose
from nnunet_nmsw.selection.calibration import mean_dice
from nnunet_nmsw.trainers.cases import PreprocessedCase, read_cases
from nnunet_nmsw.trainers.validation import labels_of
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import crop_windows

WINDOWS_OF_A_CASE = 12
"""So many windows of a training case calibrate, the first ones that the model would take."""

CPU = torch.device("cpu")


class QuantizedFold:
    """One fold of a model, quantised.

    Args:
        predictor: with that fold alone, on the CPU.
        dataset_folder: nnU-Net's preprocessed dataset.
        fold: number of the fold, or "all".
    """

    def __init__(self, predictor: NMSWPredictor, dataset_folder: Path, fold: int | str) -> None:
        self.predictor = predictor
        self.network = copy.deepcopy(predictor.nmsw_network).eval()  # which nothing has compiled
        self.encoding = LabelEncoding.of(predictor.label_manager)
        self.folder = dataset_folder / predictor.configuration_manager.data_identifier
        self.training, self.validation = cases_of_fold(dataset_folder, self.folder, fold)

    def cases(self, keys: Sequence[str]) -> Iterator[PreprocessedCase]:
        """Preprocessed cases."""
        previous = self.predictor.configuration_manager.previous_stage_name
        if previous is not None:
            raise UserError("a cascade's second stage cannot be quantised: its images lie with its trainings")
        dataset = _dataset_class(self.folder)(str(self.folder), list(keys))
        try:
            yield from read_cases(dataset, keys, self.encoding)
        except (OSError, RuntimeError, KeyError) as error:
            raise UserError(f"cannot read a case of {self.folder}: {reason(error)}; preprocess it again") from error

    @torch.inference_mode()
    def patches(self, num_cases: int) -> list[Tensor]:
        """Inputs of the local branch, as predictions of training cases give them, each of shape 1, C, D, H, W."""
        step = max(1, len(self.training) // num_cases)
        (fold,) = Ensemble(self.network, self.predictor.list_of_parameters, self.encoding, CPU).folds()
        spending = Spending(self.predictor.spending.selector, WINDOWS_OF_A_CASE)
        patches = []
        for case in self.cases(self.training[::step][:num_cases]):
            padded = Padded.of(case.volume_CDHW, self.network.patch_size)
            of_case = choose(fold, padded, spending)
            for start_13 in of_case.windows.starts_K3.split(1):
                patch_1CDHW = crop_windows(padded.volume_CDHW[None], start_13, self.network.patch_size)
                patch_1CDHW = self.network.with_context(patch_1CDHW, of_case.coarse, start_13)
                context = self.network.context
                patches.append((patch_1CDHW if context is None else context(patch_1CDHW)).contiguous())
        return patches

    @torch.inference_mode()
    def dice(self, model: Any = None) -> float:
        """Mean Dice, of 1, over foreground classes of validation cases.

        At the spacing of training and without mirroring.

        Args:
            model: the quantised branch, of OpenVINO, all else as `nmsw_predict --precision int8` computes it; None for
                float32.

        Raises:
            UserError: no validation case has any foreground.
        """
        computes = backend_named(OPENVINO, INT8, CPU) if model is not None else None
        backend = OpenVINO(bfloat16=computes is not None and computes.bfloat16)
        ensemble = Ensemble(self.network, self.predictor.list_of_parameters, self.encoding, CPU, backend=backend)
        (fold,) = ensemble.folds()
        if model is not None:
            quantised = OpenVINOBranch(self.network.local_branch, backend.bfloat16, cache_folder(), model)
            ensemble.with_weights_of(0).local_branch = quantised
        by_case = []
        for case in self.cases(self.validation):
            reference_DHW = torch.from_numpy(np.asarray(case.segmentation[0], dtype=np.int64)).clamp_min(0)
            padded = Padded.of(case.volume_CDHW, self.network.patch_size)
            labels_DHW = labels_of(padded, choose(fold, padded, self.predictor.spending), CPU)
            by_case.append(self.encoding.dice(reference_DHW, labels_DHW).numpy())
        dice = mean_dice(by_case)
        if dice is None:
            raise UserError(f"no validation case in {self.folder} has any foreground: nothing can be measured")
        return dice

    def quantize(self, folder: Path, num_cases: int, max_drop: float) -> str:
        """Write the quantised branch beside the checkpoint: all of its convolutions, or all but the first and the last.

        Args:
            folder: of the fold.
            num_cases: training cases to calibrate with.
            max_drop: Dice, of 1, that may be lost.

        Returns:
            What was measured, in a sentence.

        Raises:
            UserError: it loses more either way, or cannot be written.
        """
        try:
            with written_whole(folder):  # see before long work that it can be written into
                pass
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {reason(error)}") from error
        patches, in_float32 = self.patches(num_cases), self.dice()
        tried = []
        for floating_ends in (False, True):
            model = quantized(self.network.local_branch, patches, floating_ends)
            in_int8 = self.dice(model)
            tried.append(
                f"{100 * in_int8:.2f} in int8" + (" but for the first and last layer" if floating_ends else "")
            )
            measured = (
                f"Dice of {len(self.validation)} validation cases: {100 * in_float32:.2f} in float32, "
                + ", ".join(tried)
            )
            if in_float32 - in_int8 <= max_drop:
                facts = {
                    "dice_float32": in_float32,
                    "dice_int8": in_int8,
                    "floating_ends": floating_ends,
                    "validation_cases": len(self.validation),
                    "calibration_patches": len(patches),
                }
                try:
                    keep_quantized(model, self.network.local_branch, folder, facts)
                except OSError as error:
                    raise UserError(f"cannot write into {folder}: {reason(error)}") from error
                return f"{folder / FACTS} is written. {measured}"
        raise UserError(
            f"{folder}: {measured}. --max_drop {max_drop:g} allows less to be lost, so nothing is written: "
            "calibrate with more -cases, or take --precision bfloat16"
        )


def cases_of_fold(dataset_folder: Path, data_folder: Path, fold: int | str) -> tuple[list[str], list[str]]:
    """Names of the training and the validation cases of a fold; of the fold "all" both are all cases.

    Args:
        dataset_folder: nnU-Net's preprocessed dataset, with its splits.
        data_folder: the preprocessed cases of the configuration.
        fold: number of the fold, or "all".

    Raises:
        UserError: there is no such preprocessed dataset, or its splits do not have the fold.
    """
    if not data_folder.is_dir():
        raise UserError(
            f"there is no {data_folder}: preprocess the dataset that the model was trained on, or name it with -d"
        )
    if fold == "all":
        names = sorted(_dataset_class(data_folder).get_identifiers(str(data_folder)))
        return names, names
    file = dataset_folder / "splits_final.json"
    splits = read_json(file, SPLITS)
    if not int(fold) < len(splits):
        raise UserError(f"{file} has no fold {fold}: it has {len(splits)}")
    return list(splits[int(fold)]["train"]), list(splits[int(fold)]["val"])


def _dataset_class(folder: Path) -> Any:
    """nnU-Net's, for the files of a folder.

    Raises:
        UserError: there are none, or of several kinds.
    """
    try:
        return infer_dataset_class(str(folder))
    except AssertionError as error:
        raise UserError(f"{folder} is not what nnU-Net's preprocessing leaves: {reason(error)}") from error
