"""What labelled images said of a set of models: how to fuse each model's patches, and which windows are worth one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nnunet_nmsw.documents import read_json
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.set_members import FineModel
from nnunet_nmsw.model.fusion import INITIAL_CLASS_WEIGHT, FusionWeights

NUMBERS = {"type": "array", "minItems": 1, "items": {"type": "number", "minimum": -1e6, "maximum": 1e6}}

SCHEMA = {
    "type": "object",
    "required": ["global_model", "local_models", "threshold"],
    "properties": {
        "global_model": {"type": "string"},
        "case_names": {"type": "array", "items": {"type": "string"}},
        "threshold": {"type": "number", "minimum": 0, "maximum": 1e6},
        "local_models": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["model", "patch", "coarse", "bias"],
                "properties": {"model": {"type": "string"}, "patch": NUMBERS, "coarse": NUMBERS, "bias": NUMBERS},
            },
        },
    },
}
"""Of the file."""

REMEDY = "make it anew with --calibrate"


class SetCalibration(NamedTuple):
    """What is known of a set.

    Attributes:
        weights: of the fusion, by the digest of a fine model; those that a training starts from for others.
        threshold: of the number of patches "auto": the mean entropy over a window, in nats, that is worth a patch.
    """

    weights: Mapping[str, FusionWeights]
    threshold: float | None

    def weights_of(self, model: FineModel) -> FusionWeights:
        """Weights of a model's fusion, for the shared classes, see `MatchedLabels`."""
        if self.weights and model.digest in self.weights:
            return self.weights[model.digest]
        weight = torch.sigmoid(torch.tensor(INITIAL_CLASS_WEIGHT))
        return FusionWeights.convex(weight.repeat(model.labels.num_shared))


def document_of(calibration: SetCalibration, coarse: str, models: Sequence[FineModel]) -> dict[str, Any]:
    """What is written to the file.

    Args:
        calibration: of the set.
        coarse: digest of the coarse model.
        models: the fine ones.
    """
    rows = []
    for model in models:
        of_model = calibration.weights_of(model)
        parts = dict(zip(("patch", "coarse", "bias"), (part.tolist() for part in of_model), strict=True))
        rows.append({"folder": model.folder.path.name, "model": model.digest, **parts})
    return {"global_model": coarse, "threshold": calibration.threshold, "local_models": rows}


def read_calibration(file: Path, coarse: str, models: Sequence[FineModel]) -> SetCalibration:
    """The calibration in a file, for these very models, in any order.

    Args:
        file: that `--calibrate` wrote.
        coarse: digest of the coarse model.
        models: the fine ones.

    Raises:
        UserError: it cannot be read, or is of other models.
    """
    content = read_json(file, SCHEMA, REMEDY, finite=True)
    weights = {
        row["model"]: FusionWeights(*(torch.tensor(row[part]) for part in ("patch", "coarse", "bias")))
        for row in content["local_models"]
    }
    digests = {model.digest: model for model in models}
    if content["global_model"] != coarse or set(digests) != set(weights):
        raise UserError(f"{file} is the calibration of other models or folds: {REMEDY}")
    for digest, of_model in weights.items():
        if any(len(part) != digests[digest].labels.num_shared for part in of_model):
            raise UserError(f"{file} is broken: it has other classes than {digests[digest].model.what}; {REMEDY}")
    return SetCalibration(weights, content["threshold"])
