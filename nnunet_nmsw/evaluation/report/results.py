"""Tables of a comparison: from the records of its cases to one line a method."""

from __future__ import annotations

import dataclasses
import math
import shutil
from typing import Any

import numpy as np
import pandas as pd
from nnunetv2.evaluation.evaluate_predictions import key_to_label_or_region, save_summary_json

from nnunet_nmsw.evaluation.methods import SLIDING_WINDOW_STEPS, Method, planned_methods
from nnunet_nmsw.evaluation.metrics import METRICS
from nnunet_nmsw.evaluation.reached import Reached
from nnunet_nmsw.evaluation.statistics import PairedDifference, correct, paired_difference
from nnunet_nmsw.evaluation.store import Comparison
from nnunet_nmsw.files import written_whole

NNUNET_METRICS = ("Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref")


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: pd.Series) -> Spread:
        """Of at least one value."""
        low, median, high = np.quantile(values.to_numpy(float), [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Time and memory of a method over timed cases and rounds.

    Attributes:
        network_seconds: from the preprocessed volume to its logits; of NMSW, to labels on the image's grid.
        total_seconds: from file to file, the model being loaded.
        network_ratio: network seconds over those of the reference method, same case and round.
        total_ratio: the same for the seconds from file to file.
        host_peak_bytes: largest memory of the process; None where the system does not tell.
        device_peak_bytes: largest memory on the device; None on a CPU.
    """

    network_seconds: Spread
    total_seconds: Spread
    network_ratio: Spread
    total_ratio: Spread
    host_peak_bytes: float | None
    device_peak_bytes: float | None


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """What a method reached.

    Attributes:
        method: the method.
        by_class: metric by class name and name of the metric (`METRICS`), means over cases.
        mean: means of these over classes, as nnU-Net's foreground mean.
        difference: of Dice to the reference method: by case the mean over the classes that both have a value for.
        objects: number of reference objects.
        missed_objects: how many of them were missed.
        false_positive_objects: predicted objects without a reference.
        patches: mean over cases.
        share: patches as a share of those of the same model's sliding window at step 0.5, mean over cases.
        macs: multiply-accumulates, mean over cases.
        cost: time and memory; None where they were not measured.
        reached: by class name, of stock models: what the windows reach of the sliding windows' objects, over all cases.
    """

    method: Method
    by_class: dict[str, dict[str, float]]
    mean: dict[str, float]
    difference: PairedDifference
    objects: int
    missed_objects: int
    false_positive_objects: int
    patches: float
    share: float
    macs: float
    cost: Cost | None
    reached: dict[str, Reached] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything the report shows.

    Attributes:
        comparison: what was compared.
        table: one row a case, method and class: see `metrics_table`.
        methods: one entry a method, in the order of the comparison.
    """

    comparison: Comparison
    table: pd.DataFrame
    methods: list[MethodResult]

    def of(self, method: Method) -> MethodResult:
        """The result of a method."""
        return next(result for result in self.methods if result.method == method)

    @property
    def main(self) -> list[MethodResult]:
        """The reference and the comparisons that were planned."""
        comparison = self.comparison
        return [self.of(m) for m in (comparison.reference, *planned_methods(comparison.methods, comparison.primary))]

    def difference_by_case(self, method: Method) -> pd.Series:
        """Dice of a method minus the reference method's, mean over classes, by case."""
        return _difference_by_case(self.table, method, self.comparison.reference)

    def difference(self, method: Method, other: Method) -> PairedDifference:
        """Paired difference in Dice between any two methods."""
        return _paired(_difference_by_case(self.table, method, other))


def gather(comparison: Comparison) -> Results:
    """Make the tables of a finished comparison and write `metrics.csv` and nnU-Net's `summary.json` of each method."""
    records = comparison.records()
    table = metrics_table(records, comparison)
    with written_whole(comparison.folder) as unfinished:
        table.drop(columns="objects_found").to_csv(unfinished / "metrics.csv", index=False)
    for method in comparison.methods:
        _write_summary(records, comparison, method)
    costs = _costs(pd.DataFrame(comparison.timings()), comparison.reference)
    differences = correct(
        {
            method.key: _paired(_difference_by_case(table, method, comparison.reference))
            for method in comparison.methods
            if method != comparison.reference
        },
        [method.key for method in planned_methods(comparison.methods, comparison.primary)],
    )
    same = PairedDifference(len(records), 0.0, 0.0, 0.0, math.nan)
    return Results(
        comparison,
        table,
        [
            dataclasses.replace(
                _method_result(table, method, differences.get(method.key, same), costs.get(method.key)),
                reached=_reached(records, comparison, method),
            )
            for method in comparison.methods
        ],
    )


def metrics_table(records: list[dict[str, Any]], comparison: Comparison) -> pd.DataFrame:
    """One row a case, method and class.

    Columns: fold, case, method (key), name (for people), class, `METRICS`, objects (of the reference), missed_objects,
    false_positive_objects, patches, share (of the patches of the same model's sliding window at step 0.5), macs,
    covered_foreground, and objects_found (list of volume in mm³ and whether it was found).
    """
    rows = []
    reference = comparison.reference.key  # stock models have no sliding window but the baseline's
    whole = {m.model: m.key for m in comparison.methods if m.tile_step_size == SLIDING_WINDOW_STEPS[0]}
    for record in records:
        for method in comparison.methods:
            entry = record["methods"][method.key]
            for label, name in comparison.label_names.items():
                metrics = entry["metrics"][label]
                rows.append(
                    {
                        "fold": record["fold"],
                        "case": record["case"],
                        "method": method.key,
                        "name": method.name,
                        "class": name,
                        **{metric: metrics[metric] for metric in METRICS},
                        "objects": len(metrics["objects"]),
                        "missed_objects": metrics["missed_objects"],
                        "false_positive_objects": metrics["false_positive_objects"],
                        "patches": entry["patches"],
                        "share": entry["patches"] / record["methods"][whole.get(method.model, reference)]["patches"],
                        "macs": entry["macs"],
                        "covered_foreground": entry["covered_foreground"],
                        "objects_found": metrics["objects"],
                    }
                )
    return pd.DataFrame(rows)


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points (seconds, Dice) that no other is at once as fast and as accurate as, by seconds."""
    front: list[int] = []
    best = -math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front


def _difference_by_case(table: pd.DataFrame, method: Method, reference: Method) -> pd.Series:
    dice = table.pivot(index=["case", "class"], columns="method", values="Dice")
    return (dice[method.key] - dice[reference.key]).groupby("case").mean()


def _paired(difference: pd.Series) -> PairedDifference:
    values = difference.to_numpy(float)
    return paired_difference(values, np.zeros_like(values))


def _method_result(
    table: pd.DataFrame, method: Method, difference: PairedDifference, cost: Cost | None
) -> MethodResult:
    rows = table[table["method"] == method.key]
    by_class = rows.groupby("class", sort=False)[list(METRICS)].mean()
    per_case = rows.drop_duplicates("case")
    return MethodResult(
        method,
        {str(name): {m: float(by_class.loc[name, m]) for m in METRICS} for name in by_class.index},
        {m: float(by_class[m].mean()) for m in METRICS},
        difference,
        int(rows["objects"].sum()),
        int(rows["missed_objects"].sum()),
        int(rows["false_positive_objects"].sum()),
        float(per_case["patches"].mean()),
        float(per_case["share"].mean()),
        float(per_case["macs"].mean()),
        cost,
    )


def _reached(records: list[dict[str, Any]], comparison: Comparison, method: Method) -> dict[str, Reached]:
    of_cases = [record["methods"][method.key].get("reached") or {} for record in records]
    return {
        name: Reached.together([Reached(**of_case[label]) for of_case in of_cases])
        for label, name in comparison.label_names.items()
        if all(label in of_case for of_case in of_cases)
    }


def _costs(timings: pd.DataFrame, reference: Method) -> dict[str, Cost]:
    if timings.empty:
        return {}
    at = timings.set_index(["round", "case"])
    base = at[at["method"] == reference.key]
    at = at[at.index.isin(base.index)]  # what could not be measured has no ratio
    costs = {}
    for key, rows in at.groupby("method", sort=False):
        peaks = {name: rows[name].max() for name in ("host_peak_bytes", "device_peak_bytes")}
        costs[str(key)] = Cost(
            Spread.of(rows["network_seconds"]),
            Spread.of(rows["total_seconds"]),
            Spread.of(rows["network_seconds"] / base["network_seconds"]),
            Spread.of(rows["total_seconds"] / base["total_seconds"]),
            *(float(peak) if pd.notna(peak) else None for peak in peaks.values()),
        )
    return costs


def _write_summary(records: list[dict[str, Any]], comparison: Comparison, method: Method) -> None:
    """Write what nnU-Net leaves beside its predictions, for its tools."""
    cases: list[dict[str, Any]] = []
    for case, record in zip(comparison.cases, records, strict=True):
        metrics = record["methods"][method.key]["metrics"]
        cases.append(
            {
                "reference_file": case.reference,
                "prediction_file": str(comparison.prediction_file(case, method)),
                "metrics": {
                    key_to_label_or_region(label): {name: values[name] for name in NNUNET_METRICS}
                    for label, values in metrics.items()
                },
            }
        )
    labels = list(cases[0]["metrics"])
    mean = {
        label: {name: _nanmean([case["metrics"][label][name] for case in cases]) for name in NNUNET_METRICS}
        for label in labels
    }
    foreground_mean = {name: float(np.mean([mean[label][name] for label in labels])) for name in NNUNET_METRICS}
    folder = comparison.folder / "methods" / method.key
    model = next(model for model in comparison.models if model.role == method.model)
    with written_whole(folder) as unfinished:
        summary = {"metric_per_case": cases, "mean": mean, "foreground_mean": foreground_mean}
        save_summary_json(summary, str(unfinished / "summary.json"))
        for name in ("dataset.json", "plans.json"):
            shutil.copyfile(model.folder / name, unfinished / name)


def _nanmean(values: list[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return float(np.mean(finite)) if finite else math.nan
