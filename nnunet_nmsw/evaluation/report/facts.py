"""What is known of methods on a case, and why one of them loses there."""

from __future__ import annotations

import pandas as pd

from nnunet_nmsw.evaluation.methods import Method
from nnunet_nmsw.evaluation.report.results import Results


def case_facts(results: Results, case: str, *methods: Method) -> list[dict[str, float]]:
    """Facts of methods on a case. Their Dice is over the same classes: those in which each of them has one."""
    of_case = results.table[results.table["case"] == case]
    of_methods = [of_case[of_case["method"] == method.key].set_index("class") for method in methods]
    comparable = pd.concat([rows["Dice"].notna() for rows in of_methods], axis=1).all(axis=1)
    return [
        {
            "Dice": float(rows["Dice"][comparable].mean()),
            "covered": float(rows["covered_foreground"].iloc[0]),
            "missed": float(rows["missed_objects"].sum()),
            "false": float(rows["false_positive_objects"].sum()),
        }
        for rows in of_methods
    ]


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
