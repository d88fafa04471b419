"""Draws Dice against seconds a scan of BTCV: docs/pictures/dice_by_seconds.svg, from the JSON files under docs/.

    python scripts/dice_by_seconds.py

Dice is of docs/ablations (200 epochs, measured at the spacing of training); seconds are of docs/performance, from file
to file, of the same networks and ten scans.
"""

from __future__ import annotations

from document_tables import ROOT, STOCK, dice, load_runs, measured
from matplotlib import rc_context
from matplotlib.figure import Figure

DOCS = ROOT / "docs"
SCANS = 10
BLUE, RED = "#4477aa", "#ee6677"


def main() -> None:
    """Draw."""
    rows = measured("ten_ct")["rows"]
    runs = load_runs(DOCS / "ablations" / "0.2.0" / "Dataset731_BTCV" / "200_epochs")
    figure = Figure(figsize=(6.6, 3.0), layout="constrained")
    axes = figure.subplots()
    stock = (rows[STOCK]["seconds"] / SCANS, dice(runs["stock"], "sliding window", "all").mean())
    axes.plot(*stock, "o", color=BLUE, markersize=8)
    axes.annotate("nnU-Net, 309 windows", stock, (-8, -14), textcoords="offset points", ha="right", color=BLUE)
    for k, windows, place in (("5%", 16, (-2, -16)), ("10%", 31, (8, 6))):
        seconds = rows[f"nmsw_predict -k {k} --backend openvino"]["seconds"] / SCANS
        point = (seconds, dice(runs["default"], "greedy_benefit", k).mean())
        axes.plot(*point, "s", color=RED, markersize=8)
        axes.annotate(f"NMSW, {windows} windows", point, place, textcoords="offset points", color=RED)
    axes.set_xscale("log")
    axes.set_xlim(0.5, 60)
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_ylim(60, 70)
    axes.set_xlabel("seconds a scan, from file to file, on two processor cores")
    axes.set_ylabel("mean Dice, %")
    axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.hashsalt": "dice_by_seconds"}):  # the same picture gives the same file
        figure.savefig(DOCS / "pictures" / "dice_by_seconds.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
