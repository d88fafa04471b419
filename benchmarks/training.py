"""What a training step costs against stock nnU-Net's on the same plans: time, peak memory, waiting for data.

    python benchmarks/training.py -d 902 901 -p nnUNetPlans_small -device cpu -rounds 3 -o benchmarks/training.json

Each measurement is a process of its own: it builds the trainer, takes warm-up steps, then times the rest; trainers
take turns, so that drift of the machine hits all alike. Both train the same number of local patches a step where the
plans' batch size is NMSW's number of windows, as in the plans of `nnunet_nmsw.demo.small_plans`. Needs planned and
preprocessed datasets. Nothing is written into nnU-Net's folders. Memory is that of the training
process; workers that load data are not in it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import in_new_process, synchronize, tell, write_results
from nnunetv2.run.run_training import get_trainer_from_args

from nnunet_nmsw.inference.memory import most_memory_of_process
from nnunet_nmsw.trainers.losses.benefit import benefit_map
from nnunet_nmsw.trainers.losses.fused import LowResolution, WindowPredictions, fused_loss
from nnunet_nmsw.trainers.nnUNetTrainerNMSW import nnUNetTrainerNMSW
from nnunet_nmsw.trainers.step import finest_scale
from nnunet_nmsw.volume.precision import mixed_precision

TRAINERS = ("nnUNetTrainer", "nnUNetTrainerNMSW")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", nargs="+", required=True, help="datasets")
    parser.add_argument("-p", default="nnUNetPlans_small", help="plans")
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-steps", type=int, default=30)
    parser.add_argument("-rounds", type=int, default=3)
    parser.add_argument("-o", type=Path, help="JSON file")
    parser.add_argument("--one", metavar="TRAINER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        tell(measure(args.d[0], args.p, args.one, args.device, args.steps))
        return
    rows = []
    for dataset in args.d:
        runs: dict[str, list[dict[str, float]]] = {trainer: [] for trainer in TRAINERS}
        for _ in range(args.rounds):
            for trainer in TRAINERS:
                runs[trainer].append(in_process(dataset, trainer, args))
        medians = {
            trainer: {key: statistics.median(run[key] for run in of_trainer) for key in of_trainer[0]}
            for trainer, of_trainer in runs.items()
        }
        rows.append({"dataset": dataset, "medians": medians, "runs": runs})
        stock, nmsw = (medians[trainer] for trainer in TRAINERS)
        print(
            f"{dataset}: stock {stock['step_s']:.3f} s a step, NMSW {nmsw['step_s']:.3f} s "
            f"(× {nmsw['step_s'] / stock['step_s']:.2f}); waiting for data {stock['waiting']:.0%} and "
            f"{nmsw['waiting']:.0%}; peak host memory {stock['host_gib']:.2f} and {nmsw['host_gib']:.2f} GiB; "
            f"device {stock['device_gib']:.2f} and {nmsw['device_gib']:.2f} GiB; global and fused loss, label "
            f"counts: {nmsw['loss_s'] / nmsw['step_s']:.0%} of NMSW's step",
            flush=True,
        )
    if args.o:
        write_results(args.o, {"datasets": rows}, torch.device(args.device))


def in_process(dataset: str, trainer: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure in a new process."""
    flags = ["--one", trainer, "-d", dataset, "-p", args.p, "-device", args.device, "-steps", str(args.steps)]
    with tempfile.TemporaryDirectory() as results:
        return in_new_process(__file__, *flags, nnUNet_results=results)


def measure(dataset: str, plans: str, trainer_name: str, device_name: str, steps: int) -> dict[str, Any]:
    """Seconds a step, share of it waiting for data, and peak memory in GiB."""
    device = torch.device(device_name)
    if device.type == "cuda":  # as nnU-Net's command does
        torch.backends.cudnn.benchmark = True
        torch.set_num_threads(1)
    trainer = get_trainer_from_args(dataset, "3d_fullres", 0, trainer_name, plans, device=device)
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.network.train()
    for _ in range(5):
        trainer.train_step(next(trainer.dataloader_train))
    waiting, started = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(trainer.dataloader_train)
        waiting += time.perf_counter() - asked
        trainer.train_step(batch)  # ends in the loss on the host, hence when the device is done
    seconds = time.perf_counter() - started
    host_gib = most_memory_of_process() / 2**30
    device_gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    loss_seconds = seconds_of_losses(trainer, steps) if isinstance(trainer, nnUNetTrainerNMSW) else 0.0
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):
            loader._finish()
    return {
        "step_s": seconds / steps,
        "loss_s": loss_seconds,
        "waiting": waiting / seconds,
        "host_gib": host_gib,
        "device_gib": device_gib,
    }


def seconds_of_losses(trainer: nnUNetTrainerNMSW, steps: int) -> float:
    """Seconds a step for the label counts, the losses beside the local one, and benefits, back to the logits."""
    network, seconds = trainer.nmsw_network, 0.0
    factor = trainer.settings.downsampling_factor
    for _ in range(steps):
        step = trainer.step_of(next(trainer.dataloader_train), trainer.augmentation).to(trainer.device)
        with torch.no_grad(), mixed_precision(trainer.device):
            result = trainer.network(step)
            patches_BCDHW, labels_B1DHW = step.volume.windows(result.starts_B3, network.patch_size)
            logits_BCDHW = finest_scale(network.local(patches_BCDHW)).float()
        leaves = [tensor.detach().requires_grad_() for tensor in (result.coarse.logits_Cdhw, logits_BCDHW)]
        synchronize(trainer.device)
        started = time.perf_counter()
        counts_Ldhw = step.volume.label_counts(trainer.encoding.num_labels, factor)
        low = LowResolution(leaves[0], counts_Ldhw, factor, trainer.encoding)
        fused = fused_loss(
            WindowPredictions(leaves[1], labels_B1DHW[:, 0], result.starts_B3), low, network.fusion_weights
        )
        benefit_map(fused.changes, fused.slope_S, counts_Ldhw.shape[1:], network.patch_size, factor)
        (fused.loss + fused.coarse_loss).backward()
        synchronize(trainer.device)
        seconds += time.perf_counter() - started
    return seconds / steps


if __name__ == "__main__":
    main()
