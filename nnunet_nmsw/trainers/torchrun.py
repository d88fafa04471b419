"""What `nnUNetv2_train` does, in processes that torchrun starts: one GPU each, on one machine or on several.

torchrun --nproc_per_node=2 -m nnunet_nmsw.trainers.torchrun 4 3d_fullres 0
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from torch import distributed as dist
from torch.backends import cudnn

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.trainers.nnUNetTrainerNMSW import nnUNetTrainerNMSW

SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and validate, from the command line.

    Raises:
        UserError: torchrun did not start this process, there is no GPU for it, or flags contradict each other.
    """
    args = _parser().parse_args(arguments)
    _check(args)
    device = _prepare_device(args.device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    trainer = get_trainer_from_args(
        args.dataset_name_or_id, args.configuration, _fold(args.fold), args.tr, args.p, args.c, device=device
    )
    if not isinstance(trainer, nnUNetTrainerNMSW):
        raise UserError(f"-tr {args.tr} is not one of nnunet_nmsw's trainers: train it with nnUNetv2_train -num_gpus")
    trainer.disable_checkpointing = args.disable_checkpointing
    if args.pretrained_weights is None:
        maybe_load_checkpoint(trainer, args.c, args.val)
    else:
        trainer.initialize()  # takes the weights from the command line, in every process
    if not args.val:
        trainer.run_training()
    if args.val_best:
        trainer.load_checkpoint(join(trainer.output_folder, "checkpoint_best.pth"))
    trainer.perform_actual_validation(args.npz)
    dist.destroy_process_group()


def _check(args: argparse.Namespace) -> None:
    missing = [name for name in SET_BY_TORCHRUN if name not in os.environ]
    if missing:
        raise UserError(
            f"{missing[0]} is not set: start this with torchrun --nproc_per_node=N -m nnunet_nmsw.trainers.torchrun "
            f"{args.dataset_name_or_id} {args.configuration} {args.fold}, or train on one GPU with nnUNetv2_train"
        )
    if args.c and args.val:
        raise UserError("--c and --val contradict each other: --c trains on and validates, --val validates alone")
    if args.val_best and args.disable_checkpointing:
        raise UserError("--val_best needs the checkpoints that --disable_checkpointing keeps from being written")
    if args.pretrained_weights is not None and (args.c or args.val):
        raise UserError("-pretrained_weights are for the start of a training: leave out --c and --val")


def _fold(name: str) -> int | str:
    if name != "all" and not name.isdigit():
        raise UserError(f'fold "{name}": give a number, or "all"')
    return name if name == "all" else int(name)


def _prepare_device(name: str) -> torch.device:
    """Choose this process's GPU, or its share of the machine's cores."""
    if name == "cpu":
        torch.set_num_threads(max(1, multiprocessing.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
        return torch.device("cpu")
    index, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if num_gpus == 0:
        raise UserError("there is no CUDA device on this machine: give -device cpu")
    if index >= num_gpus:
        raise UserError(f"this machine has {num_gpus} GPUs: give torchrun --nproc_per_node={num_gpus} or fewer")
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    cudnn.deterministic, cudnn.benchmark = False, True
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc_per_node=N -m nnunet_nmsw.trainers.torchrun",
        description="Train an NMSW model with several processes, one GPU each, on one machine or on several. "
        "The flags are those of nnUNetv2_train.",
    )
    add: Any = parser.add_argument
    add("dataset_name_or_id", help="dataset name or id")
    add("configuration", help="configuration, e.g. 3d_fullres")
    add("fold", help='fold of the cross-validation, 0 to 4, or "all"')
    add("-tr", default="nnUNetTrainerNMSW", help="trainer. Default: nnUNetTrainerNMSW")
    add("-p", default="nnUNetPlans", help="plans identifier. Default: nnUNetPlans")
    add("-pretrained_weights", help="checkpoint to start from")
    add("--npz", action="store_true", help="save the probabilities of the validation cases, for ensembles")
    add("--c", action="store_true", help="continue from the latest checkpoint")
    add("--val", action="store_true", help="only validate, after a training that is finished")
    add("--val_best", action="store_true", help="validate with checkpoint_best instead of checkpoint_final")
    add("--disable_checkpointing", action="store_true", help="write no checkpoints, for trying things out")
    add("-device", choices=("cuda", "cpu"), default="cuda", help="NCCL on cuda, Gloo on cpu. Default: cuda")
    return parser


if __name__ == "__main__":
    main()
