"""The report: `index.html`, one file that opens offline, and `report.md` with the same tables for a repository."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import jinja2
import torch

from nnunet_nmsw.evaluation.comparison import Comparison, versions, write_json
from nnunet_nmsw.evaluation.methods import Method
from nnunet_nmsw.evaluation.models import unchecked_folds
from nnunet_nmsw.evaluation.plots import Plot, shown_methods, write_plots
from nnunet_nmsw.evaluation.results import METRICS, MethodResult, Results, Spread, gather
from nnunet_nmsw.evaluation.statistics import PairedDifference, verdict
from nnunet_nmsw.evaluation.viewer import CLASS_COLOURS, ShownCase, show_case

GIB = 2**30


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


def write_report(comparison: Comparison, margin: float, cases_shown: int) -> list[str]:
    """Write tables, plots and pages of a finished comparison.

    Args:
        comparison: with records of all cases.
        margin: loss in Dice points (per cent) that would matter.
        cases_shown: number of cases in the slice viewer.

    Returns:
        The report's answer as sentences.
    """
    results = gather(comparison)
    plots = write_plots(results, comparison.folder / "plots")
    tables = [accuracy_table(results)]
    if any(result.cost for result in results.methods):
        tables.append(cost_table(results))
    tables += [class_table(results), case_table(results)]
    answer = sentences(results, margin)
    shown = _shown_cases(results, cases_shown)
    context = {
        "results": results,
        "comparison": comparison,
        "folds": sorted({case.fold for case in comparison.cases}),
        "answer": answer,
        "tables": tables,
        "margin": margin,
        "machine": machine(comparison.device),
        "versions": versions(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nnunet_nmsw.evaluation"),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    colours = {
        name: CLASS_COLOURS[index % len(CLASS_COLOURS)] for index, name in enumerate(comparison.label_names.values())
    }
    page = environment.get_template("index.html").render(
        **context,
        plots=[(plot, _svg_uri(comparison.folder / "plots", plot)) for plot in plots],
        cases=[dataclasses.asdict(case) for case in shown],
        colours=colours,
    )
    _write(comparison.folder / "index.html", page)
    _write(comparison.folder / "report.md", environment.get_template("report.md").render(**context, plots=plots))
    write_json(comparison.folder / "results.json", _finite(_plain(results, context)))
    return answer


def accuracy_table(results: Results) -> Table:
    """One row a method."""
    rows = []
    for result in results.methods:
        difference = result.difference
        if result.method == results.comparison.reference:
            compared = [Cell("reference", 0.0), Cell("", 2.0)]
        else:
            compared = [
                Cell(_with_interval(difference), difference.mean),
                Cell(_p(difference.p_holm), difference.p_holm),
            ]
        rows.append(
            [
                Cell(result.method.name, result.method.name),
                _number(100 * result.mean["Dice"]),
                *compared,
                _number(100 * result.mean["NSD"]),
                _number(result.mean["HD95"]),
                Cell(f"{result.missed_objects} of {result.objects}", result.missed_objects),
                Cell(str(result.false_positive_objects), result.false_positive_objects),
                _number(result.patches),
                Cell(f"{result.share:.0%}", result.share),
            ]
        )
    comparison = results.comparison
    return Table(
        "Accuracy",
        "Dice and NSD (normalised surface Dice at "
        f"{comparison.tolerance_mm:g} mm) in per cent, HD95 in mm: means over cases, then classes. Difference: in Dice "
        "points to the reference, mean over cases with 95% bootstrap interval (too narrow with fewer than about 20 "
        "cases), over what both methods have a value for: what one of them makes up where the class is not there "
        "lowers its Dice and counts as a false object, but is not in the difference. HD95 of a class that only one of "
        "prediction and reference has is the diagonal of the image. p: Wilcoxon's signed-rank test with Holm's "
        "correction. Objects are connected components; missed: no voxel of it predicted; false: overlaps none "
        "of the reference. Patches: mean a case, and their share of the same model's sliding window's at step 0.5. The "
        "oracle knows the reference: what any choice of windows could reach with the same networks.",
        [
            "method",
            "Dice",
            "difference",
            "p",
            "NSD",
            "HD95",
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
        "Cost",
        "GMAC: billions of multiply-accumulates of all networks a case, mean over all cases. Seconds: median "
        "(quartiles) over timed cases and rounds, each method alone in a process of its own, in turns; network: from "
        "the preprocessed volume to its logits; file to file: with reading, preprocessing, export and writing, the "
        "model being loaded. ×: as a ratio to the reference, same case and round. Memory: largest of the process, "
        "Python and its libraries included. Random windows and those by entropy cost what NMSW costs at the same K; "
        "the oracle cannot be deployed.",
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
            _number(100 * result.by_class[name]["Dice"]),
            _number(100 * result.by_class[name]["NSD"]),
            _number(result.by_class[name]["HD95"]),
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


def case_table(results: Results, number: int = 8) -> Table:
    """The cases that lose most with the primary method, and why."""
    comparison = results.comparison
    primary, reference = comparison.primary, comparison.reference
    difference = results.difference_by_case(primary).dropna().sort_values()
    rows = []
    for case, value in difference.head(number).items():
        of = {method.key: _case_facts(results, str(case), method) for method in (primary, reference)}
        mine, theirs = of[primary.key], of[reference.key]
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
        "Cases that lose most",
        f"{primary.name} against the {reference.name}, Dice in per cent, mean over classes. Covered: share of the "
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


def why(difference: float, mine: dict[str, float], theirs: dict[str, float]) -> str:
    """What a loss comes with, from the facts of both methods on a case."""
    if difference >= 0:
        return "no loss"
    reasons: list[str] = []
    if mine["covered"] < 0.95:
        reasons.append(f"{1 - mine['covered']:.0%} of the foreground lies outside of the windows")
    for key in ("missed", "false"):
        more = mine[key] - theirs[key]
        if more > 0:
            reasons.append(f"{more:.0f} more {key} object{'s' if more > 1 else ''}")
    return "; ".join(reasons) or "objects are no worse, borders are less exact"


def sentences(results: Results, margin: float) -> list[str]:
    """The answer in plain words."""
    comparison = results.comparison
    primary = results.of(comparison.primary)
    reference = results.of(comparison.reference)
    answer = [verdict(primary.method.name, reference.method.name, primary.difference, margin)]
    cost = (
        f"It takes {primary.patches:.1f} patches a case instead of {reference.patches:.1f}, "
        f"{_times(primary.macs / reference.macs)} the multiply-accumulates"
    )
    if primary.cost is not None:
        cost += (
            f", {_times(primary.cost.network_ratio.median)} the seconds of the network and "
            f"{_times(primary.cost.total_ratio.median)} the seconds from file to file"
        )
    answer.append(cost + ".")
    others = [
        r
        for r in results.methods
        if r.method.selection == "top_k" and r.method != primary.method and r.method.mirrored == primary.method.mirrored
    ]
    answer += _what_patches_bring(results)
    answer += [verdict(r.method.name, reference.method.name, r.difference, margin) for r in others]
    found = [
        f"{share:.0%} with {result.method.name}"
        for result in results.methods
        if result.method in (reference.method, primary.method)
        for share in [1 - result.missed_objects / result.objects if result.objects else math.nan]
        if not math.isnan(share)
    ]
    if found:
        answer.append(f"Objects of the reference that are found: {', '.join(found)}.")
    folds = sorted({case.fold for case in comparison.cases})
    unchecked = unchecked_folds(comparison.models, folds)
    if unchecked:
        answer.append(
            "Training left no validation, so that nothing shows whether the splits are still those that were trained "
            f"with: {'; '.join(unchecked)}."
        )
    return answer


def _what_patches_bring(results: Results) -> list[str]:
    """The choice of windows against none, other choices, and the oracle's, at the K of the primary method."""
    primary = results.of(results.comparison.primary)
    same = [r for r in results.methods if r.method.mirrored == primary.method.mirrored]
    alone = next(r for r in same if r.method.selection == "none")
    gain = results.difference(primary.method, alone.method)
    text = f"Its patches bring {_with_interval(gain)} Dice points over the global branch alone"
    others = [
        f"{100 * results.difference(r.method, alone.method).mean:+.1f} chosen by {who}"
        for selection, who in (("random", "chance"), ("entropy", "entropy"), ("oracle", "the oracle"))
        for r in same
        if r.method.selection == selection and r.method.num_patches == primary.method.num_patches
    ]
    return [f"{text}; at most as many bring {', '.join(others)}." if others else f"{text}."]


