"""What a training and a prediction do on a pretended CUDA device: `python scenarios.py FILE` writes a JSON.

For each scenario the file has the number of kernels, and the waits by operation and line; or what error there was. Run
it with the environment of `stand_ins`, and with the folders of the tests and of this file as `PYTHONPATH`.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import device
import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from tiny import build_network, build_paper_network, build_retrofit_network
from torch import nn
from training import NONE, PATCH, Cases, nnunet_augmentation

from nnunet_nmsw.inference.claims import FinePrediction, Merged, claims_of, without_windows
from nnunet_nmsw.inference.fine_model import coarse_prediction_of, on_low_grid
from nnunet_nmsw.inference.networks import Ensemble, unbounded
from nnunet_nmsw.inference.planes import FusedPrediction
from nnunet_nmsw.inference.set_members import MatchedPatches
from nnunet_nmsw.inference.volume import (
    FoldOfCase,
    Padded,
    Spending,
    Work,
    choose,
    fused_prediction,
    patches_bar,
    predict_labels,
    predict_logits,
    where_it_fits,
)
from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.selection.by_score import GREEDY_BY_ENTROPY
from nnunet_nmsw.selection.explore import explored
from nnunet_nmsw.selection.interface import SCORE_SCALE
from nnunet_nmsw.selection.of_present import OfPresentClasses
from nnunet_nmsw.trainers.augmentation import Augmentation
from nnunet_nmsw.trainers.batches import training_volume
from nnunet_nmsw.trainers.loader import WholeVolumeLoader
from nnunet_nmsw.trainers.losses.local import LocalLoss
from nnunet_nmsw.trainers.step import TrainingStep, update
from nnunet_nmsw.trainers.validation import predicted_in_training
from nnunet_nmsw.volume.interpolation import linear_axis
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.matched_labels import MatchedLabels

LABELS, IGNORED = LabelEncoding(3), LabelEncoding(3, 2)
REGIONS, REGIONS_IGNORED = (LabelEncoding(n, ignore, ((1, 2), (2,)), (1, 2)) for n, ignore in ((3, None), (4, 3)))
FACTOR = [2, 2, 2]
SAME_LABELS = 0.97
"""Share of the voxels of noise whose label does not hang on the rounding of half precision."""

ROTATION = np.array([[0.9, 0.1, 0], [-0.1, 0.95, 0], [0, 0, 1.1]])


class OfCascade(Cases):
    """Cases with what the previous stage predicted."""

    def load_case(self, key: str) -> tuple[Any, ...]:
        """As nnU-Net's dataset does."""
        image, labels, _, properties = super().load_case(key)
        return image, labels, labels[0], properties


def everything(augmentation: Augmentation) -> Augmentation:
    """Every transform applied, for all that may wait."""
    for transform in [*augmentation.of_views, *augmentation.of_previous]:
        if hasattr(transform, "apply_probability"):
            transform.apply_probability = 1.0
    return augmentation


def loss_of(encoding: LabelEncoding) -> LocalLoss:
    """nnU-Net's."""
    dice, dice_class = {"batch_dice": False, "smooth": 1e-5, "ddp": False}, MemoryEfficientSoftDiceLoss
    of_patches: nn.Module
    if encoding.has_regions:
        ignores = encoding.ignore_label is not None
        of_patches = DC_and_BCE_loss({}, {"do_bg": True, **dice}, use_ignore_label=ignores, dice_class=dice_class)
    else:
        ignored = encoding.ignore_label
        of_patches = DC_and_CE_loss({"do_bg": False, **dice}, {}, ignore_label=ignored, dice_class=dice_class)
    return LocalLoss(of_patches, None, encoding)


def a_step(encoding: LabelEncoding, augmentation: Augmentation, cascade: bool = False) -> TrainingStep:
    """A step on a case."""
    loader = WholeVolumeLoader(OfCascade() if cascade else Cases(), PATCH, 2, 1, augmentation, True, (1,))
    loader.thread_id = 0
    batch = next(loader)
    if augmentation.spatial is not None:
        batch["affine"] = ROTATION
    return TrainingStep(training_volume(batch, augmentation, 2 if cascade else 0), loss_of(encoding))


