"""The command `nmsw_demo`: nnU-Net and NMSW on a generated phantom, ending in the report of `nmsw_compare`.

Every step is the console command that a user would type, shown before it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nnunet_nmsw.commands.compare import NEEDED
from nnunet_nmsw.commands.shared_flags import require_extra
from nnunet_nmsw.demo.phantom import write_dataset
from nnunet_nmsw.demo.small_plans import PLANS_NAME, write_small_plans
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import write_json

DATASET_ID, DATASET = 999, "Dataset999_NMSWPhantom"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demonstration."""
    args = parser().parse_args(arguments)
    require_extra("nmsw_demo", "compare", NEEDED)
    if args.o.exists() and any(args.o.iterdir()):
        if not (args.o / "nmsw_demo.json").is_file():
            raise UserError(f"{args.o} holds something else: give an empty or new folder with -o")
        shutil.rmtree(args.o)
    args.o.mkdir(parents=True, exist_ok=True)
    write_json(args.o / "nmsw_demo.json", {"command": sys.argv})
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
    training = f"{DATASET_ID} 3d_fullres 0 -p {PLANS_NAME} -device {args.device}"
    for trainer in (args.tr, args.tr_baseline):
        demo.run(f"nnUNetv2_train {training} -tr {trainer}")
    predict = f"-device {args.device} --disable_tta --disable_progress_bar -npp 2 -nps 2"
    images, predictions, report = raw / "imagesTs", args.o / "predictions", args.o / "report"
    demo.run(f"nmsw_predict -i {quote(images)} -o {quote(predictions)} {predict}")
    demo.run(
        f"nmsw_compare -d {DATASET_ID} -f 0 -p {PLANS_NAME} -tr {args.tr} -tr_baseline {args.tr_baseline} "
        f"-o {quote(report)} -k {' '.join(args.k)} -timed_cases 1 -rounds 2 -nps 1 -device {args.device} --disable_tta "
        "--disable_progress_bar"
    )
    print("", *json.loads((report / "results.json").read_text())["answer"], sep="\n")
    print(f"Report: {report / 'index.html'}")
    print(f"Predictions of the test cases: {predictions}")
    print(f"{time.perf_counter() - demo.start:.0f} seconds in all.")


def quote(path: Path) -> str:
    """A path in a command, whatever characters it has."""
    return shlex.quote(str(path))


class Demo:
    """Runs console commands one after the other, their output in a log each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        self.start = time.perf_counter()

    def run(self, command: str) -> None:
        """Run a command of this environment.

        Raises:
            UserError: it failed; the message ends in what it printed last.
        """
        print(f"[{time.perf_counter() - self.start:4.0f} s] {command}", flush=True)
        name, *arguments = shlex.split(command)
        self.number += 1
        log = self.folder / f"{self.number}_{name}.log"
        with log.open("w") as file:
            executable = shutil.which(name, path=os.path.dirname(sys.executable)) or name
            result = subprocess.run([executable, *arguments], stdout=file, stderr=subprocess.STDOUT, check=False)
        if result.returncode:
            last = "\n".join(log.read_text().splitlines()[-15:])
            raise UserError(f"{name} failed, its log is {log}:\n{last}")


def parser() -> argparse.ArgumentParser:
    """What reads the flags."""
    flags = argparse.ArgumentParser(
        prog="nmsw_demo",
        description="Train and run NMSW on a generated phantom and compare it with the sliding window. About 15 "
        "minutes on two CPU cores.",
    )
    flags.add_argument("-o", type=Path, default=Path("nmsw_demo"), help="output folder. Default: nmsw_demo")
    flags.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu", help="Default: cpu")
    flags.add_argument("-tr", default="nnUNetTrainerNMSW_10epochs", help="Default: nnUNetTrainerNMSW_10epochs")
    flags.add_argument("-tr_baseline", default="nnUNetTrainer_10epochs", help="Default: nnUNetTrainer_10epochs")
    flags.add_argument(
        "-k", nargs="+", default=["5%", "10%", "20%", "all"], help="patches a case. Default: 5%% 10%% 20%% all"
    )
    flags.add_argument("--training_cases", type=int, default=30, help="Default: 30")
    flags.add_argument("--test_cases", type=int, default=2, help="Default: 2")
    flags.add_argument("--size", type=int, default=72, help="voxels along a volume's longest axis")
    flags.add_argument("--patch_size", type=int, default=16, help="voxels along each axis of a patch")
    flags.add_argument("--features", type=int, nargs="+", default=[8, 16, 32], help="of the network's stages")
    return flags


if __name__ == "__main__":
    main()
