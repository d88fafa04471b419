"""Local branches whose convolutions compute in 8-bit integers: made with NNCF, kept beside the checkpoint.

Tensor suffixes: 1 a batch of one, C channels, D H W axes of a patch.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_nmsw.documents import read_json
from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.files import remove_leftovers, written_whole
from nnunet_nmsw.inference.openvino_models import Converted, cache_folder, digest_of, import_openvino
from nnunet_nmsw.model.weights import digest_of_weights

MODEL, WEIGHTS, FACTS = "local_branch_int8.xml", "local_branch_int8.bin", "local_branch_int8.json"
"""Files beside a checkpoint. The last is there when all are."""

SCHEMA = {
    "type": "object",
    "required": ["weights", "sha256"],
    "properties": {"weights": {"type": "string"}, "sha256": {"type": "string"}},
}
"""Of the last."""

LOCAL = "local_branch."
"""Before the names of the branch's weights in a checkpoint."""

CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")


@torch.no_grad()
def quantized(
    branch: nn.Module, patches_1CDHW: Sequence[Tensor], floating_ends: bool, cache: Path | None = None
) -> Any:
    """A branch as a model of OpenVINO with 8-bit convolutions.

    Args:
        branch: in evaluation mode.
        patches_1CDHW: inputs as it gets them in predictions, from which ranges of activations are found.
        floating_ends: leave the first and the last convolution as they are.
        cache: folder of converted branches; `cache_folder` where None.

    Raises:
        UserError: it has no form in which any number of patches can be given.
    """
    import_openvino()  # first, so that NNCF's own import of its reports finds none
    import nncf

    shape, converted = tuple(patches_1CDHW[0].shape), Converted(branch, cache or cache_folder())
    if not converted.is_free(shape[1]):
        raise UserError(f"{type(branch).__name__} cannot be quantised: OpenVINO converts it for single sizes only")
    model = converted.model(shape)
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
    remove_leftovers(folder)
    with written_whole(folder, last=FACTS) as unfinished:
        import_openvino().save_model(model, str(unfinished / MODEL), compress_to_fp16=False)
        facts = {
            **facts,
            "weights": digest_of_weights(branch.state_dict()),
            "sha256": digest_of(unfinished, (MODEL, WEIGHTS)),
        }
        (unfinished / FACTS).write_text(json.dumps(facts, indent=1))


def find_quantized(
    model_folder: Path, folds: Sequence[int | str], parameters: Sequence[Mapping[str, Tensor]]
) -> dict[str, Path]:
    """The folders of quantised branches, by digests of the weights that they were made of.

    Args:
        model_folder: of the model.
        folds: that are loaded.
        parameters: their weights.

    Raises:
        UserError: a fold was not quantised, or with other weights.
    """
    folders = {}
    for fold, state in zip(folds, parameters, strict=True):
        file = model_folder / f"fold_{fold}" / FACTS
        remedy = f"run nmsw_quantize -m {model_folder} -f {fold}"
        if not file.is_file():
            raise UserError(f"precision int8 needs {file}: {remedy}")
        weights = digest_of_weights({n.removeprefix(LOCAL): w for n, w in state.items() if n.startswith(LOCAL)})
        if _facts(file)["weights"] != weights:
            raise UserError(f"{file} was made of other weights than this checkpoint's: {remedy}, with the same -chk")
        folders[weights] = file.parent
    return folders


def read_quantized(folders: Mapping[str, Path], branch: nn.Module) -> Any:
    """The quantised form of a branch, as a model of OpenVINO.

    Args:
        folders: see `find_quantized`.
        branch: with its weights.

    Raises:
        UserError: there is none of these weights, or it is damaged.
    """
    folder = folders.get(digest_of_weights(branch.state_dict()))
    if folder is None:
        raise UserError("precision int8 needs a model that is loaded from a folder with its quantised branches")
    try:
        if _facts(folder / FACTS)["sha256"] == digest_of(folder, (MODEL, WEIGHTS)):
            return import_openvino().Core().read_model(str(folder / MODEL))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder / MODEL} cannot be read ({reason(error)}): run nmsw_quantize again") from error
    raise UserError(f"{folder / MODEL} or {WEIGHTS} beside it is damaged: run nmsw_quantize again")


def _facts(file: Path) -> dict[str, Any]:
    facts: dict[str, Any] = read_json(file, SCHEMA, "run nmsw_quantize again")
    return facts