def machine(device: str) -> str:
    """Processor, memory and device in words."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    text = f"{os.cpu_count()} cores of {name}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        text += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB"
    accelerator = {"cuda": torch.cuda.get_device_name, "mps": lambda: "Apple GPU"}.get(device, lambda: "no GPU used")
    return f"{text}, {accelerator()}"


def _shown_cases(results: Results, number: int) -> list[ShownCase]:
    """Worst, best and typical cases first, then others between."""
    comparison = results.comparison
    primary, reference = comparison.primary, comparison.reference
    difference = results.difference_by_case(primary).dropna().sort_values()
    if not number or difference.empty:
        return []
    last = len(difference) - 1
    positions = list(dict.fromkeys([0, last, last // 2, *range(last + 1)]))[:number]
    methods = list(dict.fromkeys([primary, *shown_methods(results)]))
    by_name = {case.name: case for case in comparison.cases}
    shown = []
    for position in positions:
        name = str(difference.index[position])
        case = by_name[name]
        value = difference.iloc[position]
        first_is, last_is = (
            "largest loss" if value < 0 else "smallest gain",
            "largest gain" if value > 0 else "smallest loss",
        )
        rank = {last // 2: "median case", last: last_is, 0: first_is}.get(position, "")
        points = f"{100 * value:+.1f} Dice points"
        text = f"{rank + ': ' if rank and last else ''}{primary.name} is {points} from the {reference.name}"
        record = json.loads(comparison.record_file(case).read_text())
        shown.append(show_case(comparison, case, record, methods, text))
    return shown


def _case_facts(results: Results, case: str, method: Method) -> dict[str, float]:
    rows = results.table[(results.table["case"] == case) & (results.table["method"] == method.key)]
    return {
        "Dice": float(rows["Dice"].mean()),
        "covered": float(rows["covered_foreground"].iloc[0]),
        "missed": float(rows["missed_objects"].sum()),
        "false": float(rows["false_positive_objects"].sum()),
    }


def _marked(results: Results, rows: list[MethodResult]) -> frozenset[int]:
    marked = (results.comparison.reference, results.comparison.primary)
    return frozenset(index for index, result in enumerate(rows) if result.method in marked)


def _plain(results: Results, context: dict[str, Any]) -> dict[str, Any]:
    """Everything that the tables were made of, as JSON types."""
    return {
        "answer": context["answer"],
        "machine": context["machine"],
        "versions": context["versions"],
        "command": context["command"],
        "dataset": results.comparison.dataset,
        "cases": len(results.comparison.cases),
        "folds": context["folds"],
        "methods": {
            result.method.key: {
                **dataclasses.asdict(result),
                "method": {**dataclasses.asdict(result.method), "name": result.method.name},
            }
            for result in results.methods
        },
    }


def _with_interval(difference: PairedDifference) -> str:
    mean, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
    if math.isnan(mean):
        return "–"
    return f"{mean:+.1f}" if math.isnan(low) else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> Cell:
    return Cell("–" if math.isnan(value) else f"{value:.1f}", value)


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _ratio(value: float) -> Cell:
    return Cell(f"{value:.2f}", value)


def _times(value: float) -> str:
    return f"{value:.2f} times"


def _spread(spread: Spread) -> Cell:
    return Cell(f"{spread.median:.3g} ({spread.low:.3g}–{spread.high:.3g})", spread.median)


def _gib(value: float | None) -> Cell:
    return Cell("–", math.nan) if value is None else Cell(f"{value / GIB:.2f}", value)


def _svg_uri(folder: Path, plot: Plot) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode((folder / f"{plot.name}.svg").read_bytes()).decode()


def _write(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
