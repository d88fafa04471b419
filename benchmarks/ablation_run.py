"""One run of the ablations: train one arm with one seed, measure every way of choosing windows, write JSON.

`ablation.py` calls this. On a CPU everything runs in bfloat16, as in `bfloat16.py`.

Tensor suffixes: N windows of the grid, K chosen windows, C classes, D H W axes of the volume or of a patch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation_fusions import fused_labels, fusions
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunet_nmsw.settings import SELECTIONS, NMSWConfig, resolve_num_patches
from nnunet_nmsw.evaluation.oracle import oracle_windows
from nnunet_nmsw.evaluation.selectors import entropy_windows, random_windows
from nnunet_nmsw.model.fusion import FusionWeights, fused_segmentation
from nnunet_nmsw.volume.windows import WindowGrid, crop_windows, downsample, upsample_window
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.model.network import NMSWNetwork, WindowChoice
from nnunet_nmsw.trainers.views import seed_everything

NUM_PATCHES = (2, 5, 10, 30, "5%", "10%")
STOP_AT = (0.0, 0.05, 0.1, 0.2, 0.4)
"""Smallest predicted benefit of a window with an automatic number of them, in units of the score map."""
MOST_CASES = 12
PATCHES_AT_ONCE = 8
LOGGED = ("foreground_share", "entropy", "benefit", "loss_local", "loss_global", "loss_fused", "benefit_loss")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset")
    parser.add_argument("-p", required=True, help="plans")
    parser.add_argument("-tr", required=True, help="trainer")
    parser.add_argument("-f", type=int, default=0, help="fold")
    parser.add_argument("-seed", type=int, required=True)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-o", type=Path, required=True, help="JSON file")
    parser.add_argument("--evaluate", action="store_true", help="only measure again what was trained")
    parser.add_argument("--own_selection", action="store_true", help="leave out the ways to pick windows of other arms")
    args = parser.parse_args()
    device = torch.device(args.device)
    # The cache of cast weights lives until autocast ends, which here is after the last optimiser step.
    precision = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if device.type == "cpu" else nullcontext()
    with precision:
        trainer = get_trainer_from_args(args.d, "3d_fullres", args.f, args.tr, args.p, device=device)
        seed_everything(args.seed)
        trainer.initialize()
        if device.type == "cpu":
            keep_gradients_finite(trainer.network)
        if args.evaluate:
            trainer.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))
        else:
            started = time.perf_counter()
            trainer.run_training()
            seconds = time.perf_counter() - started
        results = evaluate(trainer, args.own_selection)
    if args.evaluate:
        results = {**json.loads(args.o.read_text()), **results}
    else:
        logging = trainer.logger.local_logger.my_fantastic_logging
        results["training"] = {name: logging[f"nmsw_{name}"] for name in LOGGED if f"nmsw_{name}" in logging}
        results["seconds_of_training"] = seconds
    unfinished = args.o.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1))
    unfinished.rename(args.o)


def keep_gradients_finite(network: torch.nn.Module) -> None:
    """Replace what is not finite in the gradients by 0.

    oneDNN's bfloat16 weight gradient of some small convolutions reads memory that nobody wrote (seen with 24 features
    on 2×7×7 voxels): usually noise of 0.1%, now and then NaN. In float32 it does not happen.
    """
    for parameter in network.parameters():
        parameter.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))


@torch.inference_mode()
def evaluate(trainer: nnUNetTrainer, own_selection: bool) -> dict[str, Any]:
    """Dice of every method on the validation cases, at the spacing of training.

    Args:
        trainer: trained.
        own_selection: pick windows as the settings say, and by the oracle.

    Returns:
        `dice`: by method and K, a list of Dice by class, means over the cases that have a value; `windows`: mean number
        of windows of a case; `automatic_windows`: mean number taken by the smallest benefit that one must have.
    """
    trainer.set_deep_supervision_enabled(False)
    network = trainer.network.eval()
    patch_size = tuple(trainer.configuration_manager.patch_size)
    dice: dict[str, dict[str, list[np.ndarray]]] = {}
    sizes: list[int] = []
    taken: dict[str, list[int]] = {}
    for key, volume_CDHW, labels_DHW in validation_cases(trainer, patch_size):
        if isinstance(network, NMSWNetwork):
            case = Case(network, volume_CDHW, labels_DHW, trainer.device, seed=sum(map(ord, key)))
            predictions = case.predictions(own_selection)
        else:
            case = Case(as_nmsw(network, trainer), volume_CDHW, labels_DHW, trainer.device, seed=0)
            predictions = iter([("sliding window", "all", case.sliding_window())])
        sizes.append(len(case.grid))
        for method, k, prediction_DHW in predictions:
            scores = case.encoding.dice(case.labels_DHW, prediction_DHW).numpy()
            dice.setdefault(method, {}).setdefault(str(k), []).append(scores)
        for stop_at, windows in case.automatic.items():
            taken.setdefault(str(stop_at), []).append(windows)
    means = {
        method: {k: np.nanmean(np.stack(values), 0).tolist() for k, values in by_k.items()}
        for method, by_k in dice.items()
    }
    automatic = {stop_at: float(np.mean(windows)) for stop_at, windows in taken.items()}
    return {"dice": means, "windows": float(np.mean(sizes)), "automatic_windows": automatic, "cases": len(sizes)}


def validation_cases(trainer: nnUNetTrainer, patch_size: tuple[int, ...]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Key, volume and labels of the first preprocessed validation cases, padded as nnU-Net's predictor pads."""
    _, dataset = trainer.get_tr_and_val_datasets()
    for key in dataset.identifiers[:MOST_CASES]:
        data, segmentation, _, _ = dataset.load_case(key)
        volume_CDHW = torch.from_numpy(np.asarray(data[:], dtype=np.float32))
        labels_1DHW = torch.from_numpy(np.asarray(segmentation[:], dtype=np.int16)).clamp_min(0)
        yield (
            key,
            pad_nd_image(volume_CDHW, patch_size, "constant", {"value": 0}),
            pad_nd_image(labels_1DHW, patch_size, "constant", {"value": 0})[0],
        )


