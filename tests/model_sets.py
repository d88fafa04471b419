"""Sets of tiny models that were never trained, for tests: a coarse one at 2 mm, and fine ones at 1 mm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from predictors import CPU, stock
from untrained import write_model

from nnunet_nmsw.inference.cases import Case
from nnunet_nmsw.inference.model_set import ModelSetPredictor
from nnunet_nmsw.inference.set_members import ModelFolder

COARSE = ("liver", "spleen", "kidney", "rib", "lung")
FINE = {"abdomen": ("kidney", "liver"), "chest": ("lung", "nodule"), "bones": ("rib",)}
SHAPE = (20, 18, 22)


def write_models(
    folder: Path, coarse: Sequence[str] = COARSE, fine: Mapping[str, Sequence[str]] = FINE
) -> dict[str, Path]:
    """Folders of the models, the coarse one as `coarse`.

    Args:
        folder: to write them into.
        coarse: classes of the coarse model.
        fine: classes of each fine one.
    """
    low = {"spacing": [2.0] * 3, "data_identifier": "low"}
    paths = {"coarse": write_model(folder / "coarse", "nnUNetTrainer", coarse, seed=7, **low)}
    for seed, (name, classes) in enumerate(fine.items()):
        paths[name] = write_model(folder / name, "nnUNetTrainer", classes, seed)
    return paths


def noise() -> np.ndarray:
    """An image."""
    array: np.ndarray = np.random.default_rng(0).normal(100, 30, (1, *SHAPE)).astype(np.float32)
    return array


def the_set(models: Mapping[str, Path], order: Sequence[str] | None = None, **kwargs: Any) -> ModelSetPredictor:
    """A predictor of all models, or of some in an order."""
    names = [name for name in models if name != "coarse"] if order is None else order
    fine = [ModelFolder(models[name], (0,)) for name in names]
    predictor = ModelSetPredictor(fine, use_mirroring=False, device=CPU, allow_tqdm=False, **kwargs)
    predictor.initialize_from_trained_model_folder(str(models["coarse"]), (0,))
    return predictor


def case_of(predictor: ModelSetPredictor, image: np.ndarray) -> Case:
    (case,) = predictor.preprocess_arrays([image], [{"spacing": [1.0] * 3}], [None], [None], 0)
    return case


def stock_logits(folder: Path, image: np.ndarray) -> torch.Tensor:
    """nnU-Net's own sliding window over the image, preprocessed by nnU-Net."""
    predictor = stock(False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    configuration = predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    of_plans = predictor.plans_manager, configuration, predictor.dataset_json
    data, *_ = preprocessor.run_case_npy(image, None, {"spacing": [1.0] * 3}, *of_plans)
    logits: torch.Tensor = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).float()
    return logits
