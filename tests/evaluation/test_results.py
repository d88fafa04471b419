"""Tables, ratios and verdicts from records and timings that were made up."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from nnunetv2.evaluation.evaluate_predictions import load_summary_json

from nnunet_nmsw.evaluation.methods import build_methods, primary_method, reference_method, timed_methods
from nnunet_nmsw.evaluation.models import Case
from nnunet_nmsw.evaluation.report.facts import why
from nnunet_nmsw.evaluation.report.results import gather, pareto_front
from nnunet_nmsw.evaluation.report.tables import accuracy_table, case_table, cost_table, main_table
from nnunet_nmsw.evaluation.report.write import sentences

METHODS = build_methods(True, ["10%"], [False])
REFERENCE, PRIMARY = reference_method(METHODS), primary_method(METHODS, "10%")


class MadeUp(SimpleNamespace):
    """A comparison of three cases: the primary method has 10 points more on organs and 5 fewer on lesions."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder=folder,
            methods=METHODS,
            reference=REFERENCE,
            primary=PRIMARY,
            label_names={"1": "organ", "2": "lesion"},
            cases=[Case(f"case_{i}", i % 2, ("image",), f"/references/case_{i}.nii.gz") for i in range(3)],
            tolerance_mm=2.0,
            has_auto=False,
            has_reference=True,
            nmsw=None,
            remarks=(),
            models=[SimpleNamespace(role=role, folder=folder / "model") for role in ("baseline", "nmsw")],
        )

    def prediction_file(self, case, method):
        return self.folder / "methods" / method.key / f"{case.name}.nii.gz"

    def records(self):
        return [
            {
                "case": case.name,
                "fold": case.fold,
                "methods": {method.key: self.entry(number, method) for method in METHODS},
            }
            for number, case in enumerate(self.cases)
        ]

    def entry(self, number, method):
        mine = method == PRIMARY
        organ, lesion = 0.7 + 0.1 * mine + 0.01 * number, 0.4 - 0.05 * mine
        return {
            "patches": 10 if mine else 100,
            "macs": 12e9 if mine else 100e9,
            "covered_foreground": 0.8 if mine else 1.0,
            "metrics": {
                "1": metrics(organ, [[1000.0, True]]),
                # the last case has no lesion, and the primary method makes one up
                "2": metrics(math.nan if not mine else 0.0, [], false=int(mine))
                if number == 2
                else metrics(lesion, [[50.0, not mine]], missed=int(mine)),
            },
        }

    def timings(self):
        for method in timed_methods(METHODS, PRIMARY):
            for number in range(3):
                slow = 1 + number  # the machine slows down from round to round
                seconds = slow * (0.2 if method == PRIMARY else 2.0)
                yield {
                    "method": method.key,
                    "round": number,
                    "case": "case_0",
                    "network_seconds": seconds,
                    "total_seconds": seconds + slow,
                    "host_peak_bytes": (1 + number) * 2**30,
                    "device_peak_bytes": None,
                }


def metrics(dice, objects, missed=0, false=0):
    counts = dict.fromkeys(("IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref"), 1)
    own = {"NSD": dice, "HD95": 4.0, "objects": objects, "missed_objects": missed, "false_positive_objects": false}
    return {"Dice": dice, **counts, **own}