def training(
    encoding: LabelEncoding = LABELS, build: Callable[..., Any] = build_network, cascade: bool = False, **nmsw: Any
) -> None:
    """The second of two steps, the update of weights and all that is reported included."""
    channels = {"num_classes": encoding.num_channels, "num_input_channels": 3 if cascade else 1}
    network = device.to_device(build(PATCH, **channels, downsampling_factor=FACTOR, **nmsw))
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)
    steps = [a_step(encoding, everything(nnunet_augmentation(cascade=cascade)), cascade) for _ in range(2)]
    with device.device():
        scaler = torch.amp.GradScaler("cuda")
        for step in steps:
            device.forget()
            numbers = update(step.to(device.CUDA, non_blocking=True), network, optimizer, scaler)
            assert np.isfinite(numbers["loss"])


def validation() -> None:
    """A step of an epoch's validation."""
    network = device.to_device(build_network(PATCH, downsampling_factor=FACTOR).eval())
    step = a_step(LABELS, NONE)
    with device.device(), torch.no_grad():
        step.to(device.CUDA, non_blocking=True)
        with torch.autocast("cuda"):
            network(step)
        predicted_in_training(network, step, device.CUDA)


def few_windows(network: Any, volume_CDHW: torch.Tensor, number: int = 8) -> float:
    """A threshold for "auto" by which about so many windows are taken, whatever the weights."""
    ensemble = Ensemble(network, [network.state_dict()], LabelEncoding(network.fusion_parameters.shape[1]), device.CPU)
    padded = Padded.of(volume_CDHW, network.patch_size)
    chosen = choose(ensemble.folds()[0], padded, Spending(network.sampler.at_inference, number))
    return float(chosen.windows.scores_K.min()) / SCORE_SCALE


def prediction(
    folds: int = 1,
    num_patches: int | str = 4,
    results_on: torch.device = device.CUDA,
    logits: bool = False,
    classes: int = 3,
    mirror_axes: tuple[int, ...] = (),
    **nmsw: Any,
) -> None:
    """A volume, after one of the same shape."""
    network = build_network((8, 8, 8), num_classes=classes, downsampling_factor=FACTOR, **nmsw)
    weights = [{name: w * (1 + 0.5 * fold) for name, w in network.state_dict().items()} for fold in range(folds)]
    volume_CDHW = torch.randn(1, 24, 28, 32, generator=torch.Generator().manual_seed(0))
    volume_CDHW[:, 6:12, 8:16, 8:20] += 4

    def predicted(on: torch.device, results_on: torch.device) -> Any:
        encoding = LabelEncoding(classes)
        ensemble = Ensemble(network, weights, encoding, on, mirror_axes)
        padded = Padded.of(volume_CDHW, network.patch_size).on(results_on)
        spending = Spending(network.sampler.at_inference, num_patches, threshold)
        chosen = [choose(fold, padded, spending) for fold in ensemble.folds()]
        work = Work(unbounded(network.patch_size, on), results_on)
        if logits:
            return predict_logits(padded, chosen, work).cpu()
        axes = [linear_axis(n, m) for n, m in zip(padded.inside, (30, 30, 40), strict=True)]
        return where_it_fits(lambda work: predict_labels(padded, chosen, axes, work), work)

    with torch.no_grad():
        threshold = few_windows(network, volume_CDHW) if num_patches == "auto" else None
        expected = predicted(device.CPU, device.CPU)
        device.to_device(network)
        weights = [{name: device.OnDevice(w) for name, w in of_fold.items()} for of_fold in weights]
        with device.device():
            for _ in range(2):
                device.forget()
                found = predicted(device.CUDA, results_on)
    found, expected = (result.argmax(0) if logits else result for result in (found, expected))
    same = float((found.flatten() == expected.flatten()).float().mean())
    assert same > SAME_LABELS, f"{same:.3f} of the labels are the same as on the host"


def prediction_short_of_memory() -> None:
    """A volume whose coarse logits, and then its fused ones, do not fit on the device."""
    failed = []

    def failing_once(cls: type, name: str) -> Any:
        method = getattr(cls, name)

        def called(self: Any, *args: Any) -> Any:
            is_on_device = any(getattr(of, "device", None) == device.CUDA for of in (self, *args))
            if is_on_device and name not in failed:
                failed.append(name)
                raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
            return method(self, *args)

        return mock.patch.object(cls, name, called)

    with failing_once(NMSWNetwork, "coarse"), failing_once(FusedPrediction, "dense"):
        prediction()
    assert failed == ["coarse", "dense"]


