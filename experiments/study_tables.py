"""Tables of a study: what `nmsw_compare` found by arm, and what `fold_prediction.py` found of all else."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
from ablation_tables import head, own_selection, row
from grid import STOCK, Dataset
from study_runs import LOWRES, TWO_STOCK, Study

from nnunet_nmsw.evaluation.statistics import paired_difference

ROWS = (
    "nmsw_sliding_window_step_0.5",
    "nmsw_global_branch",
    "nmsw_greedy_benefit_5percent",
    "nmsw_greedy_benefit_10percent",
    "nmsw_greedy_benefit_20percent",
    "nmsw_greedy_benefit_auto",
    "nmsw_greedy_benefit_all",
    "nmsw_entropy_10percent",
    "nmsw_random_10percent",
    "nmsw_objects",
    "nmsw_oracle_10percent",
)
OF_STOCK = (
    "baseline_sliding_window_step_0.5",
    "baseline_sliding_window_step_1.0",
    "baseline_sliding_window_step_1.0_skipping",
)


def table(study: Study, dataset: Dataset, arms: list[str]) -> str:
    """Markdown of what is compared of a dataset."""
    lines = [f"### {dataset.folder}{study.backbone}, {study.args.epochs} epochs", ""]
    columns = ("arm", "method", "Dice, %", "difference to stock (95%)", "NSD, %", "missed objects", "patches")
    lines += head(*columns)
    first = True
    for name in arms:
        file = study.report(dataset, name) / "results.json"
        if not file.is_file():
            continue
        methods = json.loads(file.read_text())["methods"]
        for key in OF_STOCK if first else ():
            lines.append(table_row(STOCK, methods[key]))
        keys = [own_key(key, name, methods) for key in ROWS]
        lines += [table_row(name, methods[key]) for key in keys if key in methods]
        lines += rows_of_others(study, dataset, file.with_name("metrics.csv")) if first else []
        first = False
    return "\n".join(lines)


def own_key(key: str, arm: str, methods: dict[str, Any]) -> str:
    """A row of `ROWS` for an arm, which may pick windows in another way. Of all windows there is one selection."""
    own = key.replace("greedy_benefit", own_selection(arm))
    return own if own in methods or "auto" in key else key


def rows_of_others(study: Study, dataset: Dataset, of_report: Path) -> list[str]:
    """Rows of what no report has, with differences to the stock of a report.

    Args:
        study: the study.
        dataset: of it.
        of_report: metrics of each case, class and method of a report.
    """
    report = pd.read_csv(of_report)
    stock = report[report["method"] == OF_STOCK[0]].set_index(["case", "class"])
    rows = []
    for name in (LOWRES, *TWO_STOCK):
        files = [study.predicted(dataset, name, fold) / "metrics.csv" for fold in study.args.folds]
        if not all(file.is_file() for file in files):
            continue
        found = pd.concat(map(pd.read_csv, files)).set_index(["case", "class"])
        by_case = (found["Dice"] - stock["Dice"]).groupby("case").mean()
        means = found[["Dice", "NSD"]].groupby("class").mean().mean()
        difference = dataclasses.asdict(paired_difference(by_case, [0.0] * len(by_case)))
        what = "sliding window, step 0.5" if name == LOWRES else f"K = {name}"
        method = {
            "mean": means,
            "difference": difference,
            "method": {"name": what},
            "missed_objects": int(found["missed_objects"].sum()),
            "objects": int(found["objects"].sum()),
            "patches": math.nan,
        }
        rows.append(table_row("lowres" if name == LOWRES else "two stock models", method))
    return rows


def table_row(arm: str, method: dict[str, Any]) -> str:
    """A method in the table."""
    mean, difference = method["mean"], method["difference"]
    between = ""
    if difference:
        numbers = (100 * difference[key] for key in ("mean", "low", "high"))
        between = "{:+.1f} ({:+.1f} to {:+.1f})".format(*numbers)
    return row(
        arm,
        method["method"]["name"],
        f"{100 * mean['Dice']:.1f}",
        between,
        f"{100 * mean['NSD']:.1f}",
        f"{method['missed_objects']} of {method['objects']}",
        "" if math.isnan(method["patches"]) else f"{method['patches']:.1f}",
    )
