"""What a configuration of nnU-Net's plans says of an NMSW model: its settings, and its branches' architectures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.model.architecture import (
    check_architecture,
    check_local_architecture,
    convolutional_architecture,
    global_architecture,
    takes_one_size,
)
from nnunet_nmsw.settings import PLANS_KEY, NMSWSettings, refused, settings_from, without_retired

SMALLEST_BATCH = 2
"""Of nnU-Net's plans; plans that were made for inference may have none."""

MAX_VIEW_IN_PATCHES = 3.6
"""The global branch's view of a median volume may have as many voxels as this many patches. At half of the local
branch's features such a view costs what 0.9 patches cost."""


def settings_of(configuration: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> NMSWSettings:
    """The settings of a configuration: what its key `nmsw` sets, and defaults for the rest.

    Args:
        configuration: of nnU-Net's plans, inheritance resolved, as in `ConfigurationManager.configuration`.
        defaults: in the place of the settings' own.

    Raises:
        UserError: a setting is unknown or impossible, the configuration is not 3D, or its network is for another patch
            size.
    """
    patch_size = configuration["patch_size"]
    if len(patch_size) != 3:
        raise UserError(
            "NMSW replaces the sliding window of 3D configurations and this one is 2D: "
            "train 3d_fullres, or use nnUNetTrainer for 2d"
        )
    given = {
        **windows_of_batch(configuration.get("batch_size", SMALLEST_BATCH)),
        **(defaults or {}),
        **without_retired(configuration.get(PLANS_KEY, {})),
    }
    if "downsampling_factor" not in given:
        given["downsampling_factor"] = default_downsampling_factor(
            configuration["median_image_size_in_voxels"], patch_size, configuration["spacing"]
        )
    settings, local = settings_from(given), configuration["architecture"]
    if any(f > n for f, n in zip(settings.downsampling_factor, patch_size, strict=True)):
        allowed = f"no more voxels than a patch has by axis, {list(patch_size)}"
        raise refused("downsampling_factor", list(settings.downsampling_factor), allowed)
    check_local_architecture(local, patch_size)
    if settings.global_architecture is None and takes_one_size(local):
        convolutional = convolutional_architecture(
            configuration["median_image_size_in_voxels"],
            configuration["spacing"],
            settings.downsampling_factor,
            settings.global_width,
        )
        settings = settings.model_copy(update={"global_architecture": convolutional})
    of_global = global_architecture(local, settings.global_architecture, settings.global_width)
    if takes_one_size(of_global):
        allowed = f"a network that takes volumes of any size, as {of_global['network_class_name']} does not"
        raise refused("global_architecture", settings.global_architecture, allowed)
    return settings


def branch_architectures(architecture: dict[str, Any], settings: NMSWSettings) -> dict[str, dict[str, Any]]:
    """Architectures of the branches "local" and "global", checked.

    Args:
        architecture: of the plans.
        settings: the settings.

    Raises:
        UserError: one of them names what cannot be imported, or has arguments that are not its class's.
    """
    of_global = global_architecture(architecture, settings.global_architecture, settings.global_width)
    check_architecture(architecture, '"architecture" in the plans')
    check_architecture(of_global, f'"global_architecture" under "{PLANS_KEY}" in the plans')
    return {"local": architecture, "global": of_global}


def windows_of_batch(batch_size: int) -> dict[str, int]:
    """The settings of a training step's windows, in the place of a batch of nnU-Net's."""
    return {"sampled_windows": max(1, -(-batch_size // 2)), "random_windows": max(1, batch_size // 2)}


def default_downsampling_factor(
    median_shape: Sequence[float], patch_size: Sequence[int], spacing: Sequence[float]
) -> tuple[int, int, int]:
    """The smallest factors, as isotropic in space as integers allow, at which the global branch is cheap.

    Cheap means that its view of a median volume has no more voxels than `MAX_VIEW_IN_PATCHES` patches.

    Args:
        median_shape: voxels by axis, at the plans' spacing.
        patch_size: voxels by axis.
        spacing: mm by axis.
    """
    budget = MAX_VIEW_IN_PATCHES * math.prod(patch_size)
    # Each low-resolution spacing at which some axis steps to its next integer factor, from fine to coarse.
    steps = sorted({step * axis_spacing for axis_spacing in spacing for step in range(1, 65)})
    for low_spacing in steps:
        factor = tuple(max(1, math.floor(low_spacing / axis_spacing + 1e-6)) for axis_spacing in spacing)
        if math.prod(math.ceil(n / f) for n, f in zip(median_shape, factor, strict=True)) <= budget:
            break
    d, h, w = (min(f, n) for f, n in zip(factor, patch_size, strict=True))
    return d, h, w
