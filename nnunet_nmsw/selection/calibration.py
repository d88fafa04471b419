"""`-k auto`: as many patches as have a predicted benefit, by a threshold that is calibrated.

Thresholds are measured on the validation cases of a fold and written beside their predictions; how much Dice may be
lost for fewer patches is decided when a model predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from nnunet_nmsw.documents import CALIBRATION, read_json
from nnunet_nmsw.errors import UserError

FILE = "automatic_patches.json"
"""In the folder `validation` of a fold."""

CALIBRATION_KEY = "nmsw_calibration"
"""In a checkpoint, for the same."""

THRESHOLDS = (0.003, 0.006, 0.0125, 0.025, 0.05, 0.1, 0.2)
"""What the mean worth of a window has to exceed; see `GreedyBenefit`. Its unit is the root mean square of the benefits
that training measured. Files call it `stop_at`."""


Measured = dict[float, list[tuple[int, np.ndarray]]]
"""By threshold, for each case: windows taken, and the Dice of each foreground label or region, NaN where neither
prediction nor reference has it."""


def calibration_of(measured: Sequence[Measured]) -> dict[str, Any]:
    """What was measured on the validation cases, in parts, as it is written to the file."""
    rows = []
    for threshold in measured[0]:
        cases = [case for part in measured for case in part[threshold]]
        rows.append(
            {
                "stop_at": threshold,
                "mean_dice": mean_dice([dice for _, dice in cases]),
                "patches": [taken for taken, _ in cases],
            }
        )
    return {"cases": len(cases), "thresholds": rows}


def mean_dice(of_cases: Sequence[np.ndarray]) -> float | None:
    """Mean over classes of their means over cases; None where no case has any class.

    Args:
        of_cases: Dice of each class, NaN where the case has none to measure.
    """
    means = [np.nanmean(of_class) for of_class in np.array(of_cases).T if not np.isnan(of_class).all()]
    return float(np.mean(means)) if means else None


def calibration_files(model_folder: Path) -> list[Path]:
    """Of all folds that have one."""
    return sorted(model_folder.glob(f"fold_*/validation/{FILE}"))


NO_BENEFITS = (
    "-k auto needs a model that predicts what each window gains: stock models, nnUNetTrainerNMSW_paper and the "
    'setting score_training "contribution" do not. Give a number or a percentage'
)


def check_auto(num_patches: int | str | None, network: nn.Module) -> None:
    """See that a model can decide on its number of patches where "auto" was asked for.

    Args:
        num_patches: that was asked for; None for the model's.
        network: NMSW's, or a stock one.

    Raises:
        UserError: it cannot, because it predicts no benefits.
    """
    sampler = getattr(network, "sampler", None)  # which a stock network does not have
    if num_patches == "auto" and (sampler is None or not sampler.measures_benefit):
        raise UserError(NO_BENEFITS)


def threshold_of_folds(model_folder: Path, folds: Sequence[int | str], max_drop: float) -> float:
    """`threshold_of` what the folds of a model have measured.

    Args:
        model_folder: of the model.
        folds: of the ensemble.
        max_drop: Dice, of 1, below the best of `THRESHOLDS`.

    Raises:
        UserError: a fold has no calibration.
    """
    files = [model_folder / f"fold_{fold}" / "validation" / FILE for fold in folds]
    missing = next((file for file in files if not file.is_file()), None)
    remedy = "run nnUNetv2_train with --val for that fold, or give a number of patches"
    if missing is not None:
        raise UserError(f"-k auto needs {missing}, which the validation after a training writes: {remedy}")
    return threshold_of([read_json(file, CALIBRATION, remedy, finite=True) for file in files], max_drop)


def threshold_of(calibrations: Sequence[dict[str, Any]], max_drop: float) -> float:
    """The largest of `THRESHOLDS` that costs no more Dice than allowed, on the validation cases of folds together.

    Args:
        calibrations: of the folds, see `calibration_of`.
        max_drop: Dice, of 1, below the best of `THRESHOLDS`.
    """
    dice: dict[float, list[tuple[float, int]]] = {}
    for calibration in calibrations:
        for row in calibration["thresholds"]:
            if row["mean_dice"] is not None:
                dice.setdefault(row["stop_at"], []).append((row["mean_dice"], calibration["cases"]))
    if not dice:
        return THRESHOLDS[0]
    means = {threshold: _weighted(measured) for threshold, measured in dice.items()}
    best = max(means.values())
    return max(threshold for threshold, mean in means.items() if mean >= best - max_drop)


def _weighted(measured: Sequence[tuple[float, int]]) -> float:
    """The mean over cases of means of some cases, given with their numbers."""
    means, cases = zip(*measured, strict=True)
    return float(np.average(means, weights=cases))
