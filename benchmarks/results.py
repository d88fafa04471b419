"""Predict a fold's validation cases with the sliding window and with NMSW at several K, and print a table.

    python benchmarks/results.py -d 4 -f 0 -p nnUNetPlans_small -tr nnUNetTrainerNMSW_10epochs \
        -tr_baseline nnUNetTrainer_10epochs -device cpu --bfloat16 -o results/hippocampus

Every row is one run of the real command (`nnUNetv2_predict` or `nmsw_predict`) on the raw images, the Dice is
nnU-Net's own, in per cent, the mean over the cases. Nothing is timed: runs are not interleaved. Writes `table.md` and,
with machine and commands, `results.json` into the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder_simple, load_summary_json
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

CONFIGURATION = "3d_fullres"


def main() -> None:
    """Command line."""
    args = _parser().parse_args()
    dataset = maybe_convert_to_dataset_name(args.d)
    raw, preprocessed = (Path(os.environ[name]) / dataset for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    dataset_json = json.loads((raw / "dataset.json").read_text())
    ending, labels = dataset_json["file_ending"], dataset_json["labels"]
    cases = json.loads((preprocessed / "splits_final.json").read_text())[args.f]["val"]
    images, references = args.o / "images", args.o / "references"
    for folder, pattern, source in ((images, "{}_*", raw / "imagesTr"), (references, "{}", raw / "labelsTr")):
        folder.mkdir(parents=True, exist_ok=True)
        for case in cases:
            for file in source.glob(pattern.format(case) + ending):
                if not (folder / file.name).exists():
                    (folder / file.name).symlink_to(file.resolve())

    common = f"-d {args.d} -c {CONFIGURATION} -p {args.p} -f {args.f} -device {args.device} --disable_progress_bar"
    common += "" if args.tta else " --disable_tta"
    rows = []
    if args.tr_baseline is not None:
        rows.append((f"sliding window, {args.tr_baseline}", f"nnUNetv2_predict {common} -tr {args.tr_baseline}"))
    rows.append((f"sliding window, local branch of {args.tr}", f"nnUNetv2_predict {common} -tr {args.tr}"))
    rows += [(f"NMSW, K = {k}", f"nmsw_predict {common} -tr {args.tr} -k {k} --save_patches") for k in args.k]

    results = []
    for number, (name, command) in enumerate(rows):
        output = args.o / f"prediction_{number}"
        run(f"{command} -i {images} -o {output}", args.bfloat16, args.o / f"prediction_{number}.log")
        summary = output / "summary.json"
        foreground = [label for label in labels.values() if label]
        compute_metrics_on_folder_simple(str(references), str(output), foreground, str(summary), 2)
        dice = {label: load_summary_json(str(summary))["mean"][label]["Dice"] for label in foreground}
        windows = [json.loads(file.read_text()) for file in (output / "patches").glob("*.json")]
        patches = float(np.mean([w["patches_per_model"][0] for w in windows])) if windows else None
        results.append({"name": name, "command": command, "dice": dice, "patches": patches})
        print(results[-1], flush=True)
    total = [w["windows_to_choose_from"] for w in windows]
    table = markdown(results, {value: name for name, value in labels.items()}, float(np.mean(total)))
    (args.o / "table.md").write_text(table)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "cases": len(cases),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("nnunet-nmsw", "nnunetv2", "torch")},
        "results": results,
    }
    (args.o / "results.json").write_text(json.dumps(record, indent=1))
    print(table)


def run(command: str, bfloat16: bool, log: Path) -> None:
    """Run a console command, its output into a log."""
    prefix = [sys.executable, str(Path(__file__).with_name("bfloat16.py"))] if bfloat16 else []
    with log.open("w") as file:
        subprocess.run([*prefix, *shlex.split(command)], stdout=file, stderr=subprocess.STDOUT, check=True)


def markdown(results: list[dict], labels: dict[int, str], windows: float) -> str:
    """The table."""
    classes = list(results[0]["dice"])
    lines = [
        "| method | " + " | ".join(labels[c] for c in classes) + " | mean Dice | patches a case |",
        "|---" * (len(classes) + 3) + "|",
    ]
    for row in results:
        dice = [row["dice"][c] for c in classes]
        patches = row["patches"] or windows
        cells = [f"{100 * value:.1f}" for value in [*dice, np.mean(dice)]] + [f"{patches:.1f}"]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset name or id")
    parser.add_argument("-f", type=int, default=0, help="fold")
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-tr", default="nnUNetTrainerNMSW")
    parser.add_argument("-tr_baseline", help="a stock trainer to compare with")
    parser.add_argument("-k", nargs="+", default=["5%", "10%", "20%", "all"])
    parser.add_argument("-device", default="cuda")
    parser.add_argument("--tta", action="store_true", help="mirror, as nnU-Net does by default")
    parser.add_argument("--bfloat16", action="store_true", help="run the commands through bfloat16.py (CPU)")
    parser.add_argument("-o", type=Path, required=True, help="output folder")
    return parser


if __name__ == "__main__":
    main()
