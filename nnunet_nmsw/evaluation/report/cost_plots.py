"""Dice against what it costs, patches and seconds.

Colours are Okabe and Ito's, told apart by the colour-blind; lines differ in marker and dash besides.
"""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nnunet_nmsw.evaluation.methods import Method
from nnunet_nmsw.evaluation.report.results import MethodResult, Results, Spread, pareto_front

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
"""What is grey."""


def figure_of(height: float = 4.2) -> tuple[Figure, Axes]:
    """An empty plot of the report's width, and a height in inches."""
    figure, axis = plt.subplots(figsize=(4.8, height))
    return figure, axis


def dice_by_patches(results: Results) -> Figure:
    """Mean Dice against the mean number of patches, a line for each way to choose windows."""
    figure, axis = figure_of(4.8)
    lines: dict[str, list[MethodResult]] = {}
    for result in results.methods:
        if result.method.num_patches is not None:
            lines.setdefault(result.method.series, []).append(result)
    for index, (series, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda r: r.patches)
        axis.plot(
            [r.patches for r in points],
            [100 * r.mean["Dice"] for r in points],
            **_style(index),
            markersize=5,
            linestyle="-" if index < 2 else "--",
            label=series,
        )
    step = results.comparison.reference.tile_step_size
    levels = [r for r in results.methods if r.method.tile_step_size == step or r.method.selection == "none"]
    for result, dash in zip(levels, ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 5))), strict=False):
        axis.axhline(100 * result.mean["Dice"], color="#555555", linestyle=dash, linewidth=1, label=result.method.name)
    axis.set_xscale("log")
    _log_ticks(axis)
    axis.set_xlabel("patches a case (mean)")
    axis.set_ylabel("mean Dice, %")
    figure.legend(loc="outside lower center", ncols=2, fontsize=6.5)
    return figure


def dice_by_seconds(results: Results) -> Figure | None:
    """Mean Dice against seconds from file to file; None where nothing was timed."""
    timed = [(r.method, r.cost.total_seconds, 100 * r.mean["Dice"]) for r in results.methods if r.cost is not None]
    if not timed:
        return None
    figure, axis = figure_of(5.2)
    points = [(seconds.median, dice) for _, seconds, dice in timed]
    front = [points[index] for index in pareto_front(points)]
    axis.plot(*zip(*front, strict=True), color="#555555", linewidth=1, label="Pareto front")
    series: dict[str, list[tuple[Method, Spread, float]]] = {}
    for point in timed:
        series.setdefault(point[0].series, []).append(point)
    for number, (name, of) in enumerate(series.items()):
        axis.errorbar(
            [seconds.median for _, seconds, _ in of],
            [dice for *_, dice in of],
            xerr=np.array([[s.median - s.low, s.high - s.median] for _, s, _ in of]).T,
            linestyle="none",
            linewidth=1,
            label=name,
            **{**_style(number), "markersize": 6},
        )
    _label(axis, [((seconds.median, dice), method) for method, seconds, dice in timed])
    axis.set_xscale("log")
    _log_ticks(axis)
    axis.set_xlabel("seconds a case, from file to file")
    axis.set_ylabel("mean Dice, %")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _style(index: int) -> dict[str, Any]:
    """Colour and marker of a series. The second time around, markers are others, and hollow."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + index // len(MARKERS)) % len(MARKERS)],
        "fillstyle": "full" if index < len(COLOURS) else "none",
    }


def _label(axis: Axes, points: list[tuple[tuple[float, float], Method]]) -> None:
    """Write K or the step above points, but not over another label."""
    labelled: list[tuple[float, float]] = []
    low, high = axis.get_ylim()
    for (seconds, dice), method in points:
        text = f"{method.num_patches or method.tile_step_size or ''}"
        near = any(abs(math.log(seconds / x)) < 0.12 and abs(dice - y) < 0.06 * (high - low) for x, y in labelled)
        if text and not near:
            labelled.append((seconds, dice))
            axis.annotate(text, (seconds, dice), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    axis.margins(0.08, 0.12)


def _log_ticks(axis: Axes) -> None:
    """Numbers at 1, 2 and 5, or a few more, and none between: they would lie on each other."""
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 100 else (1, 2, 3, 5, 7)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
