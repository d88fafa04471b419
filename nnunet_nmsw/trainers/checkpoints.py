"""Checkpoints of a training: written whole, and continued under the settings that it started with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import written_whole
from nnunet_nmsw.selection.calibration import CALIBRATION_KEY
from nnunet_nmsw.settings import PLANS_KEY, NMSWSettings, without_retired

NEW_DEFAULTS = ("sampled_windows", "random_windows", "context_channels", "num_patches")
"""Settings whose default is another one since version 0.2.0."""

WITHOUT_CONTEXT = {"context_channels": 0}
"""How version 0.1.0 trained, which had no such setting."""


def save_whole(save: Callable[[str], None], file: Path) -> None:
    """Write a checkpoint. A training that is killed while it writes leaves the checkpoint before, not half a file."""
    with written_whole(file.parent) as unfinished:
        save(str(unfinished / file.name))


def keep_calibration(folder: Path, network: nn.Module, calibration: dict[str, Any]) -> None:
    """Write what the validation has calibrated into the checkpoints that hold the network's weights.

    Whoever shares a model shares its checkpoints, and seldom its validation.

    Args:
        folder: of a fold.
        network: that was validated.
        calibration: see `selection.calibration.calibration_of`.
    """
    weights = network.state_dict()
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        file = folder / name
        if not file.is_file():
            continue
        checkpoint = torch.load(file, map_location="cpu", weights_only=False)
        saved = checkpoint["network_weights"]
        if saved.keys() == weights.keys() and all(torch.equal(saved[key], weights[key].cpu()) for key in saved):
            save_whole(partial(torch.save, {**checkpoint, CALIBRATION_KEY: calibration}), file)


def settings_of_training(
    checkpoint: dict[str, Any] | str,
    configuration: str,
    settings: NMSWSettings,
    named: Collection[str],
    output_folder: str,
) -> NMSWSettings:
    """The settings that a training started with, before it goes on or is validated.

    Args:
        checkpoint: of the training, or its file.
        configuration: name of the plans' configuration.
        settings: as they are now.
        named: those of them that the plans name. What they do not name had another default in earlier versions.
        output_folder: of the training, for the message.

    Raises:
        UserError: a setting that the plans name has changed, or one that decides on the networks.
    """
    if isinstance(checkpoint, str):
        # Mapped and not read: only the settings are looked at here.
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)
        assert isinstance(checkpoint, dict)
    # An earlier version may have trained with settings that are gone.
    given = checkpoint["init_args"]["plans"]["configurations"][configuration][PLANS_KEY]
    before = {**WITHOUT_CONTEXT, **without_retired(given)}
    taken = {name: before[name] for name in NEW_DEFAULTS if name in before and name not in named}
    settings = settings.model_copy(update=taken)
    for name, value in settings.to_dict().items():
        if before.get(name, value) != value:
            raise UserError(
                f'setting "{name}" under "{PLANS_KEY}" in the plans is {value!r}, and was {before[name]!r} when '
                f"the training of {output_folder} started: write {before[name]!r} there, or train anew without "
                "--c and --val"
            )
    return settings
