"""Ways to place windows, compared on a model that is trained, or is being trained.

    python experiments/placement.py -d 731 -p PLANS -tr nnUNetTrainerNMSW -checkpoint FILE -o placement.json

Dice of the first validation cases, measured as in `ablation_run.py`. The greedy placement has two numbers: by how much
a window discounts what it covers, and what an uncertain coarse prediction is worth beside the predicted benefit.

Tensor suffixes: D H W axes of the volume.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation_run import MOST_CASES, shared_fold
from nnunetv2.run.run_training import get_trainer_from_args
from torch import Tensor
from training_run import precision_of

from nnunet_nmsw.evaluation.shared import SharedFold
from nnunet_nmsw.evaluation.yardsticks import WAYS, CaseFacts, Nothing
from nnunet_nmsw.inference.volume import Padded, Spending, choose
from nnunet_nmsw.selection.by_score import GreedyBenefit
from nnunet_nmsw.selection.interface import Selector
from nnunet_nmsw.trainers.cases import read_cases
from nnunet_nmsw.trainers.nnUNetTrainerNMSW import nnUNetTrainerNMSW
from nnunet_nmsw.trainers.validation import labels_of
from nnunet_nmsw.volume.labels import LabelEncoding

DISCOUNTS, ENTROPIES = (0.4, 0.55, 0.7, 0.85, 1.0), (0.0, 0.1, 0.3, 1.0, 1000.0)  # 1000 is the entropy alone

TRIED: dict[str, Selector] = {
    **{name: WAYS[name].selector(CaseFacts()) for name in ("top_k", "entropy")},
    **{
        f"discount {discount:g}, entropy {entropy:g}": GreedyBenefit(entropy, discount)
        for discount in DISCOUNTS
        for entropy in ENTROPIES
    },
}
"""By the name in the table; see `GreedyBenefit`."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset")
    parser.add_argument("-p", required=True, help="plans")
    parser.add_argument("-tr", default="nnUNetTrainerNMSW", help="trainer")
    parser.add_argument("-f", type=int, default=0, help="fold")
    parser.add_argument("-checkpoint", type=Path, required=True)
    parser.add_argument("-k", nargs="+", default=["5", "5%", "10%", "20%"], help="numbers of patches")
    parser.add_argument("-thresholds", nargs="*", type=float, default=[], help="of the automatic number of patches")
    parser.add_argument("-ways", nargs="+", default=list(TRIED), choices=TRIED, metavar="WAY", help="; ".join(TRIED))
    parser.add_argument("-cases", type=int, default=MOST_CASES)
    parser.add_argument("-o", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    trainer = get_trainer_from_args(args.d, "3d_fullres", args.f, args.tr, args.p, device=torch.device("cpu"))
    trainer.initialize()
    trainer.load_checkpoint(str(args.checkpoint))
    found: dict[str, dict[str, Any]] = {}
    with precision_of("cpu"), torch.inference_mode():
        for name, k, dice, windows in predicted(trainer, args):
            row = found.setdefault(f"{name}, K = {k}", {"dice": [], "windows": []})
            row["dice"].append(dice)
            row["windows"].append(windows)
    for name, row in found.items():
        by_class = np.nanmean(np.array(row["dice"]), 0)
        row["mean_dice"] = float(np.nanmean(by_class))
        row["dice"] = [[None if math.isnan(dice) else dice for dice in case] for case in row["dice"]]
        print(f"{name:60} {100 * row['mean_dice']:5.1f} {np.mean(row['windows']):6.1f} windows")
    args.o.write_text(json.dumps(found, indent=1))


def predicted(trainer: nnUNetTrainerNMSW, args: argparse.Namespace) -> Iterator[tuple[str, str, list[float], int]]:
    """Name of a way, K, Dice by class and number of windows, case by case."""
    network, encoding = trainer.nmsw_network.eval(), trainer.encoding
    trainer.set_deep_supervision_enabled(False)
    _, dataset = trainer.get_tr_and_val_datasets()
    for case in read_cases(dataset, dataset.identifiers[: args.cases], encoding):
        reference_DHW = torch.from_numpy(np.asarray(case.segmentation[0], dtype=np.int64)).clamp_min(0)
        padded = Padded.of(case.volume_CDHW, network.patch_size)
        fold = shared_fold(trainer, padded)
        dice_of = partial(dice_and_windows, fold, padded, reference_DHW, encoding)
        yield Nothing.name, "0", *dice_of(Spending(Nothing(), 1))
        yield "all windows", "all", *dice_of(Spending(WAYS["top_k"].selector(CaseFacts()), "all"))
        for name in args.ways:
            for k in args.k:
                yield name, k, *dice_of(Spending(TRIED[name], int(k) if k.isdigit() else k))
            for threshold in args.thresholds:
                yield name, f"auto {threshold:g}", *dice_of(Spending(TRIED[name], "auto", threshold))
        fold.store.close()


def dice_and_windows(
    fold: SharedFold, padded: Padded, reference_DHW: Tensor, encoding: LabelEncoding, spending: Spending
) -> tuple[list[float], int]:
    """Dice by class, and the number of windows."""
    of_case = choose(fold, padded, spending)
    labels_DHW = labels_of(padded, of_case, reference_DHW.device)
    return encoding.dice(reference_DHW, labels_DHW).tolist(), len(of_case.windows.starts_K3)


if __name__ == "__main__":
    main()
