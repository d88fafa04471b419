"""A model that was never trained, whose labels are noise: faults do not depend on what a model has learned."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import DATASET_JSON, make_plans

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.model.plans import settings_of
from nnunet_nmsw.trainers import nnUNetTrainerNMSW


def write_model(
    folder: Path,
    trainer: str = "nnUNetTrainerNMSW",
    labels: Sequence[str] = ("organ", "lesion"),
    seed: int = 0,
    dataset: dict[str, Any] | None = None,
    **configuration_of_plans: Any,
) -> Path:
    """A model folder as training leaves it, with an untrained network.

    Args:
        folder: to write.
        trainer: name of the class that has trained it.
        labels: names of the classes, in the order of their numbers.
        seed: of the weights.
        dataset: what `dataset.json` has in the place of the tiny one's.
        **configuration_of_plans: what the configuration has in the place of the tiny one's.
    """
    torch.manual_seed(seed)
    plans = make_plans()
    plans["configurations"]["3d_fullres"].pop("nmsw", None)
    numbered = {"background": 0, **{name: number for number, name in enumerate(labels, 1)}}
    of_dataset = {**DATASET_JSON, "labels": numbered, **(dataset or {})}
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    channels = len(of_dataset["channel_names"])
    (intensities,) = plans["foreground_intensity_properties_per_channel"].values()
    plans["foreground_intensity_properties_per_channel"] = {str(channel): intensities for channel in range(channels)}
    network = nnUNetTrainerNMSW.build_network_architecture(manager, configuration, channels, len(numbered), False)
    weights = network.state_dict()
    plans["configurations"]["3d_fullres"].update(configuration_of_plans)
    if trainer == "nnUNetTrainerNMSW":
        settings = settings_of(configuration.configuration).to_dict()
        plans["configurations"]["3d_fullres"]["nmsw"] = settings
    else:
        weights = {k.removeprefix("local_branch."): w for k, w in weights.items() if k.startswith("local_branch.")}
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(of_dataset))
    checkpoint = {
        "network_weights": weights,
        "init_args": {"configuration": "3d_fullres", "plans": plans, "fold": 0, "dataset_json": of_dataset},
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": None,
        # What nnU-Net logs is in NumPy's scalars.
        "_best_ema": np.float64(0.5),
        "logging": {"train_losses": [np.float32(1.0)], "ema_fg_dice": [np.float64(0.5)]},
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def write_image(file: Path, seed: int = 0, shape: tuple[int, ...] = (14, 15, 16)) -> np.ndarray:
    """A small image of noise."""
    array = np.random.default_rng(seed).normal(100, 30, shape).astype(np.float32)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0,) * len(shape))
    sitk.WriteImage(image, str(file))
    return array


def refused_by(main: Callable[[list[str]], None], flags: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The line that a command ends with; fails for a traceback, or more than a line."""
    with pytest.raises((SystemExit, UserError)) as ended:
        main(flags)
    captured = capfd.readouterr()
    # argparse itself prints, and ends with status 2.
    message = captured.err.strip().splitlines()[-1] if ended.value.code == 2 else str(ended.value)
    assert "Traceback" not in captured.err
    assert "\n" not in message
    assert 10 < len(message) < 900
    return message
