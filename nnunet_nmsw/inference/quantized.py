"""Local branches whose convolutions compute in 8-bit integers: made with NNCF, kept beside the checkpoint.

Tensor suffixes: 1 a batch of one, C channels, D H W axes of a patch.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.files import written_whole
from nnunet_nmsw.inference.openvino_models import converted_freely, digest_of, digest_of_weights, import_openvino

MODEL, WEIGHTS, FACTS = "local_branch_int8.xml", "local_branch_int8.bin", "local_branch_int8.json"
"""Files beside a checkpoint. The last is there when all are."""

CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")


@torch.no_grad()
def quantized(branch: nn.Module, patches_1CDHW: Sequence[Tensor], floating_ends: bool) -> Any:
    """A branch as a model of OpenVINO with 8-bit convolutions.

    Args:
        branch: in evaluation mode.
        patches_1CDHW: inputs as it gets them in predictions, from which ranges of activations are found.
        floating_ends: leave the first and the last convolution as they are.

    Raises:
        UserError: it has no form in which any number of patches can be given.
    """
    import_openvino()  # first, so that NNCF's own import of its reports finds none
    import nncf

    model = converted_freely(branch, patches_1CDHW[0].shape[1])
    if model is None:
        raise UserError(f"{type(branch).__name__} cannot be quantised: OpenVINO converts it for single sizes only")
    convolutions = [
        operation.get_friendly_name()
        for operation in model.get_ordered_ops()
        if operation.get_type_name() in CONVOLUTIONS
    ]
    ends = [convolutions[0], convolutions[-1]] if floating_ends else []
    with _quietly():
        return nncf.quantize(
            model,
            nncf.Dataset([patch_1CDHW.numpy() for patch_1CDHW in patches_1CDHW]),
            preset=nncf.QuantizationPreset.MIXED,  # activations of leaky rectifiers are not symmetric
            subset_size=len(patches_1CDHW),
            ignored_scope=nncf.IgnoredScope(names=ends),
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without NNCF's log of what it does."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def keep_quantized(model: Any, branch: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
    """Write a quantised branch into the folder of a fold, whole or not at all.

    Args:
        model: of OpenVINO.
        branch: that it was made of.
        folder: of the fold.
        facts: to write with it.

    Raises:
        OSError: it cannot be written.
    """
    with written_whole(folder, last=FACTS) as unfinished:
        import_openvino().save_model(model, str(unfinished / MODEL), compress_to_fp16=False)
        facts = {**facts, "weights": digest_of_weights(branch), "sha256": digest_of(unfinished, (MODEL, WEIGHTS))}
        (unfinished / FACTS).write_text(json.dumps(facts, indent=1))


def check_quantized(model_folder: Path, folds: Sequence[int | str]) -> None:
    """See that folds of a model were quantised.

    Raises:
        UserError: one was not.
    """
    for fold in folds:
        file = model_folder / f"fold_{fold}" / FACTS
        if not file.is_file():
            raise UserError(f"precision int8 needs {file}: run nmsw_quantize -m {model_folder} -f {fold}")


def read_quantized(model_folder: Path | None, branch: nn.Module) -> Any:
    """The quantised form of a branch, as a model of OpenVINO.

    Args:
        model_folder: whose folds are searched.
        branch: with its weights.

    Raises:
        UserError: there is none of these weights, or it is damaged.
    """
    if model_folder is None:
        raise UserError("precision int8 needs a model that is loaded from its folder")
    weights = digest_of_weights(branch)
    for facts in sorted(model_folder.glob(f"fold_*/{FACTS}")):
        folder = facts.parent
        try:
            known = json.loads(facts.read_text())
            if known["weights"] != weights:
                continue
            if known["sha256"] == digest_of(folder, (MODEL, WEIGHTS)):
                return import_openvino().Core().read_model(str(folder / MODEL))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"{facts} cannot be read ({reason(error)}): run nmsw_quantize again") from error
        raise UserError(f"{folder / MODEL} or {WEIGHTS} beside it is damaged: run nmsw_quantize again")
    raise UserError(
        f"precision int8: no fold of {model_folder} has a quantised branch of these weights: run nmsw_quantize again"
    )
