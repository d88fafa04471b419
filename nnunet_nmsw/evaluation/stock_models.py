"""Stock models that are compared: each one's sliding window, and what `nmsw_predict` makes of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_nmsw.files import sha256_of
from nnunet_nmsw.inference.files import FilesPredictor
from nnunet_nmsw.inference.model_folder import read_document
from nnunet_nmsw.inference.orientation import OrientedPlans
from nnunet_nmsw.inference.set_members import ModelFolder
from nnunet_nmsw.selection.budget import UNCALIBRATED


@dataclasses.dataclass(frozen=True)
class StockModels:
    """A coarse stock model and fine ones, in one of the two roles that they have in a comparison.

    Attributes:
        role: "baseline", their sliding windows, or "nmsw".
        models: their folders, the coarse one first.
        is_set: classes are matched by name; else there are two models of the same labels.
        checkpoint: file name of the checkpoints.
        make: makes what predicts with all models, for a device, with mirroring or without, and a backend. Can be
            pickled.
        trusted: see `Model`.
        orientation: that images are turned into; None as they are.
        explore: further windows of each fine model of a set.
        calibration: of a set.
    """

    role: str
    models: tuple[ModelFolder, ...]
    is_set: bool
    checkpoint: str
    make: Callable[[str, bool, str], FilesPredictor]
    trusted: bool = False
    orientation: str | None = None
    explore: int = 0
    calibration: Path | None = None

    @property
    def sliding(self) -> tuple[ModelFolder, ...]:
        """The models whose sliding windows are the baseline. Of two of the same labels it is the fine one."""
        return self.models if self.is_set else self.models[1:]

    @property
    def folder(self) -> Path:
        """Of the model whose labels the predictions have."""
        return self.sliding[0].path

    @property
    def names(self) -> list[str]:
        """Of the models, for people: all of them may have been trained by one trainer."""
        return [f"{model.path.parent.name}/{model.path.name}" for model in self.models]

    @property
    def name(self) -> str:
        """For people."""
        return " + ".join(self.names)

    @property
    def plans(self) -> PlansManager:
        """Of `folder`, with images in the orientation that models see them in."""
        plans = self.json("plans.json")
        return PlansManager(plans) if self.orientation is None else OrientedPlans(plans, self.orientation)

    @property
    def num_patches(self) -> int | str:
        """K that `nmsw_predict` takes by itself."""
        return UNCALIBRATED if self.calibration is None else "auto"

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of `folder`."""
        return read_document(self.folder, name)

    def fingerprints(self, folds: Sequence[int]) -> dict[str, str]:
        """SHA-256 of each checkpoint, of "nmsw" those that "baseline" does not name.

        Args:
            folds: as of `Model`; they say nothing here.
        """
        named = self.sliding if self.role == "baseline" else [of for of in self.models if of not in self.sliding]
        return {
            f"checkpoint {model.path}, fold {fold}": sha256_of(model.path / f"fold_{fold}" / self.checkpoint)
            for model in named
            for fold in model.folds
        }
