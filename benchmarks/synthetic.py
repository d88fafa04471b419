"""A dataset of many organs with large test images, and models that were never trained.

    python benchmarks/synthetic.py -d 930 -classes 30 -image 400 512 512
    nnUNetv2_plan_and_preprocess -d 930 -c 3d_fullres -npfp 2 -np 2
    python -m nnunet_nmsw.demo.small_plans -d 930 --patch_size 64 64 64 --features 8 16 32 64
    nnUNetv2_train 930 3d_fullres 0 -p nnUNetPlans_small -tr nnUNetTrainerNMSW_1epoch -device cpu
    python benchmarks/synthetic.py --widen MODEL -classes 118 -o MODEL_118    # classes more that it never predicts
    python benchmarks/synthetic.py --widen MODEL --times 4 -o MODEL_WIDE      # features more that are always zero

Organs are ellipsoids, and their brightness says which. An epoch is enough for labels with surfaces as organs have,
which is what the export of `nmsw_predict` depends on. An untrained network's labels are speckled: for memory, and for
the network's part of a prediction, which does not depend on weights.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_nmsw.model.architecture import convolutional_architecture
from nnunet_nmsw.model.plans import settings_of
from nnunet_nmsw.trainers import nnUNetTrainerNMSW

TRAINER = "nnUNetTrainerNMSW"
NUM_TRAINING, SPACING = 10, 1.5
NEVER = -100.0
"""Logit of a class that is never predicted."""
FULL_WIDTH = 32
"""Features of the first stage of nnU-Net's networks."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", type=int, help="id of the dataset to write")
    parser.add_argument("--widen", type=Path, metavar="MODEL", help="write a copy of a model with more classes instead")
    parser.add_argument("-o", type=Path, help="folder of this copy")
    parser.add_argument(
        "--times", type=int, metavar="N", help="with --widen: N times the features instead, for its cost"
    )
    parser.add_argument("-classes", type=int, default=3, help="with the background")
    parser.add_argument("-organs", type=int, help="ellipsoids in an image. Default: one for each class")
    parser.add_argument("-image", type=int, nargs=3, default=[400, 512, 512], metavar=("Z", "Y", "X"), help="of tests")
    parser.add_argument("-training_image", type=int, nargs=3, default=[96, 112, 112], metavar=("Z", "Y", "X"))
    parser.add_argument("-training_cases", type=int, default=NUM_TRAINING, help="number of training volumes")
    parser.add_argument("-image_spacing", type=float, default=0.8, help="of tests, mm")
    parser.add_argument("-cases", type=int, default=1, help="number of tests")
    args = parser.parse_args()
    if args.widen:
        if args.times:
            widen_features(args.widen, args.o, args.times)
        else:
            widen(args.widen, args.o, args.classes)
        return
    dataset = Path(os.environ["nnUNet_raw"]) / f"Dataset{args.d:03d}_Organs{args.classes}"
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (dataset / folder).mkdir(parents=True, exist_ok=True)
    for case in range(args.training_cases):
        image, labels = organs(args.training_image, args.classes, case, args.organs)
        write(image, dataset / "imagesTr" / f"case_{case:03d}_0000.nii.gz", SPACING)
        write(labels, dataset / "labelsTr" / f"case_{case:03d}.nii.gz", SPACING)
    for case in range(args.cases):
        image, _ = organs(args.image, args.classes, 1000 + case, args.organs)
        write(image, dataset / "imagesTs" / f"test_{case:03d}_0000.nii.gz", args.image_spacing)
    (dataset / "dataset.json").write_text(json.dumps({**dataset_of(args.classes), "numTraining": args.training_cases}))


