"""What the windows of stock models reach of what their sliding windows find: a table, and a sentence."""

from __future__ import annotations

from nnunet_nmsw.evaluation.report.results import MethodResult, Results
from nnunet_nmsw.evaluation.report.tables import Cell, Table


def reached_table(results: Results) -> Table:
    """What windows reach of what the sliding windows of stock models find, one row a class and method."""
    rows = [
        [
            Cell(name, name),
            Cell(result.method.name, result.method.name),
            Cell(str(result.reached[name].objects), result.reached[name].objects),
            Cell(str(result.reached[name].reached), result.reached[name].reached),
            Cell(f"{result.reached[name].percentage:.1f}", result.reached[name].percentage),
        ]
        for name in results.comparison.label_names.values()
        for result in results.methods
        if name in result.reached
    ]
    return Table(
        "Objects that windows reach",
        "Objects that the sliding windows find, those that a window of a model with the class touches, and the "
        "percentage of their voxels inside of windows. What no window reaches is as the coarse model predicts it.",
        ["class", "method", "objects", "reached", "voxels reached"],
        rows,
    )


def reached_in_words(result: MethodResult) -> list[str]:
    """What the windows of a method reach, as a sentence; nothing where it is not known."""
    if not result.reached:
        return []
    objects, reached = (sum(getattr(of, key) for of in result.reached.values()) for key in ("objects", "reached"))
    missed = {name: of.objects - of.reached for name, of in result.reached.items() if of.reached < of.objects}
    worst = sorted(missed, key=lambda name: -missed[name])[:5]
    names = [f"{name} {missed[name]}" for name in worst] + ["others"] * (len(missed) > len(worst))
    left_out = f"; missed: {', '.join(names)}" if names else ""
    return [f"Its windows reach {reached} of the {objects} objects that the stock sliding windows find{left_out}."]
