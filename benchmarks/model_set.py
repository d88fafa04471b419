"""A set of stock models from file to file: `nmsw_predict` against nnU-Net's sliding window of each of its models.

    python benchmarks/model_set.py --train              # the stand-in models: one of 30 classes, four of 7 or 8
    python benchmarks/model_set.py -k 10% all -o model_set.json

The models are trained on generated images of many organs (`synthetic.py`): the coarse one on all classes at 3 mm, each
of the fine ones at 1.5 mm on its share, with a label for each. The yardstick is what a user does without a set: five
commands, whose labels are merged by name, the fine models' over the coarse one's. Dice is that of the classes that the
fine models have, against this merge and against the reference. Commands take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from measuring import write_results
from prediction import OF_NNUNET, timed
from synthetic import SPACING, organs, write

FIRST_ID, NUM_CLASSES, NUM_FINE = 940, 30, 4
TRAINING_SHAPE, TEST_SHAPE, NUM_TRAINING, FIRST_TEST = (96, 112, 112), (160, 176, 176), 10, 2000
NAMES = [f"organ_{number:02d}" for number in range(1, NUM_CLASSES)]
SHARES = [list(share) for share in np.array_split(np.array(NAMES), NUM_FINE)]
PLANS, TRAINER = "nnUNetPlans_small", "nnUNetTrainer_short"
COARSE_SPACING = 3.0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="write the datasets and train the models instead")
    parser.add_argument("-k", nargs="+", default=["10%"])
    parser.add_argument("-cases", type=int, default=1, help="images to predict")
    parser.add_argument("-rounds", type=int, default=2)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-o", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.train:
        trainers = [os.environ.get("nnUNet_extTrainer", ""), str(Path(__file__).with_name("trainers"))]
        os.environ["nnUNet_extTrainer"] = os.pathsep.join(filter(None, trainers))
        for number, names in enumerate([NAMES, *SHARES]):
            train(FIRST_ID + number, names, args.device, coarse=number == 0)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = measured(args, Path(folder))
    if args.o:
        write_results(args.o, results, torch.device(args.device))


def dataset_name(number: int) -> str:
    """Of a dataset's id."""
    return f"Dataset{number}_Part{number - FIRST_ID}"


def train(number: int, names: list[str], device: str, coarse: bool) -> None:
    """Write the dataset of some classes, and train a stock model of it."""
    dataset = Path(os.environ["nnUNet_raw"]) / dataset_name(number)
    for folder in ("imagesTr", "labelsTr"):
        (dataset / folder).mkdir(parents=True, exist_ok=True)
    own = np.zeros(NUM_CLASSES, np.uint8)
    own[[NAMES.index(name) + 1 for name in names]] = range(1, len(names) + 1)
    for case in range(NUM_TRAINING):
        image, labels = organs(list(TRAINING_SHAPE), NUM_CLASSES, case)
        write(image, dataset / "imagesTr" / f"case_{case:03d}_0000.nii.gz", SPACING)
        write(own[labels], dataset / "labelsTr" / f"case_{case:03d}.nii.gz", SPACING)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{name: label for label, name in enumerate(names, 1)}},
        "numTraining": NUM_TRAINING,
        "file_ending": ".nii.gz",
    }
    (dataset / "dataset.json").write_text(json.dumps(content))
    spacing = COARSE_SPACING if coarse else SPACING
    patch, features = ("32 32 32", "16 32 64") if coarse else ("48 48 48", "8 16 32 64")
    plans = f"-overwrite_target_spacing {spacing} {spacing} {spacing}"
    for command in (
        f"nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres -npfp 1 -np 1 {plans} -overwrite_plans_name parts",
        f"python -m nnunet_nmsw.demo.small_plans -d {number} --patch_size {patch} --features {features} "
        f"--batch_size 2 -p parts --name {PLANS}",
        f"nnUNetv2_train {number} 3d_fullres 0 -p {PLANS} -tr {TRAINER} -device {device}",
    ):
        print(command, flush=True)
        subprocess.run(command.split(), check=True)


def model_of(number: int) -> Path:
    """Folder of a model."""
    results = Path(os.environ["nnUNet_results"])
    return results / dataset_name(number) / f"{TRAINER}__{PLANS}__3d_fullres"


def measured(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Seconds, memory and Dice of the ways to predict."""
    images, references = folder / "images", []
    images.mkdir()
    for case in range(args.cases):
        image, labels = organs(list(TEST_SHAPE), NUM_CLASSES, FIRST_TEST + case)
        write(image, images / f"case_{case:03d}_0000.nii.gz", SPACING)
        references.append(labels)
    models = [model_of(FIRST_ID + number) for number in range(1 + NUM_FINE)]
    common = f"-i {images} -f 0 -device {args.device} --disable_progress_bar --disable_tta"
    fine = " ".join(map(str, models[1:]))
    ways = {"nnUNetv2_predict, five models": [f"{OF_NNUNET} {common} -m {model}" for model in models]}
    for k in args.k:
        for backend in ("pytorch", "openvino") if args.device == "cpu" else ("pytorch",):
            command = (
                f"nmsw_predict {common} --global_model {models[0]} --local_model {fine} -k {k} --backend {backend}"
            )
            ways[f"nmsw_predict -k {k} --backend {backend}"] = [command]
    stock, *_ = ways
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    labels: dict[str, list[np.ndarray]] = {}
    for _ in range(args.rounds):
        for way, commands in ways.items():
            outputs = [folder / f"{way} {number}".replace(" ", "_") for number in range(len(commands))]
            parts = [timed(f"{command} -o {output}") for command, output in zip(commands, outputs, strict=True)]
            runs[way].append({"seconds": sum(p["seconds"] for p in parts), "gib": max(p["gib"] for p in parts)})
            print(way, runs[way][-1], flush=True)
            names = [f"case_{case:03d}.nii.gz" for case in range(args.cases)]
            labels[way] = [merged([read(output / name) for output in outputs]) for name in names]
            for output in outputs:
                shutil.rmtree(output)
    rows = {}
    for way, of_way in runs.items():
        row = {key: statistics.median(run[key] for run in of_way) for key in of_way[0]}
        row["times_faster"] = statistics.median(run["seconds"] for run in runs[stock]) / row["seconds"]
        row["dice"] = mean_dice(labels[way], references)
        row["dice_to_the_merge"] = mean_dice(labels[way], labels[stock])
        rows[way] = row
        print(way, {key: round(value, 4) for key, value in row.items()})
    return {"shape": TEST_SHAPE, "rows": rows, "runs": runs}


def read(file: Path) -> np.ndarray:
    """Labels of a file."""
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    return array


def merged(parts: list[np.ndarray]) -> np.ndarray:
    """Labels of the coarse model with the fine models' over them, in the coarse model's numbers."""
    result, *fine = parts
    result = result.copy()
    if fine:
        result[:] = 0  # every class is a fine model's
    for labels, names in zip(fine, SHARES, strict=False):
        numbers = np.array([0, *(NAMES.index(name) + 1 for name in names)])
        result[labels > 0] = numbers[labels[labels > 0]]
    return result


def mean_dice(found: list[np.ndarray], references: list[np.ndarray]) -> float:
    """Over the classes that the references have."""
    scores = []
    for labels, reference in zip(found, references, strict=True):
        for number in np.unique(reference)[1:]:
            here, there = labels == number, reference == number
            scores.append(2 * np.count_nonzero(here & there) / (np.count_nonzero(here) + np.count_nonzero(there)))
    return float(np.mean(scores))


if __name__ == "__main__":
    main()
