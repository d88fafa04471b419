"""Datasets and arms of the ablations."""

from __future__ import annotations

import dataclasses
from typing import Any

from arms import CONTEXTS, PARTS


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset of the ablations and the network for it.

    Attributes:
        name: of its folder.
        patch_size: voxels by axis.
        features: of the stages, from the finest.
        batch_size: patches of a step.
        plans: whose preprocessed data is taken.
        low_plans: the same of a spacing that is about the global branch's.
        mirrors: whether left and right look alike to the labels. Where not, no arm mirrors.
        variant: tells apart what is made of one dataset.
    """

    name: str
    patch_size: list[int]
    features: list[int]
    batch_size: int = 4
    plans: str = "nnUNetPlans"
    low_plans: str = ""
    mirrors: bool = True
    variant: str = ""

    @property
    def number(self) -> int:
        """nnU-Net's."""
        return int(self.name.removeprefix("Dataset")[:3])

    @property
    def folder(self) -> str:
        """Name of the folder of its results."""
        return self.name + self.variant


# nnUNetPlans4mm: nnUNetv2_plan_experiment -overwrite_target_spacing 4 4 4 -overwrite_plans_name nnUNetPlans4mm
DATASETS = {
    4: Dataset("Dataset004_Hippocampus", [16, 16, 16], [16, 32, 64], low_plans="nnUNetPlans2mm"),
    # make_kits_phantom.py --spacing 6 --train 120 --test 0
    902: Dataset("Dataset902_KiTSPhantom6mm", [16, 16, 16], [8, 16, 32]),
    # make_kits_phantom.py --spacing 3 --train 100 --test 0
    903: Dataset("Dataset903_KiTSPhantom3mm", [24, 24, 24], [16, 32, 64], 2, low_plans="nnUNetPlans12mm"),
    731: Dataset(
        "Dataset731_BTCV", [24, 24, 24], [16, 32, 64], 2, "nnUNetPlans4mm", low_plans="nnUNetPlans12mm", mirrors=False
    ),
    # at nnU-Net's full width: for a GPU
    7313: Dataset(
        "Dataset731_BTCV", [64, 64, 64], [32, 64, 128, 256, 320], 2, "nnUNetPlans3mm", mirrors=False, variant="_3mm"
    ),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        trainer: its name without the length.
        settings: under `nmsw` in the plans.
    """

    trainer: str = "nnUNetTrainerNMSW"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


STOCK = "stock"
ONE_EACH = {"sampled_windows": 1, "random_windows": 1}
BATCH_NORM = {"arch_kwargs": {"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}}
ARMS = {
    STOCK: Arm("nnUNetTrainer"),
    # how scores are trained
    "default": Arm(),
    "path_contribution": Arm(settings={"score_training": "contribution"}),
    "paper": Arm("nnUNetTrainerNMSW_paper"),
    "paper_2_2": Arm("nnUNetTrainerNMSW_paper", {"sampled_windows": 2, "random_windows": 2}),
    # the default with one thing changed: trainers of arms.py,
    **{name: Arm(f"nnUNetTrainerNMSW_{name}") for name in PARTS},
    "uniform": Arm("nnUNetTrainerNMSW_uniform"),
    "uniform_jittered": Arm("nnUNetTrainerNMSW_uniform_jittered"),
    # what the local branch is told of the volume,
    "context": Arm(settings={"context_channels": 4}),
    "context_4": Arm(settings={**ONE_EACH, "context_channels": 4}),
    "context_8": Arm(settings={**ONE_EACH, "context_channels": 8}),
    **{name: Arm(f"nnUNetTrainerNMSW_{name}", {**ONE_EACH, "context_channels": 4}) for name in CONTEXTS},
    # which windows a step looks at, and how often the global branch is trained,
    "windows_1_1": Arm(settings=ONE_EACH),
    "windows_2_0": Arm(settings={"sampled_windows": 2, "random_windows": 0}),
    "windows_1_1_in_turns": Arm("nnUNetTrainerNMSW_global_in_turns", ONE_EACH),
    "windows_1_3": Arm(settings={"sampled_windows": 1, "random_windows": 3}),
    "windows_3_1": Arm(settings={"sampled_windows": 3, "random_windows": 1}),
    # how the view of the global branch is augmented,
    "augmentation_in_mm": Arm("nnUNetTrainerNMSW_augmentation_in_mm"),
    # and the global branch
    "width_075": Arm(settings={"global_width": 0.75}),
    "width_100": Arm(settings={"global_width": 1.0}),
    "factor_2": Arm(settings={"downsampling_factor": [2, 2, 2]}),
    "factor_4": Arm(settings={"downsampling_factor": [4, 4, 4]}),
    "batch_norm": Arm(settings={"global_architecture": BATCH_NORM}),
}
PICKED_BY_TOP_K = ("paper", "paper_2_2")
"""Arms whose windows are picked by top-k."""

SELECTION_ARMS = ("default",)
"""Arms with whose networks all ways of picking windows are compared."""
