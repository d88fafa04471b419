"""What is left to do for the retrofit of a fold: begin, go on, validate, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_nmsw.documents import SOURCE, SUMMARY, read_json
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import sha256_of
from nnunet_nmsw.model.by_trainer import predicts_benefits
from nnunet_nmsw.model.plans import settings_of
from nnunet_nmsw.model.safe_loading import configuration_of, read_checkpoint
from nnunet_nmsw.selection.calibration import CALIBRATION_KEY, FILE
from nnunet_nmsw.trainers.pretrained import SOURCE_FILE

FINAL, UNFINISHED = "checkpoint_final.pth", ("checkpoint_latest.pth", "checkpoint_best.pth")
"""Checkpoints of a training that is finished, and of one that is not."""


class Step(NamedTuple):
    """What is to be done for a fold.

    Attributes:
        what: in words.
        flags: of `nnUNetv2_train`; None where nothing is to be done.
    """

    what: str
    flags: Sequence[str] | None


def step_of(folder: Path, checkpoint: Path, trust: bool) -> Step:
    """What is to be done for the retrofit of a fold, by what earlier calls have left.

    Args:
        folder: of the retrofit's fold.
        checkpoint: of the stock model's same fold.
        trust: see `nnunet_nmsw.model.safe_loading.loading`.

    Raises:
        UserError: the retrofit began from another checkpoint, or does not tell from which one.
    """
    there = next((name for name in (FINAL, *UNFINISHED) if (folder / name).is_file()), None)
    if there is None:
        return Step(f"training begins from {checkpoint}", ["-pretrained_weights", str(checkpoint)])
    source = folder / SOURCE_FILE
    anew = f"move {folder} away to train it anew"
    if not source.is_file():
        raise UserError(
            f"{folder} does not say which checkpoint it began from: there is no {SOURCE_FILE}, which earlier versions "
            f"did not write; {anew}, or leave the fold out with -f"
        )
    began = read_json(source, SOURCE, anew)
    if began["sha256"] != sha256_of(checkpoint):
        raise UserError(
            f"{folder} began from {began['checkpoint']}, and {checkpoint} is another checkpoint, or has changed since: "
            f"put the old one back, or {anew}"
        )
    if there != FINAL:
        return Step(f"training goes on from its {there}", ["--c"])
    if not _is_validated(folder, trust):
        return Step("trained, its validation is left", ["--val"])
    return Step("done", None)


def _is_validated(folder: Path, trust: bool) -> bool:
    """Whether the validation of a fold's last checkpoint has been finished."""
    calibration, summary = folder / "validation" / FILE, folder / "validation" / "summary.json"
    trained = read_checkpoint(folder / FINAL, trust, mmap=True)
    # A validation writes its summary last. An older summary is of a training before.
    before = calibration if _is_calibrated(trained, folder / FINAL) else folder / FINAL
    if not (before.is_file() and summary.is_file()) or summary.stat().st_mtime < before.stat().st_mtime:
        return False
    try:
        read_json(summary, SUMMARY)
        measured: Any = read_json(calibration, {}) if before == calibration else None
    except UserError:  # a validation that was killed while it wrote
        return False
    return bool(measured == trained.get(CALIBRATION_KEY))


def _is_calibrated(trained: dict[str, Any], checkpoint: Path) -> bool:
    """Whether a validation calibrates a model, by its checkpoint: not where scores predict no benefits."""
    configuration = configuration_of(trained, checkpoint)
    plans = PlansManager(trained["init_args"]["plans"])
    return predicts_benefits(trained["trainer_name"], settings_of(plans.get_configuration(configuration).configuration))
