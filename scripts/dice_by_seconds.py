"""Draws Dice against seconds a scan of BTCV: docs/pictures/dice_by_seconds.svg, from the JSON files under docs/.

    python scripts/dice_by_seconds.py

Dice is of docs/ablations (100 epochs, measured at the spacing of training); seconds are of docs/performance, from file
to file, of the same networks and ten scans.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
TRAININGS = DOCS / "ablations" / "0.2.0" / "Dataset731_BTCV" / "100_epochs"
SCANS = 10
STOCK, NMSW = "#4477aa", "#ee6677"


def main() -> None:
    """Draw."""
    rows = json.loads((DOCS / "performance" / "prediction_ten_ct.json").read_text())["rows"]
    figure = Figure(figsize=(6.6, 3.0), layout="constrained")
    axes = figure.subplots()
    stock = (rows["nnUNetv2_predict"]["seconds"] / SCANS, dice_of("stock", "sliding window", "all"))
    axes.plot(*stock, "o", color=STOCK, markersize=8)
    axes.annotate("nnU-Net, 309 windows", stock, (-8, -14), textcoords="offset points", ha="right", color=STOCK)
    for k, windows, place in (("5%", 16, (-2, -16)), ("10%", 31, (8, 6))):
        seconds = rows[f"nmsw_predict -k {k} --backend openvino"]["seconds"] / SCANS
        point = (seconds, dice_of("default", "greedy_benefit", k))
        axes.plot(*point, "s", color=NMSW, markersize=8)
        axes.annotate(f"NMSW, {windows} windows", point, place, textcoords="offset points", color=NMSW)
    axes.set_xscale("log")
    axes.set_xlim(0.5, 60)
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_ylim(56, 66)
    axes.set_xlabel("seconds a scan, from file to file, on two processor cores")
    axes.set_ylabel("mean Dice, %")
    axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.hashsalt": "dice_by_seconds"}):  # the same picture gives the same file
        figure.savefig(DOCS / "pictures" / "dice_by_seconds.svg", metadata={"Date": None})


def dice_of(arm: str, method: str, k: str) -> float:
    """Mean Dice over classes, in per cent."""
    results = json.loads((TRAININGS / f"{arm}__seed_0.json").read_text())
    return 100 * statistics.mean(results["dice"][method][k])


if __name__ == "__main__":
    main()
