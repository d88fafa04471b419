"""What a GPU does with training and prediction, in a few minutes: crashes, seconds, memory, gaps between kernels.

    python benchmarks/gpu.py --minutes 9 --out gpu_results            # on one GPU
    python benchmarks/gpu.py --minutes 9 --out toy --toy -device cpu  # the same in small, to try the script

The parts, in this order, each in a process of its own with a log, and each with a JSON file that grows with every
measurement, so that an end at any time loses nothing:

- smoke: training steps (eager, compiled, distributed over one process), and labels against the CPU's;
- prediction: the paper's setting, 480 × 480 × 384 voxels, patches of 128³, nnU-Net's full width, untrained; the
  network's part by stages, against nnU-Net's sliding window;
- profile: traces of a prediction and of a step with Python's calls, and the ten largest gaps between kernels;
- files: commands from file to file, in the paper's setting;
- training: a step against stock nnU-Net's on the same plans, eager, then compiled, which takes minutes.

Without names all parts run. A part that has less than its least time left does not start, and none takes more than its
most. `--keep` leaves the preprocessed dataset for another call.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_results import PAPER, TOY, WORK, Results

from nnunet_nmsw._register import register

HERE = Path(__file__).parent

PARTS = {"smoke": (40, 150), "prediction": (60, 120), "profile": (30, 120), "files": (60, 150), "training": (120, 400)}
"""Least and most seconds by part."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="everything small")
    parser.add_argument("--keep", action="store_true", help="keep the dataset of the training for another call")
    parser.add_argument("-device", default="cuda")
    parser.add_argument("--one", metavar="PART", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        run(args.one, args)
        return
    register()  # where the package is not installed
    end = time.monotonic() + 60 * args.minutes
    for part in args.parts or PARTS:
        left = end - time.monotonic()
        least, most = PARTS[part]
        if not args.toy and left < least:
            print(f"{part}: {left:.0f} s left are too few", flush=True)
            continue
        flags = ["--one", part, "--out", str(args.out), "-device", args.device, *(["--toy"] if args.toy else [])]
        environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}:{os.environ.get('PYTHONPATH', '')}"}
        seconds = max(1.0, left if args.toy else min(left, most))
        with open(args.out / f"{part}.log", "w") as log:
            command = [sys.executable, __file__, *flags]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            try:
                print(f"{part}: exit {process.wait(seconds)}, {end - time.monotonic():.0f} s left", flush=True)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
                process.wait()
                print(f"{part}: ended after {seconds:.0f} s", flush=True)
        print("\n".join((args.out / f"{part}.log").read_text().splitlines()[-12:]), flush=True)
    if not args.keep:
        shutil.rmtree(WORK, ignore_errors=True)


def run(part: str, args: argparse.Namespace) -> None:
    """Do one part in this process."""
    import gpu_parts

    device, size = torch.device(args.device), TOY if args.toy else PAPER
    getattr(gpu_parts, part)(Results(args.out / f"{part}.json", device), device, size, args.out)


if __name__ == "__main__":
    main()
