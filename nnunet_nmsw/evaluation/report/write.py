"""The report: `index.html`, one file that opens offline, and `report.md` with the same tables for a repository."""

from __future__ import annotations

import base64
import dataclasses
import html
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nnunet_nmsw.evaluation.machine import machine, versions
from nnunet_nmsw.evaluation.report.plots import Plot, shown_methods, write_plots
from nnunet_nmsw.evaluation.report.reached_table import reached_in_words, reached_table
from nnunet_nmsw.evaluation.report.results import MethodResult, Results, gather
from nnunet_nmsw.evaluation.report.tables import (
    accuracy_table,
    case_table,
    class_table,
    cost_table,
    main_table,
    with_interval,
)
from nnunet_nmsw.evaluation.report.viewer import CLASS_COLOURS, ShownCase, show_case
from nnunet_nmsw.evaluation.statistics import verdict
from nnunet_nmsw.evaluation.stock_models import StockModels
from nnunet_nmsw.evaluation.store import Comparison
from nnunet_nmsw.files import write_json, write_text


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
    tables.append(class_table(results))
    if any(result.reached for result in results.methods):
        tables.append(reached_table(results))
    answer = sentences(results, margin)
    shown = _shown_cases(results, cases_shown)
    context = {
        "results": results,
        "comparison": comparison,
        "folds": sorted({case.fold for case in comparison.cases}),
        "answer": answer,
        "further": further(results, margin),
        "first": [main_table(results), case_table(results)],
        "tables": tables,
        "margin": margin,
        "machine": machine_of(comparison),
        "versions": versions(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nnunet_nmsw.evaluation.report"),
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
    markdown = environment.overlay(finalize=_escaped)
    write_text(comparison.folder / "index.html", page)
    write_text(comparison.folder / "report.md", markdown.get_template("report.md").render(**context, plots=plots))
    write_json(comparison.folder / "results.json", _finite(_plain(results, context)))
    return answer


def sentences(results: Results, margin: float) -> list[str]:
    """The answer in plain words."""
    comparison = results.comparison
    primary = results.of(comparison.primary)
    reference = results.of(comparison.reference)
    answer = [_held_against(results, primary, margin)]
    cost = (
        f"It takes {primary.patches:.1f} patches a case instead of {reference.patches:.1f}, "
        f"{_times(primary.macs / reference.macs)} the multiply-accumulates"
    )
    if primary.cost is not None:
        if not isinstance(comparison.nmsw, StockModels):  # whose network seconds hold other things
            cost += f", {_times(primary.cost.network_ratio.median)} the seconds of the network"
        cost += f" and {_times(primary.cost.total_ratio.median)} the seconds from file to file"
    answer.append(cost + ".")
    found = [
        f"{share:.0%} with {result.method.name}"
        for result in results.methods
        if result.method in (reference.method, primary.method)
        for share in [1 - result.missed_objects / result.objects if result.objects else math.nan]
        if not math.isnan(share)
    ]
    if found and comparison.has_reference:
        answer.append(f"Objects of the reference that are found: {', '.join(found)}.")
    answer += reached_in_words(primary)
    return [*answer, *comparison.remarks]


def further(results: Results, margin: float) -> list[str]:
    """What patches bring, and the other numbers of patches, in plain words."""
    comparison = results.comparison
    primary = comparison.primary
    others = [
        r
        for r in results.methods
        if r.method.selection == primary.selection and r.method != primary and r.method.mirrored == primary.mirrored
    ]
    return [*_what_patches_bring(results), *(_held_against(results, other, margin) for other in others)]


def _held_against(results: Results, result: MethodResult, margin: float) -> str:
    """A method against the reference; without reference labels, how well it agrees with that."""
    comparison = results.comparison
    if comparison.has_reference:
        return verdict(result.method.name, comparison.reference.name, result.difference, margin)
    dice = 100 * result.mean["Dice"]
    return f"{result.method.name} agrees with the {comparison.reference.name} by a Dice of {dice:.1f}%."


def _what_patches_bring(results: Results) -> list[str]:
    """The choice of windows against none, other choices, and the oracle's, at the K of the primary method."""
    primary = results.of(results.comparison.primary)
    same = [r for r in results.methods if r.method.mirrored == primary.method.mirrored]
    alone = next(r for r in same if r.method.selection == "none")
    gain = results.difference(primary.method, alone.method)
    text = f"Its patches bring {with_interval(gain)} Dice points over the {alone.method.name}"
    others = [
        f"{100 * results.difference(r.method, alone.method).mean:+.1f} chosen by {who}"
        for selection, who in (("random", "chance"), ("entropy", "entropy"), ("oracle", "the oracle"))
        for r in same
        if r.method.selection == selection and r.method.num_patches == primary.method.num_patches
    ]
    return [f"{text}; at most as many bring {', '.join(others)}." if others else f"{text}."]


def machine_of(comparison: Comparison) -> str:
    """Where times were measured; this machine where none were."""
    measured = dict.fromkeys(entry["machine"] for entry in comparison.timings() if entry.get("machine"))
    return "; ".join(measured) or machine(comparison.device)


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
        record = comparison.record(case)
        shown.append(show_case(comparison, case, record, methods, text))
    return shown


def _plain(results: Results, context: dict[str, Any]) -> dict[str, Any]:
    """Everything that the tables were made of, as JSON types."""
    return {
        "answer": context["answer"],
        "further": context["further"],
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


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _times(value: float) -> str:
    return f"{value:.2f} times"


def _svg_uri(folder: Path, plot: Plot) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode((folder / f"{plot.name}.svg").read_bytes()).decode()


def _escaped(value: Any) -> Any:
    """A value for Markdown: names of cases and labels cannot end a cell, or begin a tag, a link or code."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = html.escape(" ".join(value.split()), quote=False)
    return re.sub(r"([\\`\[\]|])", r"\\\1", text)
