"""Backbones of a study, in versions that a CPU trains: nnU-Net's U-Net, MedNeXt and SwinUNETR."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from grid import Dataset

from nnunet_nmsw.demo.small_plans import write_small_plans
from nnunet_nmsw.files import write_json

UNET = "unet"


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network in the place of the dataset's U-Net.

    Attributes:
        architecture: of the plans.
        nmsw: settings that go with it.
        patch_size: voxels by axis; None for the dataset's.
    """

    architecture: dict[str, Any]
    nmsw: dict[str, Any] = dataclasses.field(default_factory=dict)
    patch_size: list[int] | None = None


def of_monai(name: str, **arch_kwargs: Any) -> dict[str, Any]:
    """The architecture of one of the package's adapters."""
    return {
        "network_class_name": f"nnunet_nmsw.backbones.monai.{name}",
        "arch_kwargs": arch_kwargs,
        "_kw_requires_import": [],
    }


BACKBONES = {
    UNET: None,
    "mednext": Backbone(
        of_monai("MedNeXt", init_filters=16, kernel_size=3, blocks_down=[1, 1], blocks_bottleneck=1, blocks_up=[1, 1]),
        {"global_architecture": {"arch_kwargs": {"init_filters": 8}}},
    ),
    # At 32 voxels the bottleneck is a single one, which an instance norm cannot normalise.
    "swin": Backbone(
        of_monai(
            "SwinUNETR",
            feature_size=12,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            norm_name=["group", {"num_groups": 4}],
        ),
        patch_size=[32, 32, 32],
    ),
}


def write_plans(dataset: Dataset, name: str, nmsw: dict[str, Any], source: str, backbone: str) -> None:
    """Write the plans of an arm.

    Args:
        dataset: its network is taken where the backbone is the U-Net.
        name: of the plans.
        nmsw: settings of the arm.
        source: plans whose preprocessed data is taken.
        backbone: a key of `BACKBONES`.
    """
    other = BACKBONES[backbone]
    patch_size = (other and other.patch_size) or dataset.patch_size
    settings = {**(other.nmsw if other else {}), **nmsw}
    file = write_small_plans(dataset.number, patch_size, dataset.features, name, settings, dataset.batch_size, source)
    if other:
        plans = json.loads(file.read_text())
        plans["configurations"]["3d_fullres"]["architecture"] = other.architecture
        write_json(file, plans)
