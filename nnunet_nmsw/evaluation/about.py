"""What a comparison compares, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_nmsw.evaluation.models import Case, Model
from nnunet_nmsw.evaluation.stock_models import StockModels


def about(models: Sequence[Model], cases: Sequence[Case]) -> str:
    """What is compared, in words.

    Args:
        models: of the comparison.
        cases: their validation cases.
    """
    folds = sorted({case.fold for case in cases})
    roles = {"baseline": "Baseline", "nmsw": "NMSW"}
    named = " ".join(f"{roles[model.role]}: {model.name}." for model in models)
    return (
        f"{len(cases)} validation cases of fold{'s' if len(folds) > 1 else ''} {', '.join(map(str, folds))}, each "
        f"predicted by the models that were not trained on it. {named}"
    )


def remarks(models: Sequence[Model], folds: Sequence[int], has_auto: bool) -> list[str]:
    """What a reader has to know of the folds, as sentences.

    Args:
        models: of the comparison, the NMSW model last.
        folds: that are compared.
        has_auto: whether a method takes the number of patches "auto".
    """
    sentences = []
    if has_auto:
        own = [str(fold) for fold in folds if models[-1].calibrating_folds(fold) == [fold]]
        sentences.append(
            "The threshold of K = auto was set on "
            + (
                f"the very cases that are measured, in fold {', '.join(own)}, where no other fold is validated."
                if own
                else "the validation cases of the other folds."
            )
        )
    unchecked = [
        f"{model.folder.name}, fold {fold}"
        for model in models
        for fold in folds
        if not model.validation_summary(fold).is_file()
    ]
    if unchecked:
        sentences.append(
            "Training left no validation, so that nothing shows whether the splits are still those that were trained "
            f"with: {'; '.join(unchecked)}."
        )
    return sentences


def about_stock(models: StockModels, cases: Sequence[Case], labels: Path | None) -> str:
    """What is compared, in words.

    Args:
        models: of the comparison.
        cases: that are predicted.
        labels: folder of reference labels; None where there are none.
    """
    coarse, *fine = models.names
    images = f"{len(cases)} image{'s' if len(cases) > 1 else ''}"
    reference = (
        f"compared with the reference labels of the folder {labels.name}"
        if labels is not None
        else "without reference labels: Dice and all other measures say how well predictions agree with the stock "
        "sliding windows"
    )
    return f"{images}, {reference}. Coarse model: {coarse}. Fine models: {', '.join(fine)}."
