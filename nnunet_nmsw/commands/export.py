"""The command `nmsw_export`: a trained model as ONNX and OpenVINO IR, for programs without PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_nmsw.commands.shared_flags import check_max_drop, require_extra
from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.files import is_new, remove_leftovers, written_whole
from nnunet_nmsw.flags import DEFAULT_MAX_DROP, TRUST_FLAG
from nnunet_nmsw.imports import importing
from nnunet_nmsw.selection.budget import parse_num_patches

NEEDED = ("onnx", "openvino")


def main(arguments: Sequence[str] | None = None) -> None:
    """Export a model from the command line.

    Raises:
        UserError: the extra is not installed, the model cannot be loaded or exported, or the folder is not empty.
    """
    args = parser().parse_args(arguments)
    num_patches = None if args.k is None else parse_num_patches(args.k, "-k", auto=True)
    require_extra("nmsw_export", "export", NEEDED)
    check_max_drop(args.max_drop, DEFAULT_MAX_DROP)
    folder = Path(args.o)
    remove_leftovers(folder)
    if not is_new(folder):
        raise UserError(f"-o {folder} is there and not empty: give a new folder")
    with importing():
        import torch

        from nnunet_nmsw.commands.find import find_folds
        from nnunet_nmsw.inference.exchange import DESCRIPTION, export_model
        from nnunet_nmsw.inference.loading import load_model
        from nnunet_nmsw.inference.model_folder import checked_folder
        from nnunet_nmsw.inference.predictor import NMSWPredictor
    model = checked_folder(Path(args.m))
    folds = find_folds(model, args.f, args.chk)
    on_cpu: dict[str, Any] = {"device": torch.device("cpu"), "perform_everything_on_device": False}
    predictor = NMSWPredictor(num_patches, max_drop=args.max_drop, **on_cpu)
    load_model(predictor, model, folds, args.chk, args.trust_model)
    try:
        with written_whole(folder, last=DESCRIPTION) as unfinished:
            export_model(predictor, folds, unfinished)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {reason(error)}") from error
    print(f"{folder / DESCRIPTION} says how to run what is beside it; docs/export.md has an example")


def parser() -> argparse.ArgumentParser:
    """What reads the flags."""
    flags = argparse.ArgumentParser(
        prog="nmsw_export",
        description="Write both branches of an NMSW model as ONNX and as OpenVINO IR, with a JSON of all that is "
        "needed to run them without PyTorch. Needs the extra export.",
    )
    add: Any = flags.add_argument
    add("-m", required=True, metavar="FOLDER", help="of the model, which holds fold_0 and so on")
    add("-o", required=True, metavar="FOLDER", help="to write into, new or empty")
    add("-f", nargs="+", metavar="FOLD", help="folds to export. Default: all that are trained")
    add("-chk", default="checkpoint_final.pth", help="checkpoint of a fold. Default: checkpoint_final.pth")
    add("-k", help="number of patches that the JSON asks for: see nmsw_predict. Default: as the model is set")
    add("--max_drop", type=float, default=DEFAULT_MAX_DROP, help="see nmsw_predict")
    add(TRUST_FLAG, action="store_true", help="see nmsw_predict")
    return flags