def as_nmsw(network: torch.nn.Module, trainer: nnUNetTrainer) -> NMSWNetwork:
    """A stock network in the place of the local branch; there is no other."""
    config = NMSWConfig.from_configuration(trainer.configuration_manager.configuration)
    patch_size = tuple(trainer.configuration_manager.patch_size)
    return NMSWNetwork(torch.nn.Identity(), network, trainer.label_manager.num_segmentation_heads, patch_size, config)


class Case:
    """A validation case; patch logits are computed once."""

    def __init__(
        self, network: NMSWNetwork, volume_CDHW: Tensor, labels_DHW: Tensor, device: torch.device, seed: int
    ) -> None:
        self.network, self.seed, self.labels_DHW = network, seed, labels_DHW.to(device)
        d, h, w = labels_DHW.shape
        self.grid: WindowGrid = network.grid((d, h, w))
        self.num_classes = len(network.fusion_weights.bias_C)
        self.encoding = LabelEncoding(self.num_classes)
        self.volume_1CDHW = volume_CDHW[None].to(device)
        self.logits: dict[tuple[int, ...], Tensor] = {}
        self.automatic: dict[float, int] = {}
        if not isinstance(network.global_branch, torch.nn.Identity):
            self.coarse = network.coarse(downsample(self.volume_1CDHW, network.config.downsampling_factor))

    def patches(self, starts_K3: Tensor) -> Tensor:
        """Logits of windows, shape K, C, patch size."""
        missing = [start for start in starts_K3.tolist() if tuple(start) not in self.logits]
        for first in range(0, len(missing), PATCHES_AT_ONCE):
            starts = missing[first : first + PATCHES_AT_ONCE]
            logits = self.network(crop_windows(self.volume_1CDHW, torch.tensor(starts), self.grid.patch_size))
            self.logits.update({tuple(start): patch.half() for start, patch in zip(starts, logits, strict=True)})
        return torch.stack([self.logits[tuple(start)].float() for start in starts_K3.tolist()])

    def predictions(self, own_selection: bool) -> Iterator[tuple[str, int | str, Tensor]]:
        """Method, K and labels of each method at each K, of all methods or of those that every arm needs."""
        yield "sliding window", "all", self.sliding_window()
        yield "global branch", "0", self.fused(self.grid_windows([]))
        yield "all windows", "all", self.fused(self.grid_windows(slice(None)))
        oracle, _ = oracle_windows(
            lambda window: self.patches(self.grid.starts_N3[window, None])[0],
            self.coarse.logits_Cdhw,
            self.network.fusion_weights,
            self.labels_DHW,
            self.grid,
        )
        arguments = (self.network, self.coarse, self.grid)
        choose: dict[str, Callable[[int], WindowChoice]] = {
            **{selection: partial(self.learned, selection) for selection in SELECTIONS},
            "entropy": lambda k: entropy_windows(*arguments, k),
            "entropy greedy": self.entropy_greedy,
            "random": lambda k: random_windows(*arguments, k, self.seed),
            "oracle": lambda k: self.grid_windows(oracle[:k]),
        }
        if own_selection:
            choose = {name: choose[name] for name in (self.network.config.selection, "oracle")}
        for method, windows in choose.items():
            for k in NUM_PATCHES:
                yield method, k, self.fused(windows(resolve_num_patches(k, len(self.grid))))
        if own_selection:
            return
        yield from self.other_fusions()
        for stop_at in STOP_AT:
            windows = self.network.select(self.coarse, self.grid, len(self.grid), "greedy_benefit", stop_at)
            self.automatic[stop_at] = len(windows.starts_K3)
            yield "automatic", str(stop_at), self.fused(windows)

    def other_fusions(self) -> Iterator[tuple[str, int | str, Tensor]]:
        """Labels of the same patches, fused in other ways than the trained one."""
        for k in (10, "10%", "all"):
            chosen = self.network.select(self.coarse, self.grid, resolve_num_patches(k, len(self.grid)))
            # The fusion by window trusts the window with the largest predicted benefit fully, the others less.
            share_K = (chosen.scores_K / chosen.scores_K.max().clamp_min(1e-6)).clamp(0, 1)
            patches_KCDHW = self.patches(chosen.starts_K3)
            for name, (fusion, trust) in fusions(self.network.fusion_weights).items():
                labels_DHW = fused_labels(
                    fusion,
                    patches_KCDHW,
                    chosen.starts_K3,
                    trust(share_K),
                    self.coarse.logits_Cdhw.float(),
                    self.grid.volume_shape,
                    self.grid.downsampling_factor,
                )
                yield name, k, labels_DHW

    def learned(self, selection: str, k: int) -> WindowChoice:
        """The windows of one of the network's selections."""
        return self.network.select(self.coarse, self.grid, k, selection)

    def entropy_greedy(self, k: int) -> WindowChoice:
        """Windows placed as "greedy_benefit" does, with entropy in the place of predicted benefit."""
        in_place = self.coarse._replace(score_map_dhw=self.network.entropy(self.coarse.logits_Cdhw))
        return self.network.select(in_place, self.grid, k, "greedy_benefit")

    def grid_windows(self, windows: slice | list[int]) -> WindowChoice:
        """Windows of the grid."""
        starts_K3 = self.grid.starts_N3[windows]
        return WindowChoice.fully_trusted(starts_K3, torch.zeros(len(starts_K3)))

    def fused(self, windows: WindowChoice) -> Tensor:
        """Labels of the fused prediction with some windows."""
        if len(windows.starts_K3) == 0:
            volume_shape, factor = self.grid.volume_shape, self.grid.downsampling_factor
            return upsample_window(self.coarse.logits_Cdhw, (0, 0, 0), volume_shape, factor).argmax(0)
        return self._segmentation(windows, self.coarse.logits_Cdhw, self.network.fusion_weights)

    def sliding_window(self) -> Tensor:
        """Labels of the local branch's sliding window."""
        nothing_Cdhw = self.volume_1CDHW.new_zeros((self.num_classes, *self.grid.low_shape))
        ones = FusionWeights.convex(nothing_Cdhw.new_ones(self.num_classes))
        return self._segmentation(self.grid_windows(slice(None)), nothing_Cdhw, ones)

    def _segmentation(self, windows: WindowChoice, coarse_Cdhw: Tensor, weights: FusionWeights) -> Tensor:
        return fused_segmentation(
            self.patches(windows.starts_K3),
            windows.starts_K3,
            windows.trust_K,
            coarse_Cdhw,
            weights,
            self.grid.volume_shape,
            self.grid.downsampling_factor,
            self.encoding,
        )


if __name__ == "__main__":
    main()
