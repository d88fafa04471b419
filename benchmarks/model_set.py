"""A set of stock models from file to file: `nmsw_predict` against nnU-Net's sliding window of each of its models.

    python benchmarks/model_set.py --make models        # the stand-in models: one of 29 classes, four of 7 or 8
    python benchmarks/model_set.py --models models -k 10% 30% -o model_set.json

Beside the models lie labelled images to calibrate them with, see `nmsw_predict --calibrate`.

The images are those of `synthetic.py`, many organs whose brightness says which. The stand-ins are nnU-Net's U-Nets with
weights that are written and not trained: a channel carries the brightness to the last layer, whose logits are largest
for the class of that brightness. The coarse model, at 3 mm, knows all classes, each of the fine ones, at 1.5 mm, its
share. Where brightness is in between, at the borders of organs, they are wrong, the coarse model more so.

The yardstick is what a user does without a set: five commands, whose labels are merged by name. Dice is against this
merge, and against the reference. Commands take turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from measuring import write_results
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from prediction import OF_NNUNET, timed
from synthetic import SPACING, dataset_of, organs, plans_of, write
from torch import nn

NUM_CLASSES, NUM_FINE = 30, 4
TEST_SHAPE, FIRST_TEST = (160, 176, 176), 2000
LABELLED, LABELLED_SHAPE, FIRST_LABELLED = 3, (96, 112, 112), 3000
NAMES = [f"organ_{number:02d}" for number in range(1, NUM_CLASSES)]
SHARES = [list(share) for share in np.array_split(np.array(NAMES), NUM_FINE)]
COARSE_SPACING, COARSE_PATCH, PATCH, FEATURES = 3.0, 48, 64, 16
DARKEST, STEP = 50.0, 950 / NUM_CLASSES
"""Brightness of `synthetic.organs`: that of class L is about DARKEST + STEP * L."""
CERTAINTY_OF_COARSE, CERTAINTY = 3.0, 6.0
POSITIVE = 20.0
"""What is added to a normalised image, so that rectifiers let it through."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write the models into a folder instead")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="that --make wrote")
    parser.add_argument("-k", nargs="+", default=["10%"])
    parser.add_argument("-cases", type=int, default=1, help="images to predict")
    parser.add_argument("-rounds", type=int, default=2)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-o", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.make:
        write_model(args.make / "coarse", list(range(1, NUM_CLASSES)), COARSE_SPACING, COARSE_PATCH)
        for number, names in enumerate(SHARES):
            write_model(args.make / f"fine_{number}", [NAMES.index(name) + 1 for name in names], SPACING, PATCH)
        for folder in ("images", "labels"):
            (args.make / folder).mkdir()
        for case in range(LABELLED):
            image, labels = organs(list(LABELLED_SHAPE), NUM_CLASSES, FIRST_LABELLED + case)
            write(image, args.make / "images" / f"case_{case}_0000.nii.gz", SPACING)
            write(labels, args.make / "labels" / f"case_{case}.nii.gz", SPACING)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = measured(args, Path(folder))
    if args.o:
        write_results(args.o, results, torch.device(args.device))


def write_model(folder: Path, classes: list[int], spacing: float, patch: int) -> None:
    """Write the folder of a stock model that tells neighbouring classes apart by their brightness."""
    shape = [round(n * SPACING / spacing) for n in TEST_SHAPE]
    plans = plans_of(shape, spacing, patch, FEATURES)
    of_network = plans["configurations"]["3d_fullres"]
    of_network.pop("nmsw")
    # A norm of each patch would take away its brightness.
    of_network["architecture"]["arch_kwargs"] |= {"norm_op": None, "norm_op_kwargs": None}
    architecture = of_network["architecture"]
    network = get_network_from_plans(
        *(architecture[key] for key in ("network_class_name", "arch_kwargs", "_kw_requires_import")),
        1,
        len(classes) + 1,
        allow_init=False,
        deep_supervision=False,
    )
    intensities = plans["foreground_intensity_properties_per_channel"]["0"]
    certainty = CERTAINTY_OF_COARSE if spacing == COARSE_SPACING else CERTAINTY
    set_weights(network, classes, intensities["mean"], intensities["std"], certainty)
    dataset = {
        **dataset_of(1),
        "labels": {"background": 0, **{NAMES[number - 1]: own for own, number in enumerate(classes, 1)}},
    }
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans, indent=1))
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=1))
    checkpoint = {
        "network_weights": network.state_dict(),
        "init_args": {"configuration": "3d_fullres", "fold": 0},
        "trainer_name": "nnUNetTrainerNoMirroring",
        "inference_allowed_mirroring_axes": None,
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")


@torch.no_grad()
def set_weights(network: nn.Module, classes: list[int], mean: float, std: float, certainty: float) -> None:
    """Write the weights of a U-Net that classifies by brightness.

    With u the brightness in steps of classes, the logit of class L is the tangent of u² / 2 at L: the class whose
    number is nearest wins. Background has the larger of the tangents next to the classes on both sides. All are less
    the tangent in the middle, as nnU-Net adds logits up in half precision.

    Args:
        network: nnU-Net's PlainConvUNet, without norms.
        classes: numbers of the classes, one after the other.
        mean: of the normalisation.
        std: of the normalisation.
        certainty: factor of the logits.
    """
    for parameter in network.parameters():
        parameter.zero_()
    first, last = network.encoder.stages[0][0].convs, network.decoder.stages[-1].convs
    for convolution in (*first, *last):
        convolution.conv.weight[0, 0, 1, 1, 1] = 1
    first[0].conv.bias[0] = POSITIVE
    features = len(first[0].conv.bias)
    last[0].conv.weight[0, 0, 1, 1, 1] = 0
    last[0].conv.weight[0, features, 1, 1, 1] = 1  # what skips comes behind what is decoded
    slope, offset = std / STEP, (mean - DARKEST - POSITIVE * std) / STEP  # u = slope * carried + offset
    below, above = classes[0] - 1, classes[-1] + 1
    # A second channel is what u is above the middle of the classes, from where on the upper tangent is larger.
    last[1].conv.weight[1, 0, 1, 1, 1], last[1].conv.bias[1] = slope, offset - (below + above) / 2
    to_logits, middle = network.decoder.seg_layers[-1], (classes[0] + classes[-1]) / 2
    for channel, number in enumerate([below, *classes]):
        to_logits.weight[channel, 0] = certainty * (number - middle) * slope
        to_logits.bias[channel] = certainty * ((number - middle) * offset - (number**2 - middle**2) / 2)
    if above < NUM_CLASSES:
        to_logits.weight[0, 1] = certainty * (above - below)


def measured(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Seconds, memory and Dice of the ways to predict."""
    images, references = folder / "images", []
    images.mkdir()
    for case in range(args.cases):
        image, labels = organs(list(TEST_SHAPE), NUM_CLASSES, FIRST_TEST + case)
        write(image, images / f"case_{case:03d}_0000.nii.gz", SPACING)
        references.append(labels)
    models = [args.models / name for name in ("coarse", *(f"fine_{number}" for number in range(NUM_FINE)))]
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
    converted = next((commands for way, commands in ways.items() if "openvino" in way), [])
    for command in converted:  # what OpenVINO converts is in its cache from then on
        timed(f"{command} -o {folder / 'converted'}")
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