def prediction_of_a_set() -> None:
    """What two fine models claim of an image, and the coarse model's labels elsewhere."""
    generator = torch.Generator().manual_seed(0)
    networks = [build_network((8, 8, 8), num_classes=n, downsampling_factor=FACTOR) for n in (3, 4)]
    labels = [MatchedLabels((1, 3), (2, 1), (), ()), MatchedLabels((2, 4), (1, 3), ("other",), (2,))]
    volume_CDHW, body_1dhw = torch.randn(1, 24, 28, 32, generator=generator), torch.ones(1, 12, 14, 16)
    logits_Cdhw = 3 * torch.randn(5, 12, 14, 16, generator=generator)

    def predicted(on: torch.device) -> torch.Tensor:
        coarse_Cdhw = logits_Cdhw.to(on)
        merged = Merged((30, 30, 40), [of_model.coarse for of_model in labels])
        work = Work(unbounded((8, 8, 8), on), on)
        for number, (network, of_model) in enumerate(zip(networks, labels, strict=True)):
            ensemble = Ensemble(network, [network.state_dict()], LabelEncoding(of_model.num_channels), on)
            padded, shared = Padded.of(volume_CDHW, (8, 8, 8)).on(on), LabelEncoding(of_model.num_shared)
            grid = network.grid((24, 28, 32))
            coarse = coarse_prediction_of(of_model.of_coarse(coarse_Cdhw), padded, (2, 2, 2), shared)
            windows = Spending(OfPresentClasses(GREEDY_BY_ENTROPY), 6).choose(coarse, grid)
            windows = explored(windows, on_low_grid(body_1dhw.to(on), padded, (2, 2, 2))[0], grid, 2)
            weights = FusionWeights.convex(torch.full((of_model.num_channels,), 0.88)).to(on)
            coarse = coarse._replace(
                logits_Cdhw=of_model.for_fusion(coarse.logits_Cdhw), encoding=LabelEncoding(of_model.num_channels)
            )
            (fold,) = ensemble.folds()
            chosen = FoldOfCase(MatchedPatches(fold, of_model), coarse, grid, windows, weights)
            axes = [linear_axis(n, m) for n, m in zip(padded.inside, (30, 30, 40), strict=True)]
            with patches_bar([chosen], work) as bar:
                fused = fused_prediction(padded, [chosen], work, bar)
                for claims in claims_of(FinePrediction(fused, of_model, windows.starts_K3, axes, padded, 8)):
                    merged.add(number, claims)
        to_image = [linear_axis(n, m) for n, m in zip((12, 14, 16), (30, 30, 40), strict=True)]
        return merged.labels(without_windows(coarse_Cdhw, LabelEncoding(5)), to_image, 8)

    with torch.no_grad():
        expected = predicted(device.CPU)
        for network in networks:
            device.to_device(network)
        with device.device():
            device.forget()
            found = predicted(device.CUDA)
    same = float((found == expected).float().mean())
    assert same > SAME_LABELS, f"{same:.3f} of the labels are the same as on the host"


SCENARIOS: dict[str, Callable[[], None]] = {
    "training": training,
    "training with regions": partial(training, REGIONS),
    "training with an ignore label": partial(training, IGNORED),
    "training with regions and an ignore label": partial(training, REGIONS_IGNORED),
    "training by the paper's method": partial(training, build=build_paper_network),
    "training of a cascade": partial(training, cascade=True),
    "training with one window at once": partial(training, windows_at_once=1),
    "training with context": partial(training, context_channels=2),
    "training with an addition": partial(training, build=build_retrofit_network, context_channels=2),
    "validation of an epoch": validation,
    "prediction": prediction,
    "prediction, mirrored": partial(prediction, mirror_axes=(0, 1, 2)),
    "set of models": prediction_of_a_set,
    "prediction of 30 classes": partial(prediction, classes=30),
    "prediction of an ensemble": partial(prediction, folds=2),
    "prediction with results on the host": partial(prediction, results_on=device.CPU),
    "prediction with context": partial(prediction, context_channels=2, mirror_axes=(0, 1, 2)),
    "prediction with context, results on the host": partial(prediction, context_channels=2, results_on=device.CPU),
    "prediction short of memory": prediction_short_of_memory,
    "prediction of logits": partial(prediction, logits=True),
    "prediction with -k auto": partial(prediction, num_patches="auto"),
}
"""Without scores that are trained by contribution: autograd wants another shape of a gradient from such tensors."""


def main(file: Path, names: list[str]) -> None:
    """See above.

    Args:
        file: to write.
        names: of scenarios, all where there are none.
    """
    device.pretend()
    results: dict[str, Any] = {}
    for name in names or SCENARIOS:
        torch.manual_seed(0)
        device.forget()
        try:
            SCENARIOS[name]()
        except Exception as error:  # noqa: BLE001 - the other scenarios shall run
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        else:
            results[name] = {"kernels": device.launched.total(), "waits": dict(device.waited.most_common())}
    file.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
