"""Trainings of experiments/study.py at nnU-Net's full width, as many as fit into some minutes of a GPU.

    python benchmarks/gpu_study.py --pack btcv_3mm        # where the raw BTCV is: a copy at 3 mm, of some 20 MB
    python benchmarks/gpu_study.py --data btcv_3mm --minutes 9 --out study -jobs 3     # on the GPU

The dataset is planned and preprocessed first. Then stock, NMSW and NMSW with context are trained side by side: these
networks leave a GPU idle alone. Models, logs and results are in the output folder, in the form of `study.py`. With the
folder of an earlier call, trainings go on after their last whole epoch. What else is given is passed on to `study.py`.
`-d 4 -device cpu -epochs 1 -steps 5` tries the script on a CPU, on the Hippocampus of nnUNet_raw.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import SimpleITK as sitk

ROOT = Path(__file__).resolve().parent.parent
DATASET, FULL_WIDTH = "Dataset731_BTCV", "7313"
SPACING = 3.0
"""mm, along each axis."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, help="write a copy of the raw dataset at 3 mm into this folder, and end")
    parser.add_argument("--data", type=Path, help="such a copy")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, help="folder of models and results")
    parser.add_argument("-d", default=FULL_WIDTH, help="of study.py")
    parser.add_argument("-epochs", default="25")
    parser.add_argument("-jobs", default="3")
    parser.add_argument("-device", default="cuda")
    args, further = parser.parse_known_args()
    if args.pack:
        pack(Path(os.environ["nnUNet_raw"], DATASET), args.pack / DATASET)
        return
    if args.out is None:
        parser.error("give --out")
    end = time.monotonic() + 60 * args.minutes
    work = Path(tempfile.gettempdir(), "nmsw_gpu_study")
    folders = {f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")}
    environment = {**os.environ, **folders, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if args.d != FULL_WIDTH:
        environment = {**environment, **{name: os.environ[name] for name in folders}}
    elif not (work / "ready").is_file():
        prepare(args.data, work, environment)
    command = [sys.executable, str(ROOT / "experiments" / "study.py"), "-d", args.d, "-folds", "0"]
    command += ["-arms", "stock", "nmsw", "context", "-epochs", args.epochs, "-jobs", args.jobs]
    command += ["-device", args.device, "-o", str(args.out), "--minutes", str((end - time.monotonic()) / 60), *further]
    print(shlex.join(command), flush=True)
    subprocess.run(command, env=environment, check=True)


def pack(raw: Path, folder: Path) -> None:
    """Write a raw dataset at 3 mm, images as 8 bit, which BTCV is made of here."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in sorted((raw / name).glob("*.nii.gz")):
            image = sitk.ReadImage(str(file))
            size = [max(1, round(n * s / SPACING)) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
            resampler = sitk.ResampleImageFilter()
            resampler.SetReferenceImage(image)
            resampler.SetSize(size)
            resampler.SetOutputSpacing([SPACING] * 3)
            resampler.SetInterpolator(sitk.sitkNearestNeighbor if name == "labelsTr" else sitk.sitkLinear)
            sitk.WriteImage(sitk.Cast(resampler.Execute(image), sitk.sitkUInt8), str(folder / name / file.name), True)
    shutil.copy(raw / "dataset.json", folder)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*')) / 1e6:.0f} MB")


def prepare(data: Path, work: Path, environment: dict[str, str]) -> None:
    """Plan and preprocess the dataset at 3 mm."""
    shutil.copytree(data / DATASET, work / "raw" / DATASET, dirs_exist_ok=True)
    processes, number = str(min(16, os.cpu_count() or 1)), DATASET[7:10]
    for entry, flags in (
        ("extract_fingerprint_entry", ["-np", processes]),
        (
            "plan_experiment_entry",
            ["-overwrite_target_spacing", *[str(SPACING)] * 3, "-overwrite_plans_name", "nnUNetPlans3mm"],
        ),
        ("preprocess_entry", ["-plans_name", "nnUNetPlans3mm", "-c", "3d_fullres", "-np", processes]),
    ):
        # As functions: on a machine without the installed commands there is only the package.
        code = f"from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints as e\ne.{entry}()"
        subprocess.run([sys.executable, "-c", code, "-d", number, *flags], env=environment, check=True)
    (work / "ready").touch()


if __name__ == "__main__":
    main()
