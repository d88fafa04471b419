"""A model as files that other programs run: both branches as ONNX and OpenVINO IR, and a JSON that says all the rest.

Tensor suffixes: B batch, 1 a batch of one, C channels, I channels of the image and of the context, D H W axes of a
patch, d h w axes of the low-resolution view.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor, nn

from nnunet_nmsw import __version__
from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.files import write_json
from nnunet_nmsw.inference.openvino_models import IMPOSSIBLE, TOLERANCE, conversion_failures, import_openvino, random
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.model.fusion import gaussian_weights
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.model.strides import UNKNOWN_STRIDE, total_stride
from nnunet_nmsw.selection.budget import UNCALIBRATED
from nnunet_nmsw.selection.by_score import COVERAGE_DISCOUNT, ENTROPY_WORTH, PLACEMENT_STEP
from nnunet_nmsw.selection.interface import CANDIDATE_THRESHOLD
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import TILE_STEP_SIZE

DESCRIPTION, GAUSSIAN = "model.json", "gaussian.npy"
"""Beside the folders of the folds."""

FORMAT = 1
"""Of the description. A program that reads another one should refuse."""


class GlobalGraph(nn.Module):
    """The global branch, and what its output says of each low-resolution voxel.

    Args:
        network: in evaluation mode.
        encoding: of the labels.
    """

    def __init__(self, network: NMSWNetwork, encoding: LabelEncoding) -> None:
        super().__init__()
        self.network, self.encoding = network, encoding
        self.outputs = ["logits", "score_map"] + (["context"] if network.context is not None else [])

    def forward(self, low_1Cdhw: Tensor) -> tuple[Tensor, ...]:
        """Coarse logits, score map, and the context where there is one, each of shape 1, channels, d, h, w."""
        coarse = self.network.coarse_of(self.network.global_branch(low_1Cdhw)[0], self.encoding)
        of_voxels = (coarse.logits_Cdhw, coarse.score_map_dhw[None], coarse.context_Gdhw)
        return tuple(of_voxel[None] for of_voxel in of_voxels if of_voxel is not None)


class LocalGraph(nn.Module):
    """The local branch.

    Args:
        network: in evaluation mode.
    """

    outputs = ("logits",)

    def __init__(self, network: NMSWNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, patches_BIDHW: Tensor) -> tuple[Tensor, ...]:
        """Logits of patches."""
        return (self.network(patches_BIDHW),)


def export_model(predictor: NMSWPredictor, folds: Sequence[int | str], folder: Path) -> None:
    """Write a model's branches and their description.

    Args:
        predictor: with the model, on the CPU.
        folds: names of the loaded folds.
        folder: to write into, empty.

    Raises:
        UserError: a branch cannot be exported, or computes something else then.
        OSError: a file cannot be written.
    """
    # A copy, which nothing has compiled.
    network, encoding = copy.deepcopy(predictor.nmsw_network).eval(), LabelEncoding.of(predictor.label_manager)
    stride = total_stride(network.global_branch) or [UNKNOWN_STRIDE] * 3
    of_model = (predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json)
    channels = determine_num_input_channels(*of_model)
    low_shapes = [(1, channels, *(m * s for m, s in zip(of, stride, strict=True))) for of in ((2, 2, 2), (3, 2, 4))]
    patches = [(b, channels + network.settings.context_channels, *network.patch_size) for b in (1, 2)]
    description = describe(predictor, stride)
    of_folds = []
    for fold, weights in zip(folds, predictor.list_of_parameters, strict=True):
        network.load_state_dict(weights)
        files = {}
        (folder / f"fold_{fold}").mkdir()
        for name, graph, shapes, free in (
            ("global_branch", GlobalGraph(network, encoding).eval(), low_shapes, ("d", "h", "w")),
            ("local_branch", LocalGraph(network).eval(), patches, ("batch",)),
        ):
            files[name] = f"fold_{fold}/{name}.onnx"
            _export(graph, shapes, free, folder / files[name])
            print(f"fold {fold}: {name} is written and gives PyTorch's results", flush=True)
        fusion = {name.removesuffix("_C"): values.tolist() for name, values in network.fusion_weights._asdict().items()}
        of_folds.append({"fold": fold, **files, "fusion": fusion})
    np.save(folder / GAUSSIAN, gaussian_weights(network.patch_size, torch.device("cpu")).numpy())
    write_json(folder / DESCRIPTION, {**description, "folds": of_folds})


def describe(predictor: NMSWPredictor, stride: Sequence[int]) -> dict[str, Any]:
    """All that is needed to run a model's branches, but for what differs between folds. Axes are the network's.

    Args:
        predictor: with the model.
        stride: total stride of the global branch.
    """
    plans, configuration, network = predictor.plans_manager, predictor.configuration_manager, predictor.nmsw_network
    spending = predictor.spending
    num_patches = spending.num_patches
    if num_patches == "auto" and spending.threshold is None:
        num_patches = UNCALIBRATED
    return {
        "format": FORMAT,
        "nnunet_nmsw": __version__,
        "dataset_name": plans.plans.get("dataset_name"),
        "trainer": predictor.trainer_name,
        "plans": plans.plans.get("plans_name"),
        "previous_stage": configuration.previous_stage_name,
        "image": {
            "channel_names": predictor.dataset_json.get("channel_names") or predictor.dataset_json["modality"],
            "transpose_forward": list(plans.transpose_forward),
            "spacing": list(configuration.spacing),
            "normalization_schemes": configuration.normalization_schemes,
            "use_mask_for_norm": configuration.configuration.get("use_mask_for_norm"),
            "foreground_intensity_properties_per_channel": plans.foreground_intensity_properties_per_channel,
        },
        "labels": predictor.dataset_json["labels"],
        "regions_class_order": predictor.dataset_json.get("regions_class_order"),
        "windows": {
            "patch_size": list(network.patch_size),
            "step": TILE_STEP_SIZE,
            "selection": spending.selector.name,
            "step_of_selection": PLACEMENT_STEP,
            "entropy_worth": ENTROPY_WORTH,
            "coverage_discount": COVERAGE_DISCOUNT,
            "candidate_threshold": CANDIDATE_THRESHOLD,
            "num_patches": num_patches,
            "threshold": spending.threshold,
            "gaussian": GAUSSIAN,
        },
        "global_branch": {
            "downsampling_factor": list(network.settings.downsampling_factor),
            "stride": list(stride),
        },
        "mirror_axes": list(predictor.allowed_mirroring_axes or ()),
        "settings": network.settings.to_dict(),
    }


@torch.no_grad()
def _export(graph: Any, shapes: Sequence[tuple[int, ...]], free: Sequence[str], file: Path) -> None:
    """Write a graph as ONNX and as OpenVINO IR, and see that both give PyTorch's results.

    Args:
        graph: with the names of its outputs.
        shapes: of inputs to try, the first as the example.
        free: names of its inputs' axes that have any size.
        file: of ONNX.

    Raises:
        UserError: it cannot be exported, or computes something else then.
    """
    axes = {"batch": 0, "d": 2, "h": 3, "w": 4}
    dynamic = {name: {axes[axis]: axis for axis in free} for name in ("image", *graph.outputs)}
    openvino = import_openvino()
    failures: tuple[type[Exception], ...] = IMPOSSIBLE + conversion_failures()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's age, and of sizes that become constants: seen below
            torch.onnx.export(
                graph,
                (random(*shapes[0]),),
                str(file),
                input_names=["image"],
                output_names=list(graph.outputs),
                dynamic_axes=dynamic,
                dynamo=False,  # the newer one needs further packages
            )
        model = openvino.convert_model(str(file))
        openvino.save_model(model, str(file.with_suffix(".xml")), compress_to_fp16=False)
        for written in (file, file.with_suffix(".xml")):
            program = openvino.Core().compile_model(str(written), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            for shape in shapes:
                _compare(graph, program, random(*shape))
    except failures as error:
        raise UserError(f"{file.stem} cannot be exported: {reason(error)}") from error


def _compare(graph: Any, program: Any, input_BCDHW: Tensor) -> None:
    """See that a program computes what a graph does.

    Raises:
        RuntimeError: it does not.
    """
    found = program(input_BCDHW.numpy())
    for index, (name, expected) in enumerate(zip(graph.outputs, graph(input_BCDHW), strict=True)):
        difference = np.abs(found[index] - expected.numpy()).max()
        if not difference <= TOLERANCE * expected.abs().max():
            raise RuntimeError(f"its {name} differs by {difference:.3g} from PyTorch's, of {list(input_BCDHW.shape)}")
