"""The tables of the report."""

from __future__ import annotations

import dataclasses
import math

from nnunet_nmsw.evaluation.machine import GIB
from nnunet_nmsw.evaluation.metrics import METRICS
from nnunet_nmsw.evaluation.report.facts import case_facts, why
from nnunet_nmsw.evaluation.report.results import MethodResult, Results, Spread
from nnunet_nmsw.evaluation.statistics import PairedDifference


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table: what it says, and the value it is sorted by."""

    text: str
    value: float | str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table for HTML and Markdown.

    Attributes:
        title: heading.
        note: what the columns mean.
        columns: their names.
        rows: their cells.
        marked: rows to highlight.
    """

    title: str
    note: str
    columns: list[str]
    rows: list[list[Cell]]
    marked: frozenset[int] = frozenset()


def main_table(results: Results) -> Table:
    """The few methods that a reader decides between."""
    timed, tested = any(result.cost for result in results.main), _tested(results)
    rows = []
    for result in results.main:
        row = [Cell(result.method.name, result.method.name), _metric("Dice", result.mean), *_compared(results, result)]
        row += [
            _metric("NSD", result.mean),
            Cell(f"{result.missed_objects} of {result.objects}", result.missed_objects),
        ]
        row.append(_number(result.patches))
        if timed:
            cost = result.cost
            seconds = math.nan if cost is None else cost.total_seconds.median
            faster = math.nan if cost is None else 1 / cost.total_ratio.median
            row += [
                Cell("–" if math.isnan(seconds) else f"{seconds:.3g}", seconds),
                _number(faster),
            ]
        rows.append(row)
    return Table(
        "What matters",
        "Dice and surface Dice in per cent, means over cases, then classes. Difference: in Dice points, with its 95% "
        "interval."
        + (" p: Wilcoxon's test, corrected for these comparisons." if tested else "")
        + (" Seconds: from file to file, the model being loaded." if timed else ""),
        ["method", "Dice", "difference", *(["p"] if tested else []), "NSD", "missed objects", "patches"]
        + (["seconds", "times faster"] if timed else []),
        rows,
        _marked(results, results.main),
    )


def accuracy_table(results: Results) -> Table:
    """One row a method."""
    tested = _tested(results)
    rows = [
        [
            Cell(result.method.name, result.method.name),
            _metric("Dice", result.mean),
            *_compared(results, result),
            *(_metric(name, result.mean) for name in METRICS if name != "Dice"),
            Cell(f"{result.missed_objects} of {result.objects}", result.missed_objects),
            Cell(str(result.false_positive_objects), result.false_positive_objects),
            _number(result.patches),
            Cell(f"{result.share:.0%}", result.share),
        ]
        for result in results.methods
    ]
    tolerance_mm = results.comparison.tolerance_mm
    with_oracle = any(result.method.selection == "oracle" for result in results.methods)
    meanings = " ".join(metric.meaning.format(tolerance_mm=tolerance_mm) for metric in METRICS.values())
    return Table(
        "Accuracy of all methods",
        f"{meanings} Means over cases, then classes. Difference: in Dice "
        "points to the reference, mean over cases with 95% bootstrap interval (too narrow with fewer than about 20 "
        "cases), over what both methods have a value for: what one of them makes up where the class is not there "
        "lowers its Dice and counts as a false object, but is not in the difference. p: Wilcoxon's signed-rank test "
        "of the comparisons that were planned, with Holm's correction; none where so few cases could not show a "
        "difference. Objects are connected components; missed: no voxel of it predicted; false: overlaps "
        "none of the reference. Patches: mean a case, and their share of the same model's sliding window's at step "
        "0.5."
        + " The oracle knows the reference: what any choice of windows could reach with these networks."
        * with_oracle,
        [
            "method",
            "Dice",
            "difference",
            *(["p"] if tested else []),
            *(name for name in METRICS if name != "Dice"),
            "missed objects",
            "false objects",
            "patches",
            "share",
        ],
        rows,
        _marked(results, results.methods),
    )


