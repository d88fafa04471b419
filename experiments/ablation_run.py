"""One run of the ablations: train one arm with one seed, measure every way of choosing windows, write JSON.

`ablation.py` calls this, and `training_run.py` trains.

Tensor suffixes: C channels or classes, D H W axes of the volume.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor
from training_run import flags_of_training, in_bfloat16, precision_of, trained

from nnunet_nmsw.evaluation.oracle import Oracle
from nnunet_nmsw.evaluation.shared import Costs, PatchStore, SharedFold, SharedSlidingWindow
from nnunet_nmsw.evaluation.yardsticks import WAYS, CaseFacts, Nothing, Objects
from nnunet_nmsw.inference.networks import Ensemble
from nnunet_nmsw.inference.volume import Padded, Spending, choose, spatial_shape
from nnunet_nmsw.selection.by_score import TopK, placement_grid
from nnunet_nmsw.selection.calibration import THRESHOLDS
from nnunet_nmsw.trainers.cases import read_cases
from nnunet_nmsw.trainers.nnUNetTrainerNMSW import nnUNetTrainerNMSW
from nnunet_nmsw.trainers.validation import labels_of
from nnunet_nmsw.volume.labels import LabelEncoding

NUM_PATCHES = (2, 5, 10, 30, "5%", "10%", "20%")
MOST_CASES = 12
LOGGED = ("foreground_share", "entropy", "benefit", "loss_local", "loss_global", "loss_fused", "benefit_loss")
SLIDING_WINDOW, ALONE, ALL, AUTOMATIC = "sliding window", "global branch", "all windows", "automatic"
SLIDES = {"all": (0.5, False), "step 1.0": (1.0, False), "step 1.0, empty windows skipped": (1.0, True)}
"""Step, and whether empty windows are skipped, by the name in the place of K."""
AS_OBJECTS = "as objects"
"""In the place of K: in each case as many windows as zoom-in takes there."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[flags_of_training()]
    )
    parser.add_argument("-o", type=Path, required=True, help="JSON file")
    parser.add_argument("--evaluate", action="store_true", help="only measure again what was trained")
    parser.add_argument("--own_selection", action="store_true", help="leave out the ways to pick windows of other arms")
    args = parser.parse_args()
    with precision_of(args.device):
        trainer = trained(args, args.evaluate)
        results = evaluate(trainer, args.own_selection)
    if args.evaluate:
        results = {**json.loads(args.o.read_text()), **results}
    else:
        logging = trainer.logger.local_logger.my_fantastic_logging
        results["training"] = {name: logging[f"nmsw_{name}"] for name in LOGGED if f"nmsw_{name}" in logging}
        ends, starts = (np.array(logging[f"epoch_{what}_timestamps"]) for what in ("end", "start"))
        results["bfloat16"] = in_bfloat16(args.device)
        results["run"] = {"fold": args.f, "steps": args.steps}
        results["seconds_of_training"] = float((ends - starts).sum())
    unfinished = args.o.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1))
    unfinished.rename(args.o)


@torch.inference_mode()
def evaluate(trainer: nnUNetTrainer, own_selection: bool) -> dict[str, Any]:
    """Dice of every method on the first validation cases, at the spacing of training.

    Args:
        trainer: trained.
        own_selection: pick windows as the model itself does, and by the oracle.

    Returns:
        `dice`: by method and K, a list of Dice by class, means over the cases that have a value; `taken`: by method and
        K, mean number of windows; `cases`: their number.
    """
    trainer.set_deep_supervision_enabled(False)
    encoding = LabelEncoding.of(trainer.label_manager)
    dice: dict[str, dict[str, list[np.ndarray]]] = {}
    taken: dict[str, dict[str, list[int]]] = {}
    _, dataset = trainer.get_tr_and_val_datasets()
    for case in read_cases(dataset, dataset.identifiers[:MOST_CASES], encoding):
        reference_DHW = torch.from_numpy(np.asarray(case.segmentation[0], dtype=np.int64)).clamp_min(0)
        predictions = slid(trainer, case)
        if isinstance(trainer, nnUNetTrainerNMSW):
            predictions = itertools.chain(predictions, predicted(trainer, case, reference_DHW, own_selection))
        for method, k, labels_DHW, windows in predictions:
            scores = encoding.dice(reference_DHW, labels_DHW).numpy()
            dice.setdefault(method, {}).setdefault(k, []).append(scores)
            taken.setdefault(method, {}).setdefault(k, []).append(windows)
    means = {
        method: {k: np.nanmean(np.stack(values), 0).tolist() for k, values in by_k.items()}
        for method, by_k in dice.items()
    }
    numbers = {method: {k: float(np.mean(of)) for k, of in by_k.items()} for method, by_k in taken.items()}
    return {"dice": means, "taken": numbers, "cases": len(dice[SLIDING_WINDOW]["all"])}


