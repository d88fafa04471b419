"""What the parts of `gpu.py` are about, and where they keep what they measure."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import measured_on

WORK = Path(tempfile.gettempdir(), "nmsw_gpu")
"""For datasets, which are large; removed at the end."""


class Size(NamedTuple):
    """How large everything is.

    Attributes:
        image: voxels of the volume that is predicted.
        patch: voxels along each axis of a patch.
        features: of the networks' first stage.
        classes: with the background.
        training_image: voxels of a training volume.
        steps: of a training that is timed.
        rounds: of a prediction that is timed, after one that is not counted.
    """

    image: list[int]
    patch: int
    features: int
    classes: list[int]
    training_image: list[int]
    steps: int
    rounds: int


PAPER = Size([384, 480, 480], 128, 32, [3, 14, 118], [256, 288, 288], 20, 2)
TOY = Size([40, 48, 56], 16, 4, [3, 14], [32, 40, 48], 2, 1)


class Results:
    """Measurements, written into a file as soon as they are there.

    Args:
        file: JSON.
        device: that computes.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        self.file = file
        self.content: dict[str, Any] = {"command": sys.argv, **measured_on(device), "rows": []}

    def keep(self, **row: Any) -> None:
        """Add a measurement."""
        self.content["rows"].append(row)
        print(row, flush=True)
        self.file.write_text(json.dumps(self.content, indent=1))

    def tried(self, what: str, measure: Any) -> None:
        """Measure, and keep the error where there is one: the next measurement may work."""
        started = time.perf_counter()
        try:
            row = measure() or {}
        except Exception as error:  # noqa: BLE001 - it is what is measured here
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"[:500]}
        self.keep(what=what, **row, total_s=round(time.perf_counter() - started, 2))
