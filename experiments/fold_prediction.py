"""Predicts the validation cases of a fold from their files by a command, and measures them as `nmsw_compare` does.

    python experiments/fold_prediction.py -d 4 -f 0 -o FOLDER -- nnUNetv2_predict -d 4 -f 0 -c 3d_fullres

`-i` and `-o` are added to the command. FOLDER gets `metrics.csv`, a row a case and class. `study.py` calls this for
what `nmsw_compare` does not compare: models of another resolution, and two stock models without training.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import pandas as pd
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_nmsw.evaluation.metrics import case_metrics, evaluated_labels
from nnunet_nmsw.evaluation.models import Case, dataset_name, find_cases

TOLERANCE = 2.0
"""Of the normalised surface Dice, mm: the default of `nmsw_compare`."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset")
    parser.add_argument("-f", type=int, required=True, help="fold")
    parser.add_argument("-o", type=Path, required=True, help="folder of the metrics")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --, without -i and -o")
    args = parser.parse_args()
    command = [part for part in args.command if part != "--"]
    cases = find_cases(dataset_name(args.d), [args.f], [])
    args.o.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.o) as folder:
        images, predictions = Path(folder, "images"), Path(folder, "predictions")
        images.mkdir()
        for case in cases:
            for file in map(Path, case.images):
                (images / file.name).symlink_to(file.resolve())
        subprocess.run([*command, "-i", str(images), "-o", str(predictions)], check=True)
        measured(cases, predictions).to_csv(args.o / "unfinished.csv", index=False)
    (args.o / "unfinished.csv").rename(args.o / "metrics.csv")


def measured(cases: list[Case], predictions: Path) -> pd.DataFrame:
    """Dice, NSD and missed objects, a row a case and class.

    Args:
        cases: of a fold.
        predictions: nnU-Net's folder of predicted files, with the model's plans.json and dataset.json.
    """
    dataset_json = json.loads((predictions / "dataset.json").read_text())
    labels = PlansManager(str(predictions / "plans.json")).get_label_manager(dataset_json)
    reader_writer = determine_reader_writer_from_dataset_json(dataset_json, cases[0].images[0])()
    evaluated = evaluated_labels(labels, dataset_json)
    names = {label_or_region_to_key(label): name for label, name in evaluated.items()}
    rows = []
    for case in cases:
        files = (case.reference, str(predictions / f"{case.name}{dataset_json['file_ending']}"))
        metrics = case_metrics(*files, reader_writer, list(evaluated), labels.ignore_label, TOLERANCE)
        rows += [
            {
                "case": case.name,
                "class": names[label],
                "Dice": of_label["Dice"],
                "NSD": of_label["NSD"],
                "objects": len(of_label["objects"]),
                "missed_objects": of_label["missed_objects"],
            }
            for label, of_label in metrics.items()
        ]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
