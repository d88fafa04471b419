"""The command `nmsw_demo`: nnU-Net and NMSW on a generated phantom, and a comparison with the sliding window.

Every step is the console command that a user would type, shown before it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder_simple, load_summary_json

from nnunet_nmsw.demo.phantom import LABELS, write_dataset
from nnunet_nmsw.demo.picture import draw_case
from nnunet_nmsw.demo.small_plans import PLANS_NAME, write_small_plans
from nnunet_nmsw.errors import UserError

DATASET_ID, DATASET = 999, "Dataset999_NMSWPhantom"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demonstration."""
    args = _parser().parse_args(arguments)
    if args.o.exists() and any(args.o.iterdir()):
        if not (args.o / "nmsw_demo.json").is_file():
            raise UserError(f"{args.o} holds something else: give an empty or new folder with -o")
        shutil.rmtree(args.o)
    args.o.mkdir(parents=True, exist_ok=True)
    (args.o / "nmsw_demo.json").write_text(json.dumps({"command": sys.argv}))
    folders = {name: args.o.resolve() / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for name, folder in folders.items():
        folder.mkdir()
        os.environ[name] = str(folder)
    os.environ.setdefault("nnUNet_n_proc_DA", "1")
    os.environ.setdefault("nnUNet_def_n_proc", "2")
    demo = Demo(args.o)

    raw = folders["nnUNet_raw"] / DATASET
    print(f"Simulating {args.training_cases} training and {args.test_cases} test cases", flush=True)
    write_dataset(raw, args.training_cases, args.test_cases, args.size)
    demo.run(f"nnUNetv2_plan_and_preprocess -d {DATASET_ID} -c 3d_fullres -np 2")
    write_small_plans(DATASET_ID, [args.patch_size] * 3, args.features, PLANS_NAME, {})
    model = f"{DATASET_ID} 3d_fullres 0 -p {PLANS_NAME} -tr {args.tr}"
    demo.run(f"nnUNetv2_train {model} -device {args.device}")

    images, references = raw / "imagesTs", raw / "labelsTs"
    rest = f"-i {images} -npp 2 -nps 2 -device {args.device} --disable_tta --disable_progress_bar"
    rows = []
    for name, command in (
        ("nmsw", f"nmsw_predict -o {args.o / 'nmsw'} -k {args.k} --save_patches {rest}"),
        (
            "sliding_window",
            f"nnUNetv2_predict -o {args.o / 'sliding_window'} -d {DATASET_ID} -c 3d_fullres -f 0 "
            f"-p {PLANS_NAME} -tr {args.tr} {rest}",
        ),
    ):
        seconds = demo.run(command)
        rows.append((name, seconds, dice_by_class(references, args.o / name)))
    windows = [json.loads(file.read_text()) for file in sorted((args.o / "nmsw" / "patches").glob("*.json"))]
    patches = {
        "nmsw": float(np.mean([sum(case["patches_per_model"]) for case in windows])),
        "sliding_window": float(np.mean([case["windows_to_choose_from"] for case in windows])),
    }
    table = markdown_table(rows, patches)
    (args.o / "table.md").write_text(table)
    draw_case(
        windows[0]["case"], images, references, args.o / "nmsw", args.o / "sliding_window", args.o / "windows.png"
    )
    print(f"\n{table}\nThe chosen windows over a case: {args.o / 'windows.png'}")
    print(f"Table: {args.o / 'table.md'}; {time.perf_counter() - demo.start:.0f} seconds in all.")


class Demo:
    """Runs console commands one after the other, their output in a log each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start = time.perf_counter()

    def run(self, command: str) -> float:
        """Run a command of this environment.

        Returns:
            Seconds it took.

        Raises:
            UserError: it failed; the message ends in what it printed last.
        """
        print(f"[{time.perf_counter() - self.start:4.0f} s] {command}", flush=True)
        name, *arguments = command.split()
        log = self.folder / f"{name}.log"
        start = time.perf_counter()
        with log.open("w") as file:
            executable = shutil.which(name, path=os.path.dirname(sys.executable)) or name
            result = subprocess.run([executable, *arguments], stdout=file, stderr=subprocess.STDOUT, check=False)
        if result.returncode:
            last = "\n".join(log.read_text().splitlines()[-15:])
            raise UserError(f"{name} failed, its log is {log}:\n{last}")
        return time.perf_counter() - start


def dice_by_class(references: Path, predictions: Path) -> dict[str, float]:
    """Mean Dice over the cases by class name, nnU-Net's own, written into `summary.json` beside the predictions."""
    summary = str(predictions / "summary.json")
    foreground = [value for value in LABELS.values() if value]
    compute_metrics_on_folder_simple(str(references), str(predictions), foreground, summary, 2)
    mean = load_summary_json(summary)["mean"]
    return {name: mean[value]["Dice"] for name, value in LABELS.items() if value}


def markdown_table(rows: list[tuple[str, float, dict[str, float]]], patches: dict[str, float]) -> str:
    """The comparison as a Markdown table."""
    names = {"nmsw": "NMSW", "sliding_window": "sliding window"}
    classes = list(rows[0][2])
    lines = [
        "| "
        + " | ".join(["method (same model)".ljust(20), *(f"Dice {c}" for c in classes), "patches a case", "seconds"])
        + " |",
        "|---" * (len(classes) + 3) + "|",
    ]
    for name, seconds, dice in rows:
        cells = [f"{dice[c]:.3f}".rjust(len(f"Dice {c}")) for c in classes]
        cells += [f"{patches[name]:.0f}".rjust(14), f"{seconds:.0f}".rjust(7)]
        lines.append(f"| {names[name].ljust(20)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train and run NMSW on a generated phantom and compare it with the sliding window of the same "
        "model. Under ten minutes on two CPU cores.",
    )
    parser.add_argument("-o", type=Path, default=Path("nmsw_demo"), help="output folder. Default: nmsw_demo")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu", help="Default: cpu")
    parser.add_argument("-tr", default="nnUNetTrainerNMSW_10epochs", help="Default: nnUNetTrainerNMSW_10epochs")
    parser.add_argument("-k", default="10%", help="patches a case. Default: 10%%")
    parser.add_argument("--training_cases", type=int, default=20)
    parser.add_argument("--test_cases", type=int, default=4)
    parser.add_argument("--size", type=int, default=72, help="voxels along a volume's longest axis")
    parser.add_argument("--patch_size", type=int, default=16, help="voxels along each axis of a patch")
    parser.add_argument("--features", type=int, nargs="+", default=[8, 16, 32], help="of the network's stages")
    return parser


if __name__ == "__main__":
    main()
