"""One training of an experiment: any trainer for any number of epochs, with a seed, and without nnU-Net's validation.

A training that was interrupted goes on after its last whole epoch. On a processor with bfloat16 it runs in bfloat16, as
in `benchmarks/bfloat16.py`; one that emulates bfloat16 is ten times slower with it. NMSW models are calibrated for the
number of patches "auto", as their validation would. `study.py` and `ablation_run.py` call this.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_nmsw.files import write_json
from nnunet_nmsw.inference.device import lacks_bfloat16
from nnunet_nmsw.selection.calibration import FILE, calibration_of
from nnunet_nmsw.trainers.cases import read_cases
from nnunet_nmsw.trainers.nnUNetTrainerNMSW import nnUNetTrainerNMSW
from nnunet_nmsw.trainers.randomness import seed_everything
from nnunet_nmsw.trainers.validation import calibrate
from nnunet_nmsw.trainers.variants import NoMirroring


def flags_of_training() -> argparse.ArgumentParser:
    """Flags that say what is trained."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-d", required=True, help="dataset")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("-p", required=True, help="plans")
    parser.add_argument("-tr", required=True, help="trainer")
    parser.add_argument("-f", type=int, default=0, help="fold")
    parser.add_argument("-steps", type=int, default=250, help="of an epoch")
    parser.add_argument("-epochs", type=int, required=True)
    parser.add_argument("-seed", type=int, required=True)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("--no_mirroring", action="store_true", help="do not augment by mirroring")
    return parser


def values_of_flags(args: argparse.Namespace, trainer: str, plans: str, fold: int, seed: int) -> list[str]:
    """Such flags as a list of arguments, but for the dataset's.

    Args:
        args: of `study.py` or `ablation.py`, which have the length and the device.
        trainer: name of the trainer.
        plans: name of the plans.
        fold: to train.
        seed: of the training.
    """
    flags = {"-p": plans, "-tr": trainer, "-f": fold, "-seed": seed}
    flags |= {"-epochs": args.epochs, "-steps": args.steps, "-device": args.device}
    return [str(part) for flag in flags.items() for part in flag]


def environment_of(results: Path, jobs: int) -> dict[str, str]:
    """Variables for trainings that share the processor's cores.

    Args:
        results: nnU-Net's folder of models.
        jobs: trainings at the same time.
    """
    return {
        **os.environ,
        "nnUNet_results": str(results.resolve()),
        "nnUNet_extTrainer": str(Path(__file__).resolve().parent),  # the trainers of arms.py
        "nnUNet_n_proc_DA": os.environ.get("nnUNet_n_proc_DA", "0"),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[flags_of_training()]
    )
    # nnU-Net's flag, which our trainers read by themselves.
    parser.add_argument("-pretrained_weights", help="checkpoint to start from")
    args = parser.parse_args()
    with precision_of(args.device):
        trainer = trained(args)
        if isinstance(trainer, nnUNetTrainerNMSW):
            write_own_calibration(trainer)


@contextmanager
def precision_of(device: str) -> Iterator[None]:
    """bfloat16 on a CPU that has it."""
    # The cache of cast weights lives until autocast ends, which here is after the last optimiser step.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if in_bfloat16(device) else nullcontext():
        yield


def in_bfloat16(device: str) -> bool:
    """Whether trainings on a device run in bfloat16. On a GPU they have nnU-Net's mixed precision instead."""
    return device == "cpu" and not lacks_bfloat16()


def trained(args: argparse.Namespace, only_load: bool = False) -> nnUNetTrainer:
    """The trainer of a training that is done now, unless it was before.

    Args:
        args: see `flags_of_training`.
        only_load: what was trained.
    """
    device = torch.device(args.device)
    trainer = get_trainer_from_args(args.d, args.c, args.f, args.tr, args.p, device=device)
    if args.no_mirroring:
        # By the mixin of our variants, whatever the trainer; checkpoints keep the trainer's own name.
        kind = type(trainer)
        trainer.__class__ = type(kind.__name__, (NoMirroring, kind), {})
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.save_every = args.epochs, args.steps, 1
    seed_everything(args.seed)
    trainer.initialize()
    if device.type == "cpu":
        keep_gradients_finite(trainer.network)
    latest, final = (Path(trainer.output_folder, f"checkpoint_{name}.pth") for name in ("latest", "final"))
    if only_load or final.is_file():
        trainer.load_checkpoint(str(final))
        return trainer
    if latest.is_file():
        trainer.load_checkpoint(str(latest))
        seed_everything(args.seed, trainer.current_epoch)
    trainer.run_training()
    return trainer


def keep_gradients_finite(network: torch.nn.Module) -> None:
    """Replace what is not finite in the gradients by 0.

    oneDNN's bfloat16 weight gradient of some small convolutions reads memory that nobody wrote (seen with 24 features
    on 2×7×7 voxels): usually noise of 0.1%, now and then NaN. In float32 it does not happen.
    """
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_hook(partial(torch.nan_to_num, nan=0.0, posinf=0.0, neginf=0.0))


def write_own_calibration(trainer: nnUNetTrainerNMSW) -> None:
    """Calibrate the number of patches "auto" on the validation cases of the fold."""
    folder = Path(trainer.output_folder, "validation")
    folder.mkdir(exist_ok=True)
    network = trainer.nmsw_network.eval()
    if (folder / FILE).is_file() or not network.sampler.measures_benefit:
        return
    trainer.set_deep_supervision_enabled(False)
    _, dataset = trainer.get_tr_and_val_datasets()
    cases = read_cases(dataset, dataset.identifiers, trainer.encoding)
    write_json(folder / FILE, calibration_of([calibrate(network, cases, trainer.encoding, trainer.device)]))


if __name__ == "__main__":
    main()
