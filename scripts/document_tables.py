"""Writes the tables of README.md and docs/performance.md, from the JSON files under docs/.

python scripts/document_tables.py
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "experiments"))
from ablation_tables import dice, head, load_runs, row  # noqa: E402
from markers import replace_between_markers  # noqa: E402

STOCK = "nnUNetv2_predict"
WAYS = {
    "--backend pytorch": "PyTorch",
    "--backend openvino": "OpenVINO",
    "--backend openvino --precision bfloat16": "OpenVINO, bfloat16",
    "--backend openvino --precision int8": "OpenVINO, int8",
}
SHARES = ("5%", "10%")
MEASURED = {
    "full_width": "full width, 96³, 3 classes, 105 million voxels (100 windows)",
    "full_width_128": "full width, 128³, 3 classes, 105 million voxels (48 windows)",
    "full_width_128_mirrored": "the same, 36 million voxels (8 windows), mirrored",
    "full_width_128_ct": "full width, 128³, 30 classes, one CT of BTCV (24 windows)",
    "ten_ct": "small, 24³, 14 classes, ten CTs of BTCV",
    "ct_mirrored": "the same, one CT, mirrored",
    "large_3": "small, 64³, 3 classes, 105 million voxels",
    "large_30": "small, 64³, 30 classes, 105 million voxels",
    "medium_118": "small, 64³, 118 classes, 13 million voxels",
    "ten_small_30": "small, 64³, 30 classes, ten images of 3 million voxels",
}
"""What `benchmarks/prediction_rows.sh` measures, by name of its files."""

TRAININGS = {
    "Hippocampus, 2 classes": ("Dataset004_Hippocampus", 50),
    "BTCV, abdominal CT, 13 organs": ("Dataset731_BTCV", 200),
}
"""Datasets of the README's results, and epochs."""


def main() -> None:
    """Write them."""
    for file, tables in documents().items():
        for name, table in tables.items():
            replace_between_markers(ROOT / file, name, table)


def documents() -> dict[str, dict[str, str]]:
    """Tables by document and marker."""
    return {
        "README.md": {"results": accuracy(), "speed": speed()},
        "docs/performance.md": {"file_to_file": file_to_file(), "model_set": model_set()},
    }


def accuracy() -> str:
    """Dice of stock nnU-Net and of NMSW after trainings of equal length."""
    rows = []
    for name, (dataset, epochs) in TRAININGS.items():
        runs = load_runs(ROOT / "docs" / "ablations" / "0.2.0" / dataset / f"{epochs}_epochs")
        stock, nmsw = runs["stock"], runs["default"]
        windows = [
            statistics.mean(run["taken"][method][k] for run in nmsw)
            for method, k in (("automatic", "calibrated"), ("all windows", "all"))
        ]
        rows.append(
            [
                name,
                str(epochs),
                str(len(nmsw)),
                f"{dice(stock, 'sliding window', 'all').mean():.1f}",
                f"{dice(nmsw, 'automatic', 'calibrated').mean():.1f}",
                f"{windows[0]:.0f} of {windows[1]:.0f}",
            ]
        )
    return table(["", "epochs", "folds", "nnU-Net", "NMSW", "windows of NMSW"], rows)


def speed() -> str:
    """A prediction at full width."""
    rows = measured("full_width")["rows"]
    lines = [["`nnUNetv2_predict`", f"{rows[STOCK]['seconds']:.0f} s", ""]]
    for way in list(WAYS)[:3]:
        of = rows[f"nmsw_predict -k 10% {way}"]
        lines.append([f"`nmsw_predict -k 10% {way}`", f"{of['seconds']:.0f} s", f"{of['times_faster']:.0f} times"])
    return table(["", "seconds", "faster"], lines)


def file_to_file() -> str:
    """All rows that were measured."""
    lines = []
    for name, what in MEASURED.items():
        if not (ROOT / "docs" / "performance" / f"prediction_{name}.json").is_file():
            continue
        rows = measured(name)["rows"]
        for k in SHARES:
            stock = f"{rows[STOCK]['seconds']:.0f} s, {rows[STOCK]['gib']:.1f} GiB" if k == SHARES[0] else ""
            found = [rows.get(f"nmsw_predict -k {k} {way}") for way in WAYS]
            lines.append([what if k == SHARES[0] else "", stock, k, *map(cell, found)])
    return table(["model and images", "nnU-Net", "K", *WAYS.values()], lines)


def model_set() -> str:
    """A set of models, as `benchmarks/model_set.py` measures it."""
    rows = json.loads((ROOT / "docs" / "performance" / "model_set.json").read_text())["rows"]
    lines = [
        [
            f"`{way}`" if way.startswith("nmsw") else way,
            f"{of['seconds']:.0f} s",
            f"{of['times_faster']:.1f}",
            f"{of['gib']:.1f} GiB",
            f"{100 * of['dice']:.1f}",
            f"{100 * of['dice_to_the_merge']:.1f}",
        ]
        for way, of in rows.items()
    ]
    return table(["", "seconds", "times faster", "memory", "Dice", "Dice to the five models' merge"], lines)


def measured(name: str) -> dict[str, Any]:
    """A file of `benchmarks/prediction.py`."""
    found: dict[str, Any] = json.loads((ROOT / "docs" / "performance" / f"prediction_{name}.json").read_text())
    return found


def cell(way: dict[str, float] | None) -> str:
    """Times faster, seconds and memory."""
    return "" if way is None else f"**{way['times_faster']:.1f}×** {way['seconds']:.1f} s, {way['gib']:.1f} GiB"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    return "\n".join([*head(*columns), *(row(*cells) for cells in rows)])


if __name__ == "__main__":
    main()
