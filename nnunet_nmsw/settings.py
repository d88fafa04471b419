"""The settings of the method: what a user may want to change, and nothing else.

They stand in a plans file under the configuration's key `nmsw`, and training saves them there. What is no setting is a
constant where it is used, with its reason; docs/ablations.md has the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import BeforeValidator, Field, StrictInt

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.selection.budget import parse_num_patches

PLANS_KEY = "nmsw"
"""The key of a plans file's configuration that holds the settings."""

MOST_WINDOWS = 1024
"""Windows of a training step, of each kind."""

MOST_CONTEXT_CHANNELS = 64

LAST_VERSION_WITH_ALL = "0.1.0"
"""The last version that had the settings in `RETIRED`."""

RETIRED: dict[str, Any] = {
    "selection": "greedy_benefit",
    "coverage_discount": 0.4,  # 0.7 since, for all models
    "placement_step": 0.25,
    "tile_step_size": 0.5,
    "gradient_path": "none",
    "gradient_baseline": False,
    "benefit_loss_weight": 0.1,
    "benefit": "loss",
    "score_map": "gated",
    "temperature": 2 / 3,
    "entropy_weight": 0.01,
    "score_scale": 3.0,
    "candidate_threshold": 0.1,
    "fusion": "affine",
    "initial_class_weight": 2.0,
    "trust": "benefit",
    "fuse_random_windows": True,
    "fusion_speed": 1.0,
    "distillation_weight": 0.0,
    "local_loss_weight": 1.0,
    "global_loss_weight": 1.0,
    "fused_loss_weight": 1.0,
}
"""Settings of earlier versions, with the only value that is left of each. Plans of models trained before hold them."""

FACTS_OF_EARLIER_VERSIONS = ("regions", "freeze_local_branch")
"""What earlier versions wrote beside the settings, and what dataset and trainer say by themselves."""

ScoreTraining = Literal["benefit", "contribution"]
SCORE_TRAININGS: tuple[str, ...] = get_args(ScoreTraining)


def _allowed(text: str) -> dict[str, Any]:
    """What a setting may be, in words, for messages."""
    return {"allowed": text}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _num_patches(value: Any) -> int | str:
    return parse_num_patches(value, f'setting "num_patches" under "{PLANS_KEY}" in the plans', auto=True)


