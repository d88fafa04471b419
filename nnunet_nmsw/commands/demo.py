"""The command `nmsw_demo`: nnU-Net and NMSW on a generated phantom, ending in the report of `nmsw_compare`.

Every step is the console command that a user would type, shown before it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from nnunetv2.utilities.crossval_split import generate_crossval_split
from tqdm import tqdm

from nnunet_nmsw import demo
from nnunet_nmsw._register import VARIABLE, register
from nnunet_nmsw.commands.compare import NEEDED
from nnunet_nmsw.commands.demo_flags import MARK, read_flags
from nnunet_nmsw.commands.shared_flags import installed_here, require_extra
from nnunet_nmsw.console import kill_children_of
from nnunet_nmsw.demo.phantom import write_dataset
from nnunet_nmsw.demo.small_plans import PLANS_NAME, write_small_plans
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import write_json

DATASET_ID, DATASET = 999, "Dataset999_NMSWPhantom"
GLOBAL_WIDTH = 1.0
"""The default of 0.5 would leave the global branch of this small network four features, and it learned nothing."""
TRAINERS = Path(demo.__file__).parent / "trainers"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Console commands that run side by side.

    Attributes:
        commands: with their arguments.
        seconds: about what they take on two cores with the default flags, for the time that is left.
    """

    commands: list[str]
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demonstration."""
    start = time.perf_counter()
    args = read_flags(arguments)
    require_extra("nmsw_demo", "compare", NEEDED)
    if (args.o / MARK).is_file():
        shutil.rmtree(args.o)  # as --overwrite asks for
    args.o.mkdir(parents=True, exist_ok=True)
    write_json(args.o / MARK, {"command": sys.argv})
    folders = {name: args.o.resolve() / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in folders.values():
        folder.mkdir()
    os.environ.update({name: str(folder) for name, folder in folders.items()})
    register(str(TRAINERS))
    print("These variables are set for the commands below:")
    for name in (*folders, VARIABLE):
        print(f"export {name}={shlex.quote(os.environ[name])}")
    os.environ.setdefault("nnUNet_n_proc_DA", "1")
    os.environ.setdefault("nnUNet_def_n_proc", "2")

    raw, predictions, report = folders["nnUNet_raw"] / DATASET, args.o / "predictions", args.o / "report"
    if args.tr_baseline == "none":
        print("No stock nnU-Net is trained: the report compares with the sliding window of NMSW's own local branch.")
    if args.quick:
        print("One epoch shows how it works, and not how well: nmsw_demo without --quick trains longer.")
    print(f"Simulating {args.training_cases} training and {args.test_cases} test cases in {raw}", flush=True)
    write_dataset(raw, args.training_cases, args.test_cases, args.size)
    planning, *others = stages(args, raw / "imagesTs", predictions, report)
    progress = Progress(args.o, [planning, *others])
    with progress.bar:
        progress.run(planning)
        network = ([args.patch_size] * 3, args.features)
        write_small_plans(DATASET_ID, *network, PLANS_NAME, {"global_width": GLOBAL_WIDTH}, args.batch_size)
        # The first training of a dataset writes its splits. Here two begin at once.
        cases = sorted(file.name.removesuffix(".nii.gz") for file in (raw / "labelsTr").iterdir())
        write_json(folders["nnUNet_preprocessed"] / DATASET / "splits_final.json", generate_crossval_split(cases))
        for stage in others:
            progress.run(stage)
    print("", *json.loads((report / "results.json").read_text())["answer"], sep="\n")
    print(f"\nLook at the report in a browser: {report.resolve() / 'index.html'}")
    print(f"Predictions of the test cases: {predictions.resolve()}")
    print(f"{time.perf_counter() - start:.0f} seconds in all.")


def stages(args: argparse.Namespace, images: Path, predictions: Path, report: Path) -> list[Stage]:
    """What is run after the phantom is written.

    Args:
        args: the flags.
        images: folder of the test cases' images.
        predictions: folder of their predictions.
        report: folder of the report.
    """
    settings = f"-device {args.device} --disable_tta --disable_progress_bar"
    trainers = [args.tr] if args.tr_baseline == "none" else [args.tr, args.tr_baseline]
    train = f"nnUNetv2_train {DATASET_ID} 3d_fullres 0 -p {PLANS_NAME} -device {args.device} -tr"
    predict = f"nmsw_predict -i {quote(images)} -o {quote(predictions)} {settings} -npp 2 -nps 2"
    compare = (
        f"nmsw_compare -d {DATASET_ID} -f 0 -p {PLANS_NAME} -tr {args.tr} -tr_baseline {args.tr_baseline} "
        f"-o {quote(report)} -k {' '.join(args.k)} -timed_cases 1 -rounds 1 -nps 1 {settings}"
    )
    return [
        Stage([f"nnUNetv2_plan_and_preprocess -d {DATASET_ID} -c 3d_fullres -npfp 2 -np 2"], 25 if args.quick else 35),
        Stage([f"{train} {trainer}" for trainer in trainers], 50 if args.quick else 300),
        Stage([predict], 10),
        Stage([compare], 45 if args.quick else 110),
    ]


def quote(path: Path) -> str:
    """A path in a command, whatever characters it has."""
    return shlex.quote(str(path))


class Running(NamedTuple):
    """A command that was started.

    Attributes:
        command: with its arguments.
        log: file of its output.
        process: of the command.
    """

    command: str
    log: Path
    process: subprocess.Popen

    def is_done(self) -> bool:
        """Whether it has ended.

        Raises:
            UserError: it failed; the message ends in what it printed last.
        """
        code = self.process.poll()
        if code:
            last = "\n".join(self.printed().splitlines()[-15:])
            raise UserError(f"{self.command.split()[0]} failed, its log is {self.log}:\n{last}")
        return code is not None

    def share_done(self) -> float:
        """Of a training, by its epochs, whose number the name of the trainer says; 0 of all else."""
        epochs = re.search(r"^nnUNetv2_train .*_(\d+)epochs?", self.command)
        # nnU-Net predicts the validation cases after the last epoch: that counts as one epoch more.
        return min(1.0, self.printed().count("Epoch time:") / (int(epochs[1]) + 1)) if epochs else 0.0

    def printed(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")


def sharing_cores(number: int) -> dict[str, str]:
    """The environment of commands that run at the same time.

    Each has its share of the cores, and threads that wait do not spin: two trainings with two threads each on two cores
    took three times as long. What the user has set stays.
    """
    threads = str(max(1, (os.cpu_count() or 1) // number))
    shared = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"} if number > 1 else {}
    return {**shared, **os.environ}


class Progress:
    """Runs console commands, their output in a log each, and shows how much time is left.

    Args:
        folder: of the logs.
        stages: that will be run.

    Attributes:
        bar: of all stages, for terminals.
    """

    def __init__(self, folder: Path, stages: Sequence[Stage]) -> None:
        self.folder = folder
        self.number = 0
        layout = "{percentage:3.0f}% after {elapsed}, about {remaining} left, {desc}"
        total = sum(stage.seconds for stage in stages)
        self.bar = tqdm(total=total, bar_format=layout, smoothing=0, leave=False, disable=None)
        self.finished = 0.0
        self.start = time.perf_counter()

    def run(self, stage: Stage) -> None:
        """Run the commands of a stage, from this environment.

        Raises:
            UserError: one failed. The others are ended.
        """
        with ExitStack() as stack:
            variables = sharing_cores(len(stage.commands))
            running = [stack.enter_context(self.started(command, variables)) for command in stage.commands]
            while False in {of.is_done() for of in running}:
                self.show(self.finished + min(of.share_done() for of in running) * stage.seconds)
                time.sleep(0.5)
        self.finished += stage.seconds
        self.show(self.finished)

    @contextmanager
    def started(self, command: str, variables: dict[str, str]) -> Iterator[Running]:
        """Start a command with environment variables. It is killed where its stage ends early."""
        name, *arguments = shlex.split(command)
        self.bar.set_description(name)
        self.bar.write(f"[{time.perf_counter() - self.start:4.0f} s] {command}", file=sys.stdout)
        sys.stdout.flush()
        self.number += 1
        log = self.folder / f"{self.number}_{name}.log"
        words = installed_here([name, *arguments])
        with (
            log.open("w") as file,
            subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=variables) as process,
        ):
            try:
                yield Running(command, log, process)
            except BaseException:
                kill_children_of(process.pid)
                process.kill()
                raise

    def show(self, seconds: float) -> None:
        """Put the bar where so many of the expected seconds are done."""
        self.bar.n = seconds
        self.bar.refresh()


if __name__ == "__main__":
    main()