def cost_table(results: Results) -> Table:
    """One row a method that was timed."""
    timed = [(result, result.cost) for result in results.methods if result.cost is not None]
    reference = results.of(results.comparison.reference)
    with_device = any(cost.device_peak_bytes is not None for _, cost in timed)
    rows = []
    for result, cost in timed:
        row = [
            Cell(result.method.name, result.method.name),
            _number(result.patches),
            Cell(f"{result.macs / 1e9:.3g}", result.macs),
            _ratio(result.macs / reference.macs),
            _spread(cost.network_seconds),
            _ratio(cost.network_ratio.median),
            _spread(cost.total_seconds),
            _ratio(cost.total_ratio.median),
            _gib(cost.host_peak_bytes),
        ]
        rows.append([*row, _gib(cost.device_peak_bytes)] if with_device else row)
    return Table(
        "Cost of all methods",
        "GMAC: billions of multiply-accumulates of all networks a case, mean over all cases. Seconds: median "
        "(quartiles) over timed cases and rounds, each method alone in a process of its own, in turns; network: from "
        "the preprocessed volume to its logits, with NMSW to labels of the image; file to file: with reading, "
        "preprocessing, export and writing, the model being loaded. ×: as a ratio to the reference, same case and "
        "round. Memory: largest of the process, Python and its libraries included."
        + " Random windows and those by entropy cost what NMSW costs at the same K; the oracle cannot be deployed."
        * any(result.method.selection == "oracle" for result in results.methods),
        [
            "method",
            "patches",
            "GMAC",
            "× GMAC",
            "network, s",
            "× network",
            "file to file, s",
            "× file to file",
            "host, GiB",
            *(["device, GiB"] if with_device else []),
        ],
        rows,
        _marked(results, [result for result, _ in timed]),
    )


def class_table(results: Results) -> Table:
    """One row a class and method, of the methods that one would use."""
    shown = [r for r in results.methods if not r.method.is_yardstick or r.method.selection == "none"]
    rows = [
        [
            Cell(name, name),
            Cell(result.method.name, result.method.name),
            *(_metric(metric, result.by_class[name]) for metric in METRICS),
        ]
        for name in results.comparison.label_names.values()
        for result in shown
    ]
    return Table(
        "By class",
        "Means over the cases that have a value. metrics.csv has every case and method.",
        ["class", "method", *METRICS],
        rows,
        _marked(results, shown * len(results.comparison.label_names)),
    )


def case_table(results: Results, number: int = 5) -> Table:
    """The cases that lose most with the primary method, and why."""
    comparison = results.comparison
    primary, reference = comparison.primary, comparison.reference
    difference = results.difference_by_case(primary).dropna().sort_values()
    rows = []
    for case, value in difference.head(number).items():
        mine, theirs = case_facts(results, str(case), primary, reference)
        rows.append(
            [
                Cell(str(case), str(case)),
                _number(100 * mine["Dice"]),
                _number(100 * theirs["Dice"]),
                Cell(f"{100 * value:+.1f}", value),
                Cell("–" if math.isnan(mine["covered"]) else f"{mine['covered']:.0%}", mine["covered"]),
                Cell(f"{mine['missed']:.0f} / {theirs['missed']:.0f}", mine["missed"]),
                Cell(f"{mine['false']:.0f} / {theirs['false']:.0f}", mine["false"]),
                Cell(why(float(value), mine, theirs), ""),
            ]
        )
    return Table(
        "Cases that lose most" if comparison.has_reference else "Cases that agree least",
        f"{primary.name} against the {reference.name}, Dice in per cent, mean over the classes for which "
        "both have one. Covered: share of the "
        "reference's foreground inside of a chosen window. Objects: with NMSW / with the sliding window.",
        [
            "case",
            "Dice",
            "Dice, sliding window",
            "difference",
            "covered",
            "missed objects",
            "false objects",
            "why",
        ],
        rows,
    )


def with_interval(difference: PairedDifference) -> str:
    """Mean difference in Dice points and its interval, where there is one."""
    mean, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
    if math.isnan(mean):
        return "–"
    return f"{mean:+.1f}" if math.isnan(low) else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _tested(results: Results) -> bool:
    """Whether any comparison has a p."""
    has_p = any(not math.isnan(result.difference.p_holm) for result in results.methods)
    return has_p and results.comparison.has_reference


def _compared(results: Results, result: MethodResult) -> list[Cell]:
    """Difference to the reference, and p where there is one."""
    difference, is_reference = result.difference, result.method == results.comparison.reference
    cell = Cell("reference", 0.0) if is_reference else Cell(with_interval(difference), difference.mean)
    p = Cell("", 2.0) if is_reference else Cell(_p(difference.p_holm), difference.p_holm)
    return [cell, p] if _tested(results) else [cell]


def _marked(results: Results, rows: list[MethodResult]) -> frozenset[int]:
    marked = (results.comparison.reference, results.comparison.primary)
    return frozenset(index for index, result in enumerate(rows) if result.method in marked)


def _number(value: float) -> Cell:
    return Cell("–" if math.isnan(value) else f"{value:.1f}", value)


def _metric(name: str, values: dict[str, float]) -> Cell:
    return _number(100 * values[name] if METRICS[name].percent else values[name])


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _ratio(value: float) -> Cell:
    return Cell(f"{value:.2f}", value)


def _spread(spread: Spread) -> Cell:
    return Cell(f"{spread.median:.3g} ({spread.low:.3g}–{spread.high:.3g})", spread.median)


def _gib(value: float | None) -> Cell:
    return Cell("–", math.nan) if value is None else Cell(f"{value / GIB:.2f}", value)