class Architecture(pydantic.BaseModel):
    """An architecture in the form of nnU-Net's plans, any key of which may be left out."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid")

    network_class_name: str = ""
    arch_kwargs: dict[str, Any] = {}
    kw_requires_import: list[str] = Field(default=[], alias="_kw_requires_import")


def _architecture(value: Any) -> Any:
    if value is not None:
        Architecture.model_validate(value)
    return value


Window = Annotated[StrictInt, Field(le=MOST_WINDOWS)]


class NMSWSettings(pydantic.BaseModel):
    """Settings of No More Sliding Window."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    downsampling_factor: Annotated[
        tuple[Annotated[StrictInt, Field(ge=1)], Annotated[StrictInt, Field(ge=1)], Annotated[StrictInt, Field(ge=1)]],
        BeforeValidator(_as_tuple),
    ] = Field(
        description="Voxels of the volume per voxel of the global branch's view, by axis in the order of the plans' "
        "patch size. Default: the smallest, as isotropic in mm as integers allow, at which the view of a "
        "median volume has no more voxels than 3.6 patches.",
        json_schema_extra=_allowed("three integers of at least 1, e.g. [3, 3, 3]"),
    )
    num_patches: Annotated[int | str, BeforeValidator(_num_patches)] = Field(
        default="auto",
        description='Patches at inference, K: a number, a percentage of the case\'s windows such as "10%", "all", or '
        '"auto": as many as have a predicted benefit, by the calibration of the model\'s validation. Before the '
        "validation, and where scores predict no benefits (`contribution`), that is 10%.",
    )
    sampled_windows: Annotated[Window, Field(ge=1)] = Field(
        description="Windows that a training step draws from the scores. Default: half of the plans' batch size, "
        "rounded up, so that a step has as many patches as one of nnU-Net.",
        json_schema_extra=_allowed(f"an integer from 1 to {MOST_WINDOWS}"),
    )
    random_windows: Annotated[Window, Field(ge=0)] = Field(
        description="Windows that a training step draws at random, with nnU-Net's foreground oversampling. Default: "
        "half of the plans' batch size, rounded down, at least one.",
        json_schema_extra=_allowed(f"an integer from 0 to {MOST_WINDOWS}"),
    )
    global_width: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5,
        description="Features per stage of the global branch as a fraction of the local branch's. Where these begin "
        "with fewer than 16, take 1.0: a branch of four features may learn nothing.",
        json_schema_extra=_allowed("a number above 0 and up to 1"),
    )
    global_architecture: Annotated[dict[str, Any] | None, BeforeValidator(_architecture)] = Field(
        default=None,
        description="Architecture of the global branch, with any of the keys of the plans' `architecture`. Where it "
        "names no other class, its `arch_kwargs` replace single ones of the plans'. Default: the plans' architecture, "
        "or a `PlainConvUNet` where that takes patches of one size only.",
        json_schema_extra=_allowed(
            'null, or an object of "network_class_name" (a string), "arch_kwargs" (an object) and '
            '"_kw_requires_import" (a list of strings), all optional'
        ),
    )
    context_channels: Annotated[StrictInt, Field(ge=0, le=MOST_CONTEXT_CHANNELS)] = Field(
        default=0,
        description="Channels by which the global branch tells the local branch of the whole volume, beside those of "
        "the image. 0 for none.",
        json_schema_extra=_allowed(f"an integer from 0 to {MOST_CONTEXT_CHANNELS}"),
    )
    windows_at_once: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None,
        description="Windows of a step whose activations the local branch keeps in memory at a time. The others' are "
        "computed again for the gradient: a third more time for less memory. Default: all at once.",
        json_schema_extra=_allowed("an integer of at least 1, or null"),
    )
    seed: Annotated[StrictInt, Field(ge=0)] | None = Field(
        default=None,
        description="Seed of the training: weights, order of cases, augmentation, windows. Default: random, as in "
        "nnU-Net.",
        json_schema_extra=_allowed("an integer of at least 0, or null"),
    )
    score_training: ScoreTraining = Field(
        default="benefit",
        description='How the scores of windows are trained: "benefit" regresses the score map on the measured benefit '
        'of the windows, "contribution" follows the gradient through the draw of windows.',
        json_schema_extra=_allowed(f"one of {', '.join(SCORE_TRAININGS)}"),
    )

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are written into a plans file (plain JSON types)."""
        return {**self.model_dump(), "downsampling_factor": list(self.downsampling_factor)}


ALLOWED = tuple(NMSWSettings.model_fields)
"""Names of the settings."""


def without_retired(given: Any) -> dict[str, Any]:
    """The settings of a plans file without what earlier versions wrote there.

    Args:
        given: what stands under `PLANS_KEY`.

    Raises:
        UserError: it is no object, or a retired setting has another value than the one that is left.
    """
    if not isinstance(given, Mapping):
        raise UserError(f'"{PLANS_KEY}" in the plans must be an object of settings; allowed: {", ".join(ALLOWED)}')
    for name, value in given.items():
        if name in RETIRED and (value != RETIRED[name] or isinstance(value, bool) != isinstance(RETIRED[name], bool)):
            raise UserError(
                f'setting "{name}" under "{PLANS_KEY}" in the plans is {value!r}: version {LAST_VERSION_WITH_ALL} of '
                "nnunet_nmsw is the last that has it. Install that version for a model that was trained so; for a new "
                "training, remove the setting"
            )
    return {name: value for name, value in given.items() if name not in {*RETIRED, *FACTS_OF_EARLIER_VERSIONS}}


def settings_from(given: Mapping[str, Any]) -> NMSWSettings:
    """Check settings.

    Args:
        given: by name, without retired ones.

    Raises:
        UserError: one is unknown, missing, or impossible.
    """
    unknown = sorted(set(given) - set(ALLOWED))
    if unknown:
        raise UserError(
            f'unknown setting "{unknown[0]}" under "{PLANS_KEY}" in the plans; allowed: {", ".join(ALLOWED)}'
        )
    try:
        return NMSWSettings.model_validate(dict(given))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise cause from None
        name = str(first["loc"][0])
        raise refused(name, given.get(name)) from None


def refused(name: str, value: Any, allowed: str | None = None) -> UserError:
    """The error for a setting that cannot be.

    Args:
        name: of the setting.
        value: that was given.
        allowed: what it may be, in words; as the setting itself says where None.
    """
    if allowed is None:
        extra = NMSWSettings.model_fields[name].json_schema_extra
        assert isinstance(extra, dict)
        allowed = str(extra["allowed"])
    return UserError(f'setting "{name}" under "{PLANS_KEY}" in the plans is {value!r}; allowed: {allowed}')


def table() -> str:
    """The settings as a table in Markdown, for the documentation."""
    rows = ["| setting | default | |", "|---|---|---|"]
    for name, field in NMSWSettings.model_fields.items():
        default = "by the plans" if field.is_required() else f"`{_as_json(field.default)}`"
        rows.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(rows)


def _as_json(value: Any) -> str:
    return "null" if value is None else f'"{value}"' if isinstance(value, str) else str(value)


if __name__ == "__main__":
    print(table())
