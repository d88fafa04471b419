"""Trained models loaded into predictors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_nmsw.imports import importing
from nnunet_nmsw.inference.files import FilesPredictor
from nnunet_nmsw.inference.model_folder import initialize
from nnunet_nmsw.inference.predictor import NMSWPredictor


def load_model(
    predictor: nnUNetPredictor, folder: Path, folds: Sequence[int | str], checkpoint: str, trust: bool = False
) -> None:
    """Load the folds' checkpoints into a predictor, nnU-Net's or one of this package.

    Args:
        predictor: to load into.
        folder: of the model.
        folds: to load.
        checkpoint: file name of the checkpoints.
        trust: see `check_model`.

    Raises:
        UserError: see `initialize`; or the predictor is NMSW's and the model is not.
    """
    with importing():  # nnU-Net imports trainers and networks when it needs them
        if isinstance(predictor, FilesPredictor):
            predictor.trust_model = trust
            predictor.initialize_from_trained_model_folder(str(folder), tuple(folds), checkpoint)
            if isinstance(predictor, NMSWPredictor):
                _ = predictor.nmsw_network  # raises for a model without one
        else:
            initialize(predictor.initialize_from_trained_model_folder, predictor, folder, folds, checkpoint, trust)
