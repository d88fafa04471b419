"""The inference methods that are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from nnunet_nmsw.evaluation.yardsticks import WAYS, Nothing
from nnunet_nmsw.flags import OPENVINO, PYTORCH
from nnunet_nmsw.selection.by_score import GreedyBenefit

SLIDING_WINDOW_STEPS = (0.5, 0.75, 1.0)
"""nnU-Net's default step and the two that are used to save time."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One way of predicting a case.

    Attributes:
        model: whose networks predict, "baseline" or "nmsw".
        selection: how windows are picked, a key of `WAYS`; None for the sliding window of the patch network alone.
        num_patches: K of the selection, "auto" among them; None where it decides itself, and for the sliding window.
        tile_step_size: step of the sliding window as a fraction of the patch size; None for a selection.
        skips_background: the sliding window skips what is empty, see `evaluation.skipping`.
        mirrored: whether predictions are averaged over mirrorings.
        show_mirroring: whether the name tells so, because both are compared.
        backend: what computes the networks.
        of_stock: stock models predict, and there is no global branch.
    """

    model: str
    selection: str | None = None
    num_patches: int | str | None = None
    tile_step_size: float | None = None
    skips_background: bool = False
    mirrored: bool = False
    show_mirroring: bool = False
    backend: str = PYTORCH
    of_stock: bool = False

    @property
    def key(self) -> str:
        """A name for folders and files."""
        if self.selection is None:
            what = f"{self.model}_sliding_window_step_{self.tile_step_size}" + "_skipping" * self.skips_background
        else:
            alone = "coarse_model" if self.of_stock else "global_branch"
            selection = alone if self.selection == Nothing.name else self.selection
            k = "" if self.num_patches is None else f"_{str(self.num_patches).replace('%', 'percent')}"
            what = f"{self.model}_{selection}{k}"
        return what + (f"_{OPENVINO}" if self.backend == OPENVINO else "") + ("_mirrored" if self.mirrored else "")

    @property
    def series(self) -> str:
        """Its name without K or step: what a line in a plot stands for."""
        if self.selection is None:
            name = "stock sliding windows" if self.of_stock else "sliding window"
            name += " of the local branch" if self.model == "nmsw" else ""
            name += ", empty windows skipped" * self.skips_background
        else:
            alone = self.of_stock and self.selection == Nothing.name
            name = "coarse model alone" if alone else WAYS[self.selection].title
            name += ", K = auto" if self.num_patches == "auto" else ""
        if self.backend == OPENVINO:
            name += ", by OpenVINO"
        if self.show_mirroring:
            name += ", mirrored" if self.mirrored else ", not mirrored"
        return name

    @property
    def name(self) -> str:
        """Its name for people."""
        if self.selection is None:
            return f"{self.series}, step {self.tile_step_size}"
        if self.num_patches in (None, "auto"):
            return self.series
        k = "all windows" if self.num_patches == "all" else f"K = {self.num_patches}"
        return f"{self.series}, {k}"

    @property
    def is_yardstick(self) -> bool:
        """Whether it is there to be measured against, and not to be used."""
        way = None if self.selection is None else WAYS[self.selection]
        return self.skips_background or (way is not None and not (way.can_be_used and way.takes_k))


def build_methods(
    with_baseline: bool, num_patches: Sequence[int | str], mirrored: Sequence[bool], backend: str = PYTORCH
) -> list[Method]:
    """Every method of a comparison, models one after the other, sliding windows first.

    Args:
        with_baseline: whether there is a stock model.
        num_patches: K of the selections.
        mirrored: with mirroring, without, or both.
        backend: computes NMSW's own way to choose windows once more, where it is not PyTorch.
    """
    methods = []
    for mirror in mirrored:
        method = partial(Method, mirrored=mirror, show_mirroring=len(mirrored) > 1)
        for model in ("baseline", "nmsw") if with_baseline else ("nmsw",):
            methods += [method(model, tile_step_size=step) for step in SLIDING_WINDOW_STEPS]
            methods.append(method(model, tile_step_size=SLIDING_WINDOW_STEPS[-1], skips_background=True))
        for selection, way in WAYS.items():
            ks = [k for k in num_patches if (k != "all" or way.with_all) and (k != "auto" or way.with_auto)]
            for k in ks if way.takes_k else [None]:
                methods.append(method("nmsw", selection, k))
        if backend != PYTORCH:
            methods += [method("nmsw", GreedyBenefit.name, k, backend=backend) for k in num_patches]
    return sorted(methods, key=lambda method: method.model)


def build_stock_methods(
    num_patches: Sequence[int | str], mirrored: Sequence[bool], backend: str = PYTORCH
) -> list[Method]:
    """Every method of a comparison of stock models: their sliding windows, the coarse model, and what uses both.

    Args:
        num_patches: K of each fine model.
        mirrored: see `build_methods`.
        backend: see `build_methods`.
    """
    methods = []
    for mirror in mirrored:
        method = partial(Method, mirrored=mirror, show_mirroring=len(mirrored) > 1, of_stock=True)
        methods += [method("baseline", tile_step_size=SLIDING_WINDOW_STEPS[0]), method("nmsw", Nothing.name)]
        for of_backend in dict.fromkeys((PYTORCH, backend)):
            methods += [method("nmsw", GreedyBenefit.name, k, backend=of_backend) for k in num_patches]
    return sorted(methods, key=lambda method: method.model)


def reference_method(methods: Sequence[Method]) -> Method:
    """What everything is compared with: nnU-Net's default, of the stock model where there is one."""
    return next(m for m in methods if m.tile_step_size == SLIDING_WINDOW_STEPS[0])


