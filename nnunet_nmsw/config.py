"""Every setting of the method, in one frozen dataclass that is resolved from nnU-Net's plans and saved with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from nnunet_nmsw.architecture import (
    ARCHITECTURE_KEYS,
    check_local_architecture,
    convolutional_architecture,
    global_architecture,
    takes_one_size,
)
from nnunet_nmsw.errors import UserError

PLANS_KEY = "nmsw"
"""The key of a plans file's configuration that holds the settings."""

MAX_GLOBAL_COST_IN_PATCHES = 2.0
"""A median volume may cost the global branch as much as this many patches cost the local one."""

MOST_WINDOWS = 1024
"""Windows of a training step, of each kind."""

GRADIENT_PATHS = ("none", "contribution", "contribution_logits", "input")
FUSIONS = ("class_weights", "affine")
BENEFITS = ("loss", "dice")
SCORE_MAPS = ("free", "gated", "plus_entropy", "times_entropy")
SELECTIONS = ("top_k", "greedy_coverage", "greedy_benefit")
TRUSTS = ("full", "benefit")


@dataclasses.dataclass(frozen=True)
class NMSWConfig:
    """Settings of No More Sliding Window. Override them in the plans file under the configuration's key `nmsw`."""

    downsampling_factor: tuple[int, int, int]
    """Voxels of the volume per voxel of the global branch's view, by axis in the order of the plans' patch size."""

    num_patches: int | str = "10%"
    """Patches at inference, K: a number, a percentage of the case's windows such as "10%", or "all"."""

    selection: str = "greedy_benefit"
    """How windows are picked from their scores at inference, one of `SELECTIONS`."""

    coverage_discount: float = 0.4
    """Selection "greedy_benefit": share of the benefit of a place that is gone with the first window over it."""

    placement_step: float = 0.25
    """Selection "greedy_benefit": step between the positions it chooses from, as a fraction of the patch size."""

    tile_step_size: float = 0.5
    """Step between candidate windows as a fraction of the patch size, as in nnU-Net's sliding window."""

    sampled_windows: int = 2
    """Windows a training step draws from the scores."""

    random_windows: int = 2
    """Windows a training step draws at random, with nnU-Net's foreground oversampling. They train the local branch."""

    global_width: float = 0.75
    """Features per stage of the global branch as a fraction of the local branch's."""

    global_architecture: dict[str, Any] | None = None
    """Architecture of the global branch, an object with any of the keys of the plans' `architecture`. Where it names no
    other class, its `arch_kwargs` replace single ones of the plans'. Where None, it is the plans' architecture, or a
    `PlainConvUNet` where that takes patches of one size only."""

    gradient_path: str = "none"
    """How the draw of windows trains the scores, one of `GRADIENT_PATHS`: by the weight of a window's contribution to
    the sums of the fused loss or to the fused logits, by a soft weight on the input patch as in the paper, or not."""

    gradient_baseline: bool = False
    """Subtract the mean benefit of the other drawn windows from a window's ("contribution" only): less variance."""

    benefit_loss_weight: float = 0.1
    """Weight of the regression of the score map on the measured benefit of the windows, voxel by voxel."""

    benefit: str = "loss"
    """What a window's benefit is in this regression, one of `BENEFITS`: by how much it lowers the loss of the fused
    prediction or raises the Dice of its labels."""

    score_map: str = "gated"
    """What the last output x of the network makes of the score map, one of `SCORE_MAPS`: x, x H / (H + 0.1), x + H, or
    (1 + x) H with the entropy H of the coarse prediction in nats."""

    temperature: float = 2 / 3
    """Temperature of the relaxed Top-k; only the gradient path "input" uses the relaxation."""

    entropy_weight: float = 0.01
    """Weight of the entropy bonus on the window distribution; of all gradient paths but "none"."""

    score_scale: float = 3.0
    """Window scores are this times the mean of the score map over the window."""

    candidate_threshold: float = 0.1
    """A window is a candidate where the global prediction gives some voxel at least this probability of foreground."""

    fusion: str = "affine"
    """How patches are fused with the coarse prediction, one of `FUSIONS`: w · patch + (1 - w) · coarse with a weight w
    by class as in the paper, or a · patch + b · coarse + d, three free weights by class."""

    initial_class_weight: float = 2.0
    """The class weights of the fusion are sigmoid(θ); every θ starts here."""

    trust: str = "benefit"
    """How much of what a patch changes in the coarse prediction is kept at inference, one of `TRUSTS`: all of it, or
    less in windows of less predicted benefit, see `NMSWNetwork.trust`."""

    fuse_random_windows: bool = True
    """Let the random windows of a step take part in the fused loss: the fusion then learns from windows that the
    sampler would not take, too."""

    fusion_speed: float = 1.0
    """The weights of the fusion learn this squared times as fast as the networks' weights."""

    distillation_weight: float = 0.0
    """Weight of the loss by which the coarse prediction also learns from the local branch's, in the step's windows."""

    windows_at_once: int | None = None
    """Windows of a step whose activations the local branch keeps in memory at a time. The others' are computed again
    for the gradient: a third more time for less memory. All at once where None."""

    regions: bool = False
    """The channels of the logits are overlapping regions with a sigmoid each. Set by the trainer from dataset.json."""

    freeze_local_branch: bool = False
    """Train all but the local branch. Set by the trainer: `nnUNetTrainerNMSW_retrofit` does."""

    seed: int | None = None
    """Seed of the training: weights, order of cases, augmentation, windows. Random where None, as in nnU-Net."""

    local_loss_weight: float = 1.0
    global_loss_weight: float = 1.0
    fused_loss_weight: float = 1.0

    def __post_init__(self) -> None:
        factor = self.downsampling_factor
        three_positive = (
            isinstance(factor, Sequence) and len(factor) == 3 and all(type(f) is int and f >= 1 for f in factor)
        )
        _require(three_positive, "downsampling_factor", factor, "three integers of at least 1, e.g. [3, 3, 3]")
        object.__setattr__(self, "downsampling_factor", tuple(factor))
        num_patches = parse_num_patches(self.num_patches, f'setting "num_patches" under "{PLANS_KEY}" in the plans')
        object.__setattr__(self, "num_patches", num_patches)
        _require(self.selection in SELECTIONS, "selection", self.selection, f"one of {', '.join(SELECTIONS)}")
        _require(self.benefit in BENEFITS, "benefit", self.benefit, f"one of {', '.join(BENEFITS)}")
        _require(self.score_map in SCORE_MAPS, "score_map", self.score_map, f"one of {', '.join(SCORE_MAPS)}")
        _require(self.fusion in FUSIONS, "fusion", self.fusion, f"one of {', '.join(FUSIONS)}")
        _require(self.trust in TRUSTS, "trust", self.trust, f"one of {', '.join(TRUSTS)}")
        _require(
            self.gradient_path in GRADIENT_PATHS,
            "gradient_path",
            self.gradient_path,
            f"one of {', '.join(GRADIENT_PATHS)}",
        )
        for name in ("gradient_baseline", "fuse_random_windows", "regions", "freeze_local_branch"):
            _require(type(getattr(self, name)) is bool, name, getattr(self, name), "true or false")
        _require(
            self.global_architecture is None or _is_architecture(self.global_architecture),
            "global_architecture",
            self.global_architecture,
            'null, or an object of "network_class_name" (a string), "arch_kwargs" (an object) and '
            '"_kw_requires_import" (a list of strings), all optional',
        )
        seed = self.seed
        _require(seed is None or (type(seed) is int and seed >= 0), "seed", seed, "an integer of at least 0, or null")
        at_once = self.windows_at_once
        _require(
            at_once is None or (type(at_once) is int and at_once >= 1),
            "windows_at_once",
            at_once,
            "an integer of at least 1, or null",
        )
        for name in ("sampled_windows", "random_windows"):
            value = getattr(self, name)
            least = 1 if name == "sampled_windows" else 0
            allowed = f"an integer from {least} to {MOST_WINDOWS}"
            _require(type(value) is int and least <= value <= MOST_WINDOWS, name, value, allowed)
        for name in ("tile_step_size", "placement_step", "coverage_discount", "global_width"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 < value <= 1, name, value, "a number above 0 and up to 1")
        _require(
            _is_number(self.candidate_threshold) and 0 <= self.candidate_threshold < 1,
            "candidate_threshold",
            self.candidate_threshold,
            "a probability from 0 to below 1",
        )
        for name in ("temperature", "score_scale", "fusion_speed"):
            value = getattr(self, name)
            _require(_is_number(value) and value > 0, name, value, "a number above 0")
        for name in (
            "entropy_weight",
            "benefit_loss_weight",
            "distillation_weight",
            "local_loss_weight",
            "global_loss_weight",
            "fused_loss_weight",
        ):
            value = getattr(self, name)
            _require(_is_number(value) and value >= 0, name, value, "a number of at least 0")
        _require(
            self.gradient_path != "none" or self.benefit_loss_weight > 0,
            "benefit_loss_weight",
            self.benefit_loss_weight,
            'a number above 0 where "gradient_path" is "none", or nothing would train the scores',
        )
        _require(_is_number(self.initial_class_weight), "initial_class_weight", self.initial_class_weight, "a number")

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> NMSWConfig:
        """Resolve the settings of one configuration of a plans file.

        Args:
            configuration: a configuration of nnU-Net's plans, inheritance resolved, as in
                `ConfigurationManager.configuration`. What its key `nmsw` sets is taken, the rest are defaults.

        Raises:
            UserError: a setting is unknown or impossible, the configuration is not 3D, or its network is for another
                patch size.
        """
        if len(configuration["patch_size"]) != 3:
            raise UserError(
                "NMSW replaces the sliding window of 3D configurations and this one is 2D: "
                "train 3d_fullres, or use nnUNetTrainer for 2d"
            )
        overrides = configuration.get(PLANS_KEY, {})
        allowed = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(overrides, dict):
            raise UserError(f'"{PLANS_KEY}" in the plans must be an object of settings; allowed: {", ".join(allowed)}')
        unknown = sorted(set(overrides) - set(allowed))
        if unknown:
            raise UserError(
                f'unknown setting "{unknown[0]}" under "{PLANS_KEY}" in the plans; allowed: {", ".join(allowed)}'
            )
        settings = dict(overrides)
        if "downsampling_factor" not in settings:
            width = settings.get("global_width", cls.global_width)
            _require(_is_number(width) and 0 < width <= 1, "global_width", width, "a number above 0 and up to 1")
            settings["downsampling_factor"] = default_downsampling_factor(
                configuration["median_image_size_in_voxels"],
                configuration["patch_size"],
                configuration["spacing"],
                width,
            )
        config, local = cls(**settings), configuration["architecture"]
        config._check_patch(configuration["patch_size"])
        check_local_architecture(local, configuration["patch_size"])
        if config.global_architecture is None and takes_one_size(local):
            convolutional = convolutional_architecture(
                configuration["median_image_size_in_voxels"],
                configuration["spacing"],
                config.downsampling_factor,
                config.global_width,
            )
            config = dataclasses.replace(config, global_architecture=convolutional)
        global_ = global_architecture(local, config.global_architecture, config.global_width)
        _require(
            not takes_one_size(global_),
            "global_architecture",
            config.global_architecture,
            f"a network that takes volumes of any size, as {global_['network_class_name']} does not",
        )
        return config

    def _check_patch(self, patch_size: Sequence[int]) -> None:
        """See that windows move by voxels and not by less, and that a patch is more than a low-resolution voxel.

        Raises:
            UserError: they do not, or it is not.
        """
        for name in ("tile_step_size", "placement_step"):
            # With patches so thin that the default is less, that is allowed: it only places some windows twice.
            least = min(1 / min(patch_size), getattr(type(self), name))
            allowed = f"at least {least:.3g}, a voxel of a patch of {list(patch_size)}"
            _require(getattr(self, name) >= least, name, getattr(self, name), allowed)
        _require(
            all(f <= n for f, n in zip(self.downsampling_factor, patch_size, strict=True)),
            "downsampling_factor",
            list(self.downsampling_factor),
            f"no more voxels than a patch has by axis, {list(patch_size)}",
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are written into a plans file (plain JSON types)."""
        return {**dataclasses.asdict(self), "downsampling_factor": list(self.downsampling_factor)}


def default_downsampling_factor(
    median_shape: Sequence[float], patch_size: Sequence[int], spacing: Sequence[float], global_width: float
) -> tuple[int, int, int]:
    """The smallest factors, as isotropic in space as integers allow, at which the global branch is cheap.

    Cheap means that a median volume costs the global branch at most `MAX_GLOBAL_COST_IN_PATCHES` patches of the local
    one, the cost of a convolution going with voxels times features squared.

    Args:
        median_shape: voxels by axis, at the plans' spacing.
        patch_size: voxels by axis.
        spacing: mm by axis.
        global_width: features of the global branch relative to the local branch's.
    """
    budget = MAX_GLOBAL_COST_IN_PATCHES * math.prod(patch_size) / global_width**2
    # Each low-resolution spacing at which some axis steps to its next integer factor, from fine to coarse.
    steps = sorted({step * axis_spacing for axis_spacing in spacing for step in range(1, 65)})
    for low_spacing in steps:
        factor = tuple(max(1, math.floor(low_spacing / axis_spacing + 1e-6)) for axis_spacing in spacing)
        if math.prod(math.ceil(n / f) for n, f in zip(median_shape, factor, strict=True)) <= budget:
            break
    d, h, w = (min(f, n) for f, n in zip(factor, patch_size, strict=True))
    return d, h, w


def parse_num_patches(value: int | str, source: str = "-k", automatic: bool = False) -> int | str:
    """Check a number of patches given as an integer, a percentage ("10%"), "all" or, where that may be, "auto".

    Args:
        value: what the user gave.
        source: the flag or setting it was given by, for the message.
        automatic: allow "auto".

    Returns:
        The integer, the percentage as it was, "all" or "auto".

    Raises:
        UserError: it is none of these.
    """
    text = str(value).strip().lower()
    words = ("all", "auto") if automatic else ("all",)
    if text in words:
        return text
    try:
        if text.endswith("%"):
            if 0 < float(text[:-1]) <= 100:
                return text
        elif int(text) >= 1:
            return int(text)
    except ValueError:
        pass
    or_words = " or ".join(f'"{word}"' for word in words)
    raise UserError(
        f'{source} is "{value}": give a number of patches (1 or more), a percentage of all windows '
        f'above 0% and up to 100% such as "10%", or {or_words}'
    )


def resolve_num_patches(num_patches: int | str, num_windows: int) -> int:
    """Patches to take of a case's `num_windows` windows: at least 1, at most all. Percentages are rounded up."""
    if num_patches == "all":
        return num_windows
    if isinstance(num_patches, str):
        return max(1, math.ceil(float(num_patches[:-1]) / 100 * num_windows - 1e-9))
    return min(num_patches, num_windows)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_architecture(value: object) -> bool:
    if not isinstance(value, dict) or not set(value) <= set(ARCHITECTURE_KEYS):
        return False
    imports = value.get("_kw_requires_import", [])
    return (
        isinstance(value.get("network_class_name", ""), str)
        and isinstance(value.get("arch_kwargs", {}), dict)
        and isinstance(imports, list)
        and all(isinstance(name, str) for name in imports)
    )


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise UserError(f'setting "{name}" under "{PLANS_KEY}" in the plans is {value!r}; allowed: {allowed}')
