"""The plots of the report, each as SVG and PNG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from nnunet_nmsw.evaluation.methods import Method
from nnunet_nmsw.evaluation.report.cost_plots import COLOURS, MARKERS, dice_by_patches, dice_by_seconds, figure_of
from nnunet_nmsw.evaluation.report.results import Results
from nnunet_nmsw.files import written_whole

SIZE_EDGES_MM = (0, 5, 10, 20, 40, math.inf)
"""Edges of the classes of object size, diameter of the sphere of the object's volume."""

STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names of cases and labels may have dollar signs
}


class Plot(NamedTuple):
    """A plot that was written.

    Attributes:
        name: of its files, NAME.svg and NAME.png.
        title: its heading.
        caption: how to read it, also the text for those who cannot see it.
    """

    name: str
    title: str
    caption: str


def write_plots(results: Results, folder: Path) -> list[Plot]:
    """Draw every plot there is data for into a folder."""
    folder.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        return _write_plots(results, folder)


def _write_plots(results: Results, folder: Path) -> list[Plot]:
    drawings = {
        Plot(
            "dice_by_seconds",
            "Dice against seconds",
            "Seconds from file to file for one case, the model being loaded. The grey line joins the methods that no "
            "other beats in both (Pareto front); bars are quartiles over cases and rounds.",
        ): dice_by_seconds(results),
        Plot(
            "dice_by_patches",
            "Dice against the number of patches",
            "Mean Dice over cases and classes. Horizontal lines are methods without a K.",
        ): dice_by_patches(results),
        Plot(
            "by_class",
            "Dice by class",
            "Each dot is a case, the box its quartiles, the line the median.",
        ): _by_class(results),
        Plot(
            "by_case",
            "Which cases gain and which lose",
            f"Dice of {results.comparison.primary.name} minus that of the {results.comparison.reference.name}, in "
            "points, a bar a case, sorted. The table of cases says why.",
        ): _by_case(results),
        Plot(
            "objects_by_size",
            "Objects found, by size",
            "Share of reference objects that the prediction overlaps by at least a voxel. Size is the diameter of the "
            "sphere of the object's volume.",
        ): _objects_by_size(results),
    }
    plots = []
    for plot, figure in drawings.items():
        if figure is not None:
            with written_whole(folder) as unfinished:
                figure.savefig(unfinished / f"{plot.name}.svg", metadata={"Date": None})
                figure.savefig(unfinished / f"{plot.name}.png", dpi=150)
            plt.close(figure)
            plots.append(plot)
    return plots


def shown_methods(results: Results) -> list[Method]:
    """The methods that plots by class and size show: reference, local branch alone, global branch alone, primary."""
    comparison = results.comparison
    step = comparison.reference.tile_step_size
    mirrored = comparison.primary.mirrored
    local = [m for m in comparison.methods if (m.model, m.tile_step_size, m.mirrored) == ("nmsw", step, mirrored)]
    coarse = [m for m in comparison.methods if (m.selection, m.mirrored) == ("none", mirrored)]
    return list(dict.fromkeys([comparison.reference, *local, *coarse, comparison.primary]))


def _by_class(results: Results) -> Figure:
    methods = shown_methods(results)
    classes = list(results.comparison.label_names.values())
    figure, axis = figure_of(max(3.2, 1 + 0.32 * len(classes) * (len(methods) + 1)))
    rng = np.random.default_rng(0)
    positions = []
    for row, name in enumerate(classes):
        for index, method in enumerate(methods):
            rows = results.table[(results.table["method"] == method.key) & (results.table["class"] == name)]
            dice = 100 * rows["Dice"].dropna().to_numpy()
            position = -(row * (len(methods) + 1) + index)
            positions.append((position, name if index == 0 else ""))
            colour = COLOURS[index % len(COLOURS)]
            jitter = rng.uniform(-0.25, 0.25, len(dice))
            axis.plot(dice, position + jitter, MARKERS[index], color=colour, markersize=3, alpha=0.5)
            if len(dice):
                axis.boxplot(
                    dice,
                    positions=[position],
                    orientation="horizontal",
                    widths=0.7,
                    showfliers=False,
                    medianprops={"color": colour, "linewidth": 2},
                    boxprops={"color": colour},
                    whiskerprops={"color": colour},
                    capprops={"color": colour},
                )
            axis.plot([], [], MARKERS[index], color=colour, label=method.name if row == 0 else None)
    axis.set_yticks([p for p, name in positions if name], [name for _, name in positions if name])
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("Dice, %")
    figure.legend(loc="outside lower center", fontsize=8)
    return figure


def _by_case(results: Results) -> Figure:
    difference = 100 * results.difference_by_case(results.comparison.primary).dropna().sort_values()
    figure, axis = figure_of(3.6)
    colours = [COLOURS[1] if value < 0 else COLOURS[0] for value in difference]
    axis.bar(range(len(difference)), difference, color=colours, hatch=None, width=0.85)
    axis.axhline(0, color="#000000", linewidth=0.8)
    axis.set_xlabel(f"{len(difference)} cases, from the largest loss to the largest gain")
    axis.set_ylabel("difference in Dice points")
    if len(difference) <= 20:
        axis.set_xticks(range(len(difference)), list(difference.index), rotation=90, fontsize=8)
    else:
        axis.set_xticks([])
    return figure


def _objects_by_size(results: Results) -> Figure | None:
    methods = shown_methods(results)
    figure, axis = figure_of(3.8)
    drawn = False
    labels: list[str] = []
    for index, method in enumerate(methods):
        shares, labels = found_by_size(results, method)
        drawn = drawn or bool(shares)
        offsets = np.arange(len(shares)) + (index - (len(methods) - 1) / 2) * 0.8 / len(methods)
        axis.bar(
            offsets,
            [100 * share for share in shares],
            width=0.8 / len(methods),
            color=COLOURS[index],
            edgecolor="white",
            hatch=("", "//", "..", "xx")[index % 4],
            label=method.name,
        )
    if not drawn:
        plt.close(figure)
        return None
    axis.set_xticks(range(len(labels)), labels)
    axis.set_ylabel("objects found, %")
    axis.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", fontsize=8)
    return figure


def found_by_size(results: Results, method: Method) -> tuple[list[float], list[str]]:
    """Share of reference objects that a method found, by class of size, and the names of the classes that occur."""
    lists: Sequence[list[list[float]]] = results.table[results.table["method"] == method.key]["objects_found"].tolist()
    found = [(2 * (3 * volume / (4 * math.pi)) ** (1 / 3), bool(hit)) for objects in lists for volume, hit in objects]
    shares, labels = [], []
    for low, high in itertools.pairwise(SIZE_EDGES_MM):
        hits = [hit for diameter, hit in found if low <= diameter < high]
        if hits:
            shares.append(sum(hits) / len(hits))
            size = f"{low:g} mm and more" if high == math.inf else f"{low:g} to {high:g} mm"
            labels.append(f"{size}\n{len(hits)} objects")
    return shares, labels