def primary_method(methods: Sequence[Method], num_patches: int | str, selection: str = GreedyBenefit.name) -> Method:
    """The method that the report is about: NMSW as the model is set, else at the smallest percentage asked for.

    Args:
        methods: of the comparison.
        num_patches: the model's setting.
        selection: the way in which the model chooses windows.
    """
    # Of all windows alone there is but one selection, whatever the model's is.
    by_pytorch = [m for m in methods if m.backend == PYTORCH]
    candidates = [m for m in by_pytorch if m.selection == selection] or [
        m for m in by_pytorch if m.selection == GreedyBenefit.name
    ]
    own = [m for m in candidates if m.num_patches == num_patches]
    percentages = [m for m in candidates if str(m.num_patches).endswith("%")]
    return (own or sorted(percentages, key=lambda m: float(str(m.num_patches)[:-1])) or candidates)[0]


def planned_methods(methods: Sequence[Method], primary: Method) -> list[Method]:
    """The few that a reader decides between, and that are tested: the primary one, 5%, 10%, auto, and no patches.

    Args:
        methods: of the comparison.
        primary: see `primary_method`. What another backend computes is in where its K is this one's.
    """
    same = [m for m in methods if (m.model, m.mirrored) == (primary.model, primary.mirrored)]
    own = [
        m
        for m in same
        if m.selection == primary.selection
        and (m.num_patches == primary.num_patches or (m.backend == PYTORCH and m.num_patches in ("5%", "10%", "auto")))
    ]
    alone = [m for m in same if m.selection == "none"]
    return list(dict.fromkeys([primary, *own, *alone]))


def timed_methods(methods: Sequence[Method], primary: Method) -> list[Method]:
    """The methods whose time and memory are measured: nnU-Net's sliding windows, and what somebody would deploy.

    Another way to choose as many windows takes as long, and so does the sliding window of the local branch.

    Args:
        methods: of the comparison.
        primary: see `primary_method`.
    """
    slides = reference_method(methods).model
    return [
        m
        for m in methods
        if (m.selection is None and m.model == slides and not m.skips_background)
        or m.selection in (primary.selection, "none")
        or m.backend != PYTORCH
    ]
