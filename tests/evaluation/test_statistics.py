import math

import numpy as np
import pytest
from scipy import stats

from nnunet_nmsw.evaluation.statistics import PairedDifference, correct, paired_difference, smallest_p, verdict


def test_differences_by_hand():
    difference = paired_difference([0.9, 0.8, 0.7, 0.9, 0.6, math.nan], [0.8, 0.6, 0.4, 0.5, 0.1, 0.5])
    assert difference.cases == 5
    assert difference.mean == pytest.approx((0.1 + 0.2 + 0.3 + 0.4 + 0.5) / 5)
    # All five ranks on one side: two of the 2^5 sign patterns are as extreme.
    assert difference.p == pytest.approx(2 / 32)
    assert 0.1 <= difference.low < difference.mean < difference.high <= 0.5


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(0.02, 0.1, 400)
    difference = paired_difference(values, np.zeros(400))
    half = 1.96 * values.std() / math.sqrt(400)
    assert difference.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert difference.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_degenerate_differences():
    same = paired_difference([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    constant = paired_difference([0.5, 0.75], [0.25, 0.5])
    assert (constant.low, constant.high) == (0.25, 0.25)
    one = paired_difference([0.5], [0.25])
    assert (one.cases, one.mean) == (1, 0.25)
    assert math.isnan(one.low)
    assert math.isnan(one.p)
    assert paired_difference([math.nan], [0.25]).cases == 0


def with_p(p: float, cases: int = 20) -> PairedDifference:
    return PairedDifference(cases, 0.1, 0.0, 0.2, p)


def test_holm_by_hand():
    differences = {
        "a": with_p(0.01),
        "b": with_p(0.04),
        "c": with_p(0.03),
        "d": with_p(0.001),
        "none": with_p(math.nan),
    }
    corrected = correct(differences, ["a", "b", "c", "none"])
    # Sorted 0.01, 0.03, 0.04: times 3, 2, 1, and never smaller than the one before.
    assert [corrected[key].p_holm for key in "abc"] == pytest.approx([0.03, 0.06, 0.06])
    assert math.isnan(corrected["none"].p_holm)
    assert math.isnan(corrected["d"].p_holm)  # was not planned


def test_so_few_cases_that_nothing_could_be_significant_have_no_corrected_p():
    few = correct({"a": with_p(smallest_p(6), 6), "b": with_p(smallest_p(6), 6)}, "ab")
    assert all(math.isnan(difference.p_holm) for difference in few.values())
    one = correct({"a": with_p(smallest_p(6), 6)}, "a")
    assert one["a"].p_holm == smallest_p(6) < 0.05


@pytest.mark.parametrize("cases", [6, 9, 20])
def test_the_smallest_p_is_wilcoxons(cases):
    gains = np.random.default_rng(0).uniform(0.1, 1, cases)
    assert stats.wilcoxon(gains).pvalue == pytest.approx(smallest_p(cases))


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.001, 0.02, "A is better than the B"),
        (-0.004, 0.02, "A is not worse than the B by more than 0.5 points"),
        (-0.02, -0.006, "A is worse than the B by more than 0.5 points"),
        (-0.02, -0.001, "A is worse than the B; whether by more than 0.5 points is open"),
        (-0.02, 0.01, "These cases cannot rule out that A is worse than the B by more than 0.5 points"),
        (math.nan, math.nan, "A: too few cases, 3, to say how it compares with the B"),
    ],
)
def test_verdicts(low, high, says):
    cases = 7 if math.isfinite(low) else 3
    sentence = verdict("A", "B", PairedDifference(cases, (low + high) / 2, low, high, 0.5), 0.5)
    assert sentence.startswith(says)
    if math.isfinite(low):
        assert f"95% interval {100 * low:+.1f} to {100 * high:+.1f} Dice points, 7 cases" in sentence
