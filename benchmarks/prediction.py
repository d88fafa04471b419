"""From file to file: `nmsw_predict` against `nnUNetv2_predict` on one model, the sliding window of its local branch.

    python benchmarks/prediction.py -m MODEL_FOLDER -i imagesTs -k 5% 10% -device cpu -rounds 2 -o prediction.json

Each measurement is the installed command, with the seconds that Python takes to start; commands take turns. Memory is
that of the largest of its processes. `--magnify 4` predicts copies of the images with four times as many voxels along
each axis and the same voxel size, for large volumes. `--others` takes the other ways to save time in, on the same local
branch: windows that do not overlap, resampling of the logits with PyTorch, MONAI's sliding window, the network by
OpenVINO in either of them and, of mirrored predictions, those without. What OpenVINO converts is in its cache before
anything is measured, if a prediction was made with the model once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import SimpleITK as sitk
import torch
from measuring import write_results

STOCK = "nnUNetv2_predict"
OF_NNUNET = "nnUNetv2_predict_from_modelfolder"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", type=Path, required=True, help="folder of an NMSW model")
    parser.add_argument("-i", type=Path, required=True, help="folder of images")
    parser.add_argument("-f", default="0", help="fold")
    parser.add_argument("-k", nargs="+", default=["5%", "10%"])
    parser.add_argument("-cases", type=int, default=1, help="images to predict, the first ones")
    parser.add_argument("--magnify", type=float, default=1.0)
    parser.add_argument("--disable_tta", action="store_true")
    parser.add_argument("--others", action="store_true", help="measure the other ways to save time, too")
    parser.add_argument("--int8", action="store_true", help="of a model that nmsw_quantize has prepared, int8, too")
    parser.add_argument(
        "--stock_openvino", action="store_true", help="nnU-Net's window with OpenVINO, without the others"
    )
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-rounds", type=int, default=2)
    parser.add_argument("-o", type=Path, help="JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        shape = copy_images(args.i, images, args.cases, args.magnify)
        commands = commands_of(args, images, Path(folder))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                runs[name].append(timed(f"{command} -o {tempfile.mkdtemp(dir=folder)}"))
                print(name, runs[name][-1], flush=True)
    rows = {name: {key: statistics.median(run[key] for run in of) for key in of[0]} for name, of in runs.items()}
    stock = rows[STOCK]
    for name, row in rows.items():
        row["times_faster"] = stock["seconds"] / row["seconds"]
        row["share_of_memory"] = row["gib"] / stock["gib"]
        print(name, {key: round(value, 2) for key, value in row.items()})
    if args.o:
        write_results(args.o, {"voxels": shape, "rows": rows, "runs": runs}, torch.device(args.device))


def commands_of(args: argparse.Namespace, images: Path, folder: Path) -> dict[str, str]:
    """Commands by name, all but their output."""
    common = f"-f {args.f} -i {images} -device {args.device} --disable_progress_bar"
    model, mirrored = f" -m {shlex.quote(str(args.m))}", "" if args.disable_tta else " --disable_tta"
    common += " --disable_tta" if args.disable_tta else ""
    commands = {STOCK: f"{OF_NNUNET} {common}{model}"}
    script = f"{sys.executable} {Path(__file__).with_name('stock_predict.py')} {common}{model}"
    if args.device == "cpu" and (args.others or args.stock_openvino):
        commands["nnUNetv2_predict with OpenVINO"] = f"{script} --openvino"
    if args.others:
        commands["nnUNetv2_predict -step_size 1"] = f"{OF_NNUNET} {common}{model} -step_size 1"
        if mirrored:
            commands["nnUNetv2_predict --disable_tta"] = f"{OF_NNUNET} {common}{model} --disable_tta"
        with_torch = model_that_resamples_with_torch(args.m, folder / "model")
        commands["nnUNetv2_predict, resample_torch_fornnunet"] = f"{OF_NNUNET} {common} -m {with_torch}"
        commands["MONAI's SlidingWindowInferer"] = f"{script} --monai"
        if args.device == "cpu":
            commands["MONAI's SlidingWindowInferer with OpenVINO"] = f"{script} --monai --openvino"
    ways = [""]
    if args.device == "cpu":
        ways = ["pytorch", "openvino", "openvino --precision bfloat16"]
        ways += ["openvino --precision int8"] if args.int8 else []
        ways = [f" --backend {way}" for way in ways]
    flags = [f"-k {k}{way}" for k in args.k for way in ways]
    return commands | {f"nmsw_predict {flag}": f"nmsw_predict {common}{model} {flag}" for flag in flags}


def model_that_resamples_with_torch(model: Path, copy: Path) -> Path:
    """A copy of a model whose logits nnU-Net resamples with PyTorch, as plans of its `torchres` planners say."""
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("validation*"))
    plans = json.loads((copy / "plans.json").read_text())
    for configuration in plans["configurations"].values():
        if "resampling_fn_probabilities" in configuration:
            configuration["resampling_fn_probabilities"] = "resample_torch_fornnunet"
            keywords = {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False}
            configuration["resampling_fn_probabilities_kwargs"] = keywords
    (copy / "plans.json").write_text(json.dumps(plans))
    return copy


def copy_images(source: Path, target: Path, number: int, factor: float) -> list[int]:
    """Copy the first images, with more voxels. Returns the shape of the last, x, y, z."""
    target.mkdir()
    for file in sorted(source.glob("*_0000*"))[:number]:
        image = sitk.ReadImage(str(file))
        if factor != 1:
            size = [round(n * factor) for n in image.GetSize()]
            scaled = sitk.Resample(
                image,
                size,
                sitk.Transform(),
                sitk.sitkLinear,
                image.GetOrigin(),
                [s / factor for s in image.GetSpacing()],
                image.GetDirection(),
            )
            scaled.SetSpacing(image.GetSpacing())
            image = scaled
        sitk.WriteImage(image, str(target / file.name))
    return list(image.GetSize())


def timed(command: str) -> dict[str, float]:
    """Seconds of a command, and the most memory of one of its processes in GiB."""
    script = (
        "import resource, subprocess, sys, time, json\n"
        "started = time.perf_counter()\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "seconds = time.perf_counter() - started\n"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20\n"
        "print(json.dumps({'seconds': seconds, 'gib': peak}))\n"
    )
    output = subprocess.run([sys.executable, "-c", script, *shlex.split(command)], check=True, stdout=subprocess.PIPE)
    measured: dict[str, float] = json.loads(output.stdout)
    return measured


if __name__ == "__main__":
    main()