@pytest.fixture
def results(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("dataset.json", "plans.json"):
        (tmp_path / "model" / name).write_text("{}")
    for method in METHODS:
        (tmp_path / "methods" / method.key).mkdir(parents=True)
    return gather(MadeUp(tmp_path))


def test_means_differences_and_counts(results):
    mine, theirs = results.of(PRIMARY), results.of(REFERENCE)
    assert theirs.by_class["organ"]["Dice"] == pytest.approx(0.71)
    assert theirs.by_class["lesion"]["Dice"] == pytest.approx(0.4)  # over the two cases that have one
    assert theirs.mean["Dice"] == pytest.approx((0.71 + 0.4) / 2)
    assert mine.by_class["lesion"]["Dice"] == pytest.approx((0.35 + 0.35 + 0) / 3)
    # By case: (0.1 - 0.05) / 2 twice; in the last only the organ has two values.
    assert results.difference_by_case(PRIMARY).tolist() == pytest.approx([0.025, 0.025, 0.1])
    assert mine.difference.mean == pytest.approx(0.05)
    assert mine.difference.cases == 3
    assert (mine.objects, mine.missed_objects, mine.false_positive_objects) == (5, 2, 1)
    assert (mine.patches, mine.share, mine.macs) == pytest.approx((10, 0.1, 12e9))
    assert math.isnan(theirs.difference.p_holm)


@pytest.mark.parametrize("lost", [{1}, {0, 1, 2}])
def test_rounds_without_the_reference_have_no_ratio(results, tmp_path, lost):
    class Lacking(MadeUp):
        def timings(self):
            for entry in super().timings():
                if not (entry["method"] == REFERENCE.key and entry["round"] in lost):
                    yield entry

    found = gather(Lacking(tmp_path))
    cost = found.of(PRIMARY).cost
    if len(lost) == 3:
        assert cost is None
    else:
        assert cost.total_ratio.median == pytest.approx(1.2 / 3)
        assert cost.network_seconds.median == pytest.approx((0.2 + 0.6) / 2)
    write_report_of = accuracy_table(found), main_table(found)
    assert all(table.rows for table in write_report_of)


def test_ratios_are_of_the_same_round(results):
    cost = results.of(PRIMARY).cost
    assert cost.network_seconds.median == pytest.approx(0.4)
    assert (cost.network_seconds.low, cost.network_seconds.high) == pytest.approx((0.3, 0.5))
    for quantile in (cost.network_ratio.low, cost.network_ratio.median, cost.network_ratio.high):
        assert quantile == pytest.approx(0.1)
    assert cost.total_ratio.median == pytest.approx(1.2 / 3)
    assert cost.host_peak_bytes == 3 * 2**30
    assert cost.device_peak_bytes is None
    assert results.of(REFERENCE).cost.total_ratio.median == 1
    assert [r.method for r in results.methods if r.cost is not None] == timed_methods(METHODS, PRIMARY)


def test_written_files(results, tmp_path):
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert len(table) == 3 * 2 * len(METHODS)
    assert set(table["class"]) == {"organ", "lesion"}
    summary = load_summary_json(str(tmp_path / "methods" / PRIMARY.key / "summary.json"))
    assert summary["mean"][1]["Dice"] == pytest.approx(0.81)
    assert summary["foreground_mean"]["Dice"] == pytest.approx(results.of(PRIMARY).mean["Dice"])
    assert len(summary["metric_per_case"]) == 3
    assert "NaN" not in json.dumps(summary["foreground_mean"])


def test_what_the_tables_say(results):
    accuracy = {row[0].text: [cell.text for cell in row] for row in accuracy_table(results).rows}
    assert accuracy[REFERENCE.name][1:3] == ["55.5", "reference"]
    assert accuracy[PRIMARY.name][2].startswith("+5.0 (")
    assert accuracy[PRIMARY.name][-4:] == ["2 of 5", "1", "10.0", "10%"]
    cost = {row[0].text: [cell.text for cell in row] for row in cost_table(results).rows}
    assert cost[PRIMARY.name][1:6] == ["10.0", "12", "0.12", "0.4 (0.3–0.5)", "0.10"]
    assert cost[PRIMARY.name][-1] == "3.00"
    cases = [[cell.text for cell in row] for row in case_table(results).rows]
    assert [row[0] for row in cases] == ["case_0", "case_1", "case_2"]
    for _, mine, theirs, difference, *_ in cases:
        assert float(difference) == pytest.approx(float(mine) - float(theirs), abs=0.11)
    text = " ".join(sentences(results, 0.5))
    assert "10.0 patches a case instead of 100.0, 0.12 times the multiply-accumulates" in text
    assert "0.10 times the seconds of the network and 0.40 times the seconds from file to file" in text
    assert "60% with NMSW, K = 10%" in text


def test_the_first_table_has_the_methods_that_matter(results):
    table = main_table(results)
    names = [row[0].text for row in table.rows]
    assert names[:2] == [REFERENCE.name, PRIMARY.name]
    assert len(names) <= 6
    assert "global branch" in " ".join(names)
    assert "p" not in table.columns  # of three cases none could be significant
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_why_a_case_loses():
    fine = {"covered": 1.0, "missed": 0.0, "false": 1.0}
    assert why(0.1, fine, fine) == "no loss"
    assert why(-0.1, fine, fine) == "objects are no worse, borders are less exact"
    bad = {"covered": 0.7, "missed": 2.0, "false": 2.0}
    assert why(-0.1, bad, fine) == (
        "30% of the foreground lies outside of the windows; 2 more missed objects; 1 more false object"
    )


def test_pareto_front():
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.8), (4.0, 0.9)]
    assert pareto_front(points) == [1, 3, 0]
    assert pareto_front([]) == []
