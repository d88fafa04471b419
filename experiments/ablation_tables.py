"""Tables and plots of the ablations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from ablation_run import AS_OBJECTS, AUTOMATIC, NUM_PATCHES
from grid import ARMS, DATASETS, PICKED_BY_TOP_K, SELECTION_ARMS, STOCK
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_nmsw.flags import DEFAULT_MAX_DROP
from nnunet_nmsw.selection.calibration import mean_dice, threshold_of
from nnunet_nmsw.trainers.progress import COLOURS

CALIBRATED = "calibrated"
"""In the place of K: the threshold that the measured cases set, which is the default of a trained model."""
KS = tuple(map(str, NUM_PATCHES))
SELECTION_NAMES = {
    "greedy_benefit": "predicted benefit, greedy (default)",
    "top_k": "predicted benefit, top-k",
    "greedy_coverage": "predicted benefit, greedy coverage",
    "entropy": "entropy of the coarse prediction",
    "random": "random, with predicted foreground",
    "oracle": "oracle",
}
Runs = dict[str, list[dict[str, Any]]]


def own_selection(arm: str) -> str:
    """How an arm picks windows at inference."""
    return "top_k" if arm in PICKED_BY_TOP_K else "greedy_benefit"


def load_runs(folder: Path) -> Runs:
    """Results by arm, arms as in `ARMS`, seeds in order."""
    runs: Runs = {}
    for file in sorted(folder.glob("*__seed_*.json")):
        runs.setdefault(file.stem.split("__seed_")[0], []).append(with_automatic(json.loads(file.read_text())))
    order = list(ARMS)
    return dict(sorted(runs.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def with_automatic(run: dict[str, Any]) -> dict[str, Any]:
    """The same with what the automatic number gives with the threshold that these cases set, as a validation does."""
    by_threshold = run["dice"].get(AUTOMATIC)
    if by_threshold:
        rows = [{"stop_at": float(k), "mean_dice": mean_dice([np.array(of)])} for k, of in by_threshold.items()]
        threshold = threshold_of([{"cases": run["cases"], "thresholds": rows}], DEFAULT_MAX_DROP)
        for of_methods in (run["dice"], run.get("taken", {})):  # the first runs lack `taken`
            if AUTOMATIC in of_methods:
                of_methods[AUTOMATIC][CALIBRATED] = of_methods[AUTOMATIC][str(threshold)]
    return run


def dice(runs: list[dict[str, Any]], method: str, k: str) -> np.ndarray:
    """Mean Dice of the classes by seed, in per cent."""
    return np.array([100 * np.mean(run["dice"][method][k]) for run in runs if k in run["dice"].get(method, {})])


def cell(values: np.ndarray) -> str:
    """Mean and, of several seeds, standard deviation."""
    if not len(values):
        return ""
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def share_of_oracles_gain(runs: list[dict[str, Any]], method: str, k: str) -> np.ndarray:
    """By seed, in per cent: what windows add to the global branch's Dice, of what the oracle's as many add."""
    alone, oracle = dice(runs, "global branch", "0"), dice(runs, "oracle", k)
    chosen = dice(runs, method, k)
    return 100 * (chosen - alone) / (oracle - alone) if len(chosen) == len(alone) else alone[:0]


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [row(*cells), "|---" * len(cells) + "|"]


def table(folder: Path, dataset_ids: list[int]) -> str:
    """Markdown of all results."""
    lines = [
        "Mean Dice of the foreground classes in per cent, mean ± standard deviation over seeds. Sampled with "
        "foreground: share of the windows drawn in the first and in the last epoch that hold foreground."
    ]
    for dataset_id in dataset_ids:
        for epochs, runs in runs_by_length(folder, dataset_id).items():
            lines += [f"\n### {DATASETS[dataset_id].folder}, {epochs} epochs\n", *arms_table(runs)]
            for arm in SELECTION_ARMS:
                if arm in runs:
                    lines += [f"\nWays to pick windows with the networks of `{arm}`:\n", *selections_table(runs[arm])]
                    lines += [
                        f"\nAs many windows as have a predicted benefit above a threshold, greedily, `{arm}`:\n",
                        *automatic_table(runs[arm]),
                    ]
    return "\n".join(lines) + "\n"


def arms_table(runs: Runs) -> list[str]:
    """Arms, each with its own way to pick windows."""
    columns = ["arm", "seeds", "sliding window", "global branch", *(f"K = {k}" for k in KS), "all windows"]
    columns += ["oracle, K = 10", "share of its gain, K = 10, %", "sampled with foreground"]
    lines = head(*columns)
    for arm, of_arm in runs.items():
        selection = own_selection(arm)
        drawn = [run["training"]["foreground_share"] for run in of_arm if run["training"]]
        first, last = (100 * np.mean([epochs[epoch] for epochs in drawn]) if drawn else 0 for epoch in (0, -1))
        lines += [
            row(
                f"`{arm}`",
                str(len(of_arm)),
                cell(dice(of_arm, "sliding window", "all")),
                cell(dice(of_arm, "global branch", "0")),
                *(cell(dice(of_arm, selection, k)) for k in KS),
                cell(dice(of_arm, "all windows", "all")),
                cell(dice(of_arm, "oracle", "10")),
                cell(share_of_oracles_gain(of_arm, selection, "10")),
                f"{first:.0f}% → {last:.0f}%" if drawn else "",
            )
        ]
    return lines


def selections_table(of_arm: list[dict[str, Any]]) -> list[str]:
    """Ways to pick windows with the same networks."""
    lines = head("windows by", *(f"K = {k}" for k in KS), "share of the oracle's gain, K = 10, %")
    for selection, name in SELECTION_NAMES.items():
        shares = cell(share_of_oracles_gain(of_arm, selection, "10"))
        lines += [row(name, *(cell(dice(of_arm, selection, k)) for k in KS), shares)]
    return lines


def automatic_table(of_arm: list[dict[str, Any]]) -> list[str]:
    """Dice and number of windows by threshold of the predicted benefit."""
    lines = head("threshold", "windows a case", "mean Dice")
    taken = [run.get("taken", {}).get(AUTOMATIC, {}) for run in of_arm]
    for threshold in taken[0]:
        windows = np.array([of_run[threshold] for of_run in taken])
        lines += [row(threshold, cell(windows), cell(dice(of_arm, AUTOMATIC, threshold)))]
    return lines


CURVES = (
    ("default, oracle", "default", "oracle"),
    ("default", "default", "greedy_benefit"),
    ("default, entropy (top-k)", "default", "entropy"),
    ("default, random", "default", "random"),
    ("contribution", "path_contribution", "greedy_benefit"),
    ("the paper's", "paper", "top_k"),
)
"""Label, arm and way to pick windows of the lines in the plot."""


def plot(folder: Path, dataset_ids: list[int], file: Path) -> None:
    """Dice against K of the most telling arms and the stock sliding window, longest training, a panel a dataset."""
    figure = Figure(figsize=(5.5 * len(dataset_ids), 4.6), layout="constrained")
    axes = figure.subplots(1, len(dataset_ids), squeeze=False)[0]
    counts = [k for k in KS if not k.endswith("%")]
    lines: dict[str, Any] = {}
    for axis, dataset_id in zip(axes, dataset_ids, strict=True):
        for runs in list(runs_by_length(folder, dataset_id).values())[-1:]:
            if STOCK in runs:
                level = dice(runs[STOCK], "sliding window", "all").mean()
                lines["stock sliding window"] = axis.axhline(level, color="black", linestyle="--")
            for index, (label, arm, method) in enumerate(CURVES):
                if arm not in runs or not len(dice(runs[arm], method, "10")):
                    continue
                values = [dice(runs[arm], method, k) for k in counts]
                means = [value.mean() for value in values]
                spread = [value.std(ddof=1) if len(value) > 1 else 0 for value in values]
                style = {"color": COLOURS[index % len(COLOURS)], "marker": "osD^vPX*"[index % 8], "capsize": 3}
                lines[label] = axis.errorbar([int(k) for k in counts], means, spread, **style)
        axis.set(title=DATASETS[dataset_id].folder, xlabel="patches a case (K)", ylabel="mean Dice, %", xscale="log")
        axis.set_xticks([int(k) for k in counts], counts)
        axis.minorticks_off()
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, frameon=False)
    save(figure, file)


BY_LENGTH = (
    ("stock nnU-Net, sliding window, step 0.5", STOCK, "sliding window", "all"),
    ("stock nnU-Net, step 1", STOCK, "sliding window", "step 1.0"),
    ("stock nnU-Net, step 1, empty windows skipped", STOCK, "sliding window", "step 1.0, empty windows skipped"),
    ("NMSW, automatic number (the default)", "default", AUTOMATIC, CALIBRATED),
    ("NMSW, K = 5%", "default", "greedy_benefit", "5%"),
    ("NMSW, K = 10%", "default", "greedy_benefit", "10%"),
    ("NMSW, K = 20%", "default", "greedy_benefit", "20%"),
    ("NMSW, all windows", "default", "all windows", "all"),
    ("global branch alone", "default", "global branch", "0"),
    ("local branch, sliding window, step 0.5", "default", "sliding window", "all"),
    ("random windows with predicted foreground, K = 10%", "default", "random", "10%"),
    ("windows by entropy, K = 10%", "default", "entropy", "10%"),
    ("zoom-in on predicted objects", "default", "objects", "own"),
    ("NMSW, as many windows as zoom-in", "default", "greedy_benefit", AS_OBJECTS),
    ("windows by entropy, as many as zoom-in", "default", "entropy", AS_OBJECTS),
    ("oracle, K = 10%", "default", "oracle", "10%"),
)
"""Label, arm, way to pick windows and K of the rows of `lengths_table`."""


def lengths_table(folder: Path, dataset_id: int) -> str:
    """Dice, and windows a case, by method and length of the training, in Markdown."""
    runs = runs_by_length(folder, dataset_id)
    lines = head("", *(f"{epochs} epochs" for epochs in runs))
    for label, arm, method, k in BY_LENGTH:
        cells = []
        for of_length in runs.values():
            of_arm = of_length.get(arm, [])
            value = cell(dice(of_arm, method, k))
            windows = [run["taken"][method][k] for run in of_arm if k in run.get("taken", {}).get(method, {})]
            cells.append(f"{value} ({np.mean(windows):.0f})" if value and windows and any(windows) else value)
        lines += [row(label, *cells)] if any(cells) else []
    for name, arm in (("stock nnU-Net", STOCK), ("NMSW", "default")):
        # A training that was interrupted has no seconds, or too many.
        times = [
            [run["seconds_of_training"] for run in of.get(arm, []) if "seconds_of_training" in run]
            for of in runs.values()
        ]
        cells = [f"{min(of) / 60:.0f}" if of else "" for of in times]
        lines += [row(f"minutes of training, {name}, the shortest", *cells)]
    return "\n".join(lines)


def runs_by_length(folder: Path, dataset_id: int) -> dict[int, Runs]:
    """Results by number of epochs."""
    folders = (folder / DATASETS[dataset_id].folder).glob("*_epochs")
    lengths = {int(of_length.name.split("_")[0]): of_length for of_length in folders}
    return {epochs: load_runs(lengths[epochs]) for epochs in sorted(lengths)}


LEARNING_CURVES = (
    ("stock, sliding window", STOCK, "sliding window", "all"),
    ("NMSW, automatic number", "default", AUTOMATIC, CALIBRATED),
    ("NMSW, all windows", "default", "all windows", "all"),
    ("global branch alone", "default", "global branch", "0"),
    ("local branch, sliding window", "default", "sliding window", "all"),
)
"""Label, arm, way to pick windows and K of the lines against the length of the training."""


def learning_curves(folder: Path, dataset_ids: list[int], file: Path) -> None:
    """Dice against the length of a training, each with its own schedule, a panel a dataset."""
    figure = Figure(figsize=(4.5 * len(dataset_ids), 4.2), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(dataset_ids), squeeze=False)[0])
    lines: dict[str, Any] = {}
    for axis, dataset_id in zip(axes, dataset_ids, strict=True):
        runs = runs_by_length(folder, dataset_id)
        for index, (label, arm, method, k) in enumerate(LEARNING_CURVES):
            points = {epochs: dice(of.get(arm, []), method, k) for epochs, of in runs.items()}
            points = {epochs: values for epochs, values in points.items() if len(values)}
            if points:
                style = {"color": COLOURS[index], "marker": "osD^v"[index]}
                means = [values.mean() for values in points.values()]
                lines[label] = axis.plot(list(points), means, **style)[0]
        axis.set(title=DATASETS[dataset_id].folder, xlabel="epochs of 250 steps", ylabel="mean Dice, %", xscale="log")
        axis.set_xticks(list(runs), list(map(str, runs)))
        axis.minorticks_off()
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=3, frameon=False)
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """Write a figure as SVG: the same one gives the same file."""
    with rc_context({"svg.hashsalt": file.stem}):
        figure.savefig(file, metadata={"Date": None})