def slid(trainer: nnUNetTrainer, case: Any) -> Iterator[tuple[str, str, Tensor, int]]:
    """Method, K, labels and number of windows of nnU-Net's sliding window, with `SLIDES` in the place of K."""
    predictor = SharedSlidingWindow(Costs(), use_mirroring=False, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network.eval(),
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        None,
    )
    encoding = LabelEncoding.of(trainer.label_manager)
    shape = spatial_shape(Padded.of(case.volume_CDHW, trainer.configuration_manager.patch_size).volume_CDHW)
    for name, (predictor.tile_step_size, predictor.skips_background) in SLIDES.items():
        logits_CDHW = predictor.predict_logits_from_preprocessed_data(case.volume_CDHW).cpu()
        looked_at = predictor.num_looked_at
        windows = predictor.num_windows(shape) if looked_at is None else looked_at
        yield SLIDING_WINDOW, name, encoding.labels_of(encoding.decided(logits_CDHW)), windows


def predicted(
    trainer: nnUNetTrainerNMSW, case: Any, reference_DHW: Tensor, own_selection: bool
) -> Iterator[tuple[str, str, Tensor, int]]:
    """Method, K, labels and number of windows of each method at each K, of all methods or of a few."""
    network, device = trainer.nmsw_network, trainer.device
    padded = Padded.of(case.volume_CDHW, network.patch_size)
    fold = shared_fold(trainer, padded)
    reference = Padded.of(reference_DHW[None], network.patch_size).volume_CDHW[0]
    make = partial(Oracle, partial(fold.patch, padded), fold.weights, reference, (device,))
    facts = CaseFacts(sum(map(ord, case.key)), make)
    own = network.sampler.at_inference

    def labels(spending: Spending) -> tuple[Tensor, int]:
        chosen = choose(fold, padded, spending)
        return labels_of(padded, chosen, device), len(chosen.windows.starts_K3)

    yield ALONE, "0", *labels(Spending(Nothing(), 1))
    yield ALL, "all", *labels(Spending(TopK(), "all"))
    names = (own.name, Oracle.name) if own_selection else [name for name, way in WAYS.items() if way.takes_k]
    for name in names:
        for k in NUM_PATCHES:
            yield name, str(k), *labels(Spending(WAYS[name].selector(facts), k))
    if not own_selection:
        zoomed_in_DHW, windows = labels(Spending(Objects(), "all"))
        yield Objects.name, "own", zoomed_in_DHW, windows
        for name in names:
            # as many as one that finds no object takes: none, and no way to pick windows takes K = 0
            at_equal_number = labels(Spending(WAYS[name].selector(facts), windows)) if windows else (zoomed_in_DHW, 0)
            yield name, AS_OBJECTS, *at_equal_number
        for threshold in THRESHOLDS:
            yield AUTOMATIC, str(threshold), *labels(Spending(own, "auto", threshold))
    fold.store.close()


def shared_fold(trainer: nnUNetTrainerNMSW, padded: Padded) -> SharedFold:
    """The trained networks on one volume, whose patches are predicted once for all ways to pick windows."""
    network = trainer.nmsw_network
    grid = network.grid(spatial_shape(padded.volume_CDHW))
    positions = torch.cat([grid.starts_N3, placement_grid(grid).starts_N3]).tolist()
    (fold,) = Ensemble(network, [network.state_dict()], trainer.encoding, trainer.device).folds()
    return SharedFold(fold, False, PatchStore(map(tuple, positions)), Costs())


if __name__ == "__main__":
    main()
