"""The plots of the report, each as SVG and PNG.

Colours are Okabe and Ito's, told apart by the colour-blind; lines differ in marker and dash besides.
"""

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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, ScalarFormatter

from nnunet_nmsw.evaluation.methods import Method
from nnunet_nmsw.evaluation.report.results import MethodResult, Results, pareto_front
from nnunet_nmsw.files import written_whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
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
            "dice_by_patches",
            "Dice against the number of patches",
            "Mean Dice over cases and classes. Horizontal lines are methods without a K.",
        ): _dice_by_patches(results),
        Plot(
            "dice_by_seconds",
            "Dice against seconds",
            "Seconds from file to file for one case, the model being loaded. The line joins the methods that no other "
            "beats in both (Pareto front); bars are quartiles over cases and rounds.",
        ): _dice_by_seconds(results),
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


def _figure(height: float = 4.2) -> tuple[Figure, Axes]:
    figure, axis = plt.subplots(figsize=(4.8, height))
    return figure, axis


def _dice_by_patches(results: Results) -> Figure:
    figure, axis = _figure(4.8)
    lines: dict[str, list[MethodResult]] = {}
    for result in results.methods:
        if result.method.num_patches is not None:
            lines.setdefault(result.method.series, []).append(result)
    for index, (series, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda r: r.patches)
        axis.plot(
            [r.patches for r in points],
            [100 * r.mean["Dice"] for r in points],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linestyle="-" if index < 2 else "--",
            label=series,
        )
    step = results.comparison.reference.tile_step_size
    levels = [r for r in results.methods if r.method.tile_step_size == step or r.method.selection == "none"]
    for result, dash in zip(levels, ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 5))), strict=False):
        axis.axhline(100 * result.mean["Dice"], color="#555555", linestyle=dash, linewidth=1, label=result.method.name)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}" if str(x)[0] in "25" else ""))
    axis.tick_params(axis="x", which="minor", labelsize=9)
    axis.set_xlabel("patches a case (mean)")
    axis.set_ylabel("mean Dice, %")
    figure.legend(loc="outside lower center", ncols=2, fontsize=6.5)
    return figure


def _dice_by_seconds(results: Results) -> Figure | None:
    timed = [(r, r.cost) for r in results.methods if r.cost is not None]
    if not timed:
        return None
    figure, axis = _figure(5.2)
    points = [(cost.total_seconds.median, 100 * r.mean["Dice"]) for r, cost in timed]
    front = pareto_front(points)
    axis.plot(
        [points[i][0] for i in front], [points[i][1] for i in front], color="#555555", linewidth=1, label="Pareto front"
    )
    series = list(dict.fromkeys(r.method.series for r, _ in timed))
    for index, name in enumerate(series):
        mine = [i for i, (r, _) in enumerate(timed) if r.method.series == name]
        spreads = [timed[i][1].total_seconds for i in mine]
        axis.errorbar(
            [points[i][0] for i in mine],
            [points[i][1] for i in mine],
            xerr=np.array([[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linestyle="none",
            linewidth=1,
            label=name,
        )
    annotated: list[tuple[float, float]] = []
    low, high = axis.get_ylim()
    for i in front:
        seconds, dice = points[i]
        if any(abs(math.log(seconds / x)) < 0.25 and abs(dice - y) < 0.06 * (high - low) for x, y in annotated):
            continue  # it would be written over another one
        annotated.append(points[i])
        method = timed[i][0].method
        what = (
            f"K = {method.num_patches}" if method.num_patches else method.tile_step_size and f"{method.tile_step_size}"
        )
        if what:
            axis.annotate(what, points[i], textcoords="offset points", xytext=(4, -11), fontsize=8)
    axis.set_xscale("log")
    formatter = FuncFormatter(lambda x, _: f"{x:g}")
    axis.xaxis.set_major_formatter(formatter)
    axis.xaxis.set_minor_formatter(formatter)
    axis.tick_params(axis="x", which="both", labelsize=9, rotation=45)
    axis.set_xlabel("seconds a case, from file to file")
    axis.set_ylabel("mean Dice, %")
    figure.legend(loc="outside lower center", ncols=2, fontsize=6.5)
    return figure


def _by_class(results: Results) -> Figure:
    methods = shown_methods(results)
    classes = list(results.comparison.label_names.values())
    figure, axis = _figure(max(3.2, 1 + 0.32 * len(classes) * (len(methods) + 1)))
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
    figure, axis = _figure(3.6)
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
    figure, axis = _figure(3.8)
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