def write(array: np.ndarray, file: Path, spacing: float) -> None:
    """Write an image of cubic voxels."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([spacing] * 3)
    sitk.WriteImage(image, str(file))


def write_model(folder: Path, shape: list[int], spacing: float, patch: int, features: int, classes: int) -> None:
    """Write a model folder as training leaves it.

    Args:
        folder: of the model.
        shape: median shape of the volumes, in voxels.
        spacing: of the network, mm.
        patch: voxels of a patch along each axis.
        features: of the network's first stage.
        classes: with the background.
    """
    torch.manual_seed(0)
    plans = plans_of(shape, spacing, patch, features)
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    plans["configurations"]["3d_fullres"]["nmsw"] = settings_of(configuration.configuration).to_dict()
    network = nnUNetTrainerNMSW.build_network_architecture(manager, configuration, 1, classes, False)
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans, indent=1))
    (folder / "dataset.json").write_text(json.dumps(dataset_of(classes), indent=1))
    checkpoint = {
        "network_weights": network.state_dict(),
        "init_args": {"configuration": "3d_fullres"},
        "trainer_name": TRAINER,
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")


def widen(model: Path, copy: Path, classes: int) -> None:
    """Write a copy of fold 0 of a model with more classes, none of which it predicts."""
    (copy / "fold_0").mkdir(parents=True)
    (copy / "plans.json").write_text((model / "plans.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(dataset_of(classes), indent=1))
    file = Path("fold_0", "checkpoint_final.pth")
    checkpoint = torch.load(model / file, map_location="cpu", weights_only=False)
    weights = checkpoint["network_weights"]
    present = weights["fusion_parameters"].shape[1]
    for name, tensor in weights.items():
        if ".seg_layers." in name:
            new = tensor.new_zeros(classes - present, *tensor.shape[1:])
            new += NEVER if name.endswith("bias") else 0
            # The last output of the global branch is the score map.
            weights[name] = torch.cat([tensor[:present], new, tensor[present:]])
    new = weights["fusion_parameters"].new_zeros(len(weights["fusion_parameters"]), classes - present)
    weights["fusion_parameters"] = torch.cat([weights["fusion_parameters"], new], 1)
    torch.save(checkpoint, copy / file)


def widen_features(model: Path, copy: Path, times: int) -> None:
    """Write a copy of fold 0 of a model with more features, which are zero: it costs more and predicts the same."""
    (copy / "fold_0").mkdir(parents=True)
    plans = json.loads((model / "plans.json").read_text())
    file = Path("fold_0", "checkpoint_final.pth")
    checkpoint = torch.load(model / file, map_location="cpu", weights_only=False)
    configuration = checkpoint["init_args"]["configuration"]
    arguments = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [times * features for features in arguments["features_per_stage"]]
    dataset = json.loads((model / "dataset.json").read_text())
    manager = PlansManager(plans)
    of_network = (len(dataset["channel_names"]), len(dataset["labels"]), False)
    of_plans = (manager, manager.get_configuration(configuration))
    network = nnUNetTrainerNMSW.build_network_architecture(*of_plans, *of_network)
    wide = network.state_dict()
    for name, small in checkpoint["network_weights"].items():
        if wide[name].shape == small.shape:
            wide[name].copy_(small)
            continue
        room = wide[name].zero_()
        if small.ndim == 1:
            room[: len(small)] = small
            continue
        # The decoder's features and those that skip come one after the other.
        parts = 2 if ".decoder.stages" in name and small.shape[1] == 2 * small.shape[0] else 1
        for part, room_of_part in zip(small.chunk(parts, 1), room.chunk(parts, 1), strict=True):
            room_of_part[: part.shape[0], : part.shape[1]] = part
    checkpoint["network_weights"] = wide
    torch.save(checkpoint, copy / file)
    (copy / "plans.json").write_text(json.dumps(plans, indent=1))
    (copy / "dataset.json").write_text(json.dumps(dataset, indent=1))


def dataset_of(classes: int) -> dict[str, Any]:
    """A dataset.json."""
    labels = {"background": 0, **{f"organ {label}": label for label in range(1, classes)}}
    return {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}


def plans_of(shape: list[int], spacing: float, patch: int, features: int, **nmsw: Any) -> dict[str, Any]:
    """Plans of a network for cubic patches. Arguments are those of `write_model`, and settings of NMSW."""
    keywords = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    function = "resample_data_or_seg_to_shape"
    configuration = {
        "data_identifier": "none",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [patch] * 3,
        "median_image_size_in_voxels": [float(n) for n in shape],
        "spacing": [spacing] * 3,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": function,
        "resampling_fn_data_kwargs": {**keywords, "order": 3},
        "resampling_fn_seg": function,
        "resampling_fn_seg_kwargs": {**keywords, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": function,
        "resampling_fn_probabilities_kwargs": {**keywords, "order": 1},
        "architecture": convolutional_architecture([patch] * 3, [spacing] * 3, [1, 1, 1], features / FULL_WIDTH),
        "batch_dice": False,
        "nmsw": nmsw,
    }
    intensities = {"mean": 100.0, "std": 100.0, "percentile_00_5": -900.0, "percentile_99_5": 1000.0}
    return {
        "dataset_name": "Dataset000_Untrained",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {"3d_fullres": configuration},
    }


def organs(shape: list[int], classes: int, seed: int, number: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ellipsoids of different brightness in a large one, int16, and their labels, uint8.

    Args:
        shape: voxels by axis.
        classes: with the background.
        seed: of sizes, places and noise.
        number: of ellipsoids; neighbours in brightness share a label where there are more than labels.
    """
    random = np.random.default_rng(seed)
    image, labels = np.full(shape, -900, np.int16), np.zeros(shape, np.uint8)
    fill(np.array(shape) / 2, np.array(shape) * 0.45, (image, 0))
    number = number or classes - 1
    for organ in range(number):
        centre = np.array(shape) * random.uniform(0.25, 0.75, 3)
        radii = np.array(shape) * random.uniform(0.04, 0.12, 3)
        brightness, label = 50 + 950 * (organ + 1) // (number + 1), 1 + organ * (classes - 1) // number
        fill(centre, radii, (image, brightness), (labels, label))
    image += random.integers(-10, 11, shape, dtype=np.int16)
    return image, labels


def fill(centre: np.ndarray, radii: np.ndarray, *arrays: tuple[np.ndarray, int]) -> None:
    """Set what lies inside of an ellipsoid to a value, in each of some arrays."""
    first, end = np.maximum(np.floor(centre - radii), 0).astype(int), np.ceil(centre + radii).astype(int) + 1
    box = tuple(slice(a, b) for a, b in zip(first, end, strict=True))
    axes = np.ogrid[box]
    inside = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)) < 1
    for array, value in arrays:
        array[box][inside[tuple(slice(n) for n in array[box].shape)]] = value


if __name__ == "__main__":
    main()
