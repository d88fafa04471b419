"""Paired comparison of methods over cases: bootstrap intervals, Wilcoxon's test, Holm's correction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 9999
CONFIDENCE = 0.95
FEWEST_CASES = 6
"""With fewer cases the interval is far too narrow, and no order of them reaches p < 0.05."""


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """A method minus the reference method, over the cases for which both have a value.

    Attributes:
        cases: their number.
        mean: mean difference.
        low: lower end of the interval of the mean; NaN with fewer than two cases.
        high: its upper end.
        p: of Wilcoxon's signed-rank test, two-sided; NaN with fewer than two cases.
        p_holm: corrected for the number of comparisons that were planned; NaN for others.
    """

    cases: int
    mean: float
    low: float
    high: float
    p: float
    p_holm: float = math.nan


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> PairedDifference:
    """Compare two methods on the same cases.

    The interval is a percentile bootstrap of the mean over cases (9,999 resamples, fixed seed), too narrow with few.
    Differences of zero count half to each side in the test (zsplit), so that equal predictions are evidence for
    equality.

    Args:
        values: a method's value by case; NaN where it has none.
        reference: the other's, in the same order.
    """
    difference = np.asarray(values, float) - np.asarray(reference, float)
    difference = difference[np.isfinite(difference)]
    if not len(difference):
        return PairedDifference(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(difference.mean())
    if len(difference) < 2:
        return PairedDifference(len(difference), mean, math.nan, math.nan, math.nan)
    if np.ptp(difference) == 0:
        low = high = mean
    else:
        interval = stats.bootstrap(
            (difference,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    p = float(stats.wilcoxon(difference, zero_method="zsplit").pvalue) if difference.any() else 1.0
    return PairedDifference(len(difference), mean, low, high, p)


def correct(differences: dict[str, PairedDifference], planned: Sequence[str]) -> dict[str, PairedDifference]:
    """Fill in Holm's corrected p over the planned comparisons, unless of so few cases none could be significant.

    Args:
        differences: by method.
        planned: methods whose comparison was planned; the others stay without a corrected p.
    """
    tested = {key: differences[key].p for key in planned if math.isfinite(differences[key].p)}
    most_cases = max((differences[key].cases for key in tested), default=0)
    if len(tested) * smallest_p(most_cases) >= 1 - CONFIDENCE:
        return dict(differences)
    result, p_holm = dict(differences), 0.0
    for rank, key in enumerate(sorted(tested, key=tested.__getitem__)):
        p_holm = max(p_holm, min(1.0, (len(tested) - rank) * tested[key]))
        result[key] = dataclasses.replace(differences[key], p_holm=p_holm)
    return result


def smallest_p(cases: int) -> float:
    """The smallest p of Wilcoxon's two-sided signed-rank test: all differences have one sign."""
    return float(2.0 ** (1 - cases))


def verdict(name: str, reference: str, difference: PairedDifference, margin: float) -> str:
    """What the difference in Dice says, as a sentence.

    Args:
        name: the method.
        reference: what it is compared with.
        difference: of Dice, from 0 to 1.
        margin: the loss in Dice points (per cent) that would matter.
    """
    if difference.cases < FEWEST_CASES:
        points = "" if math.isnan(difference.mean) else f" (mean difference {100 * difference.mean:+.1f} Dice points)"
        return f"{name}: too few cases, {difference.cases}, to say how it compares with the {reference}{points}."
    mean, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
    interval = (
        f"mean difference {mean:+.1f}, 95% interval {low:+.1f} to {high:+.1f} Dice points, {difference.cases} cases"
    )
    if low > 0:
        return f"{name} is better than the {reference} ({interval})."
    if low >= -margin:
        return f"{name} is not worse than the {reference} by more than {margin:g} points ({interval})."
    if high < -margin:
        return f"{name} is worse than the {reference} by more than {margin:g} points ({interval})."
    if high < 0:
        return f"{name} is worse than the {reference}; whether by more than {margin:g} points is open ({interval})."
    return (
        f"These cases cannot rule out that {name} is worse than the {reference} by more than {margin:g} points "
        f"({interval})."
    )
