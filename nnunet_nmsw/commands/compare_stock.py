"""`nmsw_compare` of stock models: what `nmsw_predict` makes of them, against their sliding windows."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from nnunet_nmsw.commands.find import find_folds, find_model, is_set
from nnunet_nmsw.commands.images import case_name, find_cases, find_references
from nnunet_nmsw.commands.predict import make_predictor
from nnunet_nmsw.commands.predict_flags import read_flags
from nnunet_nmsw.commands.shared_flags import measuring, mirrorings
from nnunet_nmsw.documents import read_json
from nnunet_nmsw.evaluation.about import about_stock
from nnunet_nmsw.evaluation.methods import build_stock_methods, reference_method
from nnunet_nmsw.evaluation.models import Case
from nnunet_nmsw.evaluation.stock_models import StockModels
from nnunet_nmsw.evaluation.store import Comparison
from nnunet_nmsw.files import sha256_of
from nnunet_nmsw.flags import FLOAT32, PYTORCH
from nnunet_nmsw.inference.device import prepare_device
from nnunet_nmsw.inference.files import FilesPredictor
from nnunet_nmsw.inference.model_folder import checked_folder
from nnunet_nmsw.inference.openvino_branches import backend_named
from nnunet_nmsw.inference.set_calibration import SCHEMA
from nnunet_nmsw.inference.set_members import ModelFolder

LOADING = (
    "A set loads its fine models for each image, one after the other, and preprocesses the image for them. Both are in "
    "its seconds of the network. The stock models are loaded before they are timed, and their seconds of the network "
    "hold the sliding windows alone."
)
"""What a reader of the seconds has to know."""

DEFAULT_NUM_PATCHES = ("5%", "10%", "20%", "all")


def stock_comparison(args: argparse.Namespace) -> Comparison:
    """The comparison that the flags ask for.

    Args:
        args: of `nmsw_compare`.

    Raises:
        UserError: a model, an image or its labels are missing, or do not fit.
    """
    backend_named(args.backend, FLOAT32, prepare_device(args.device))  # raises where one is not there
    of_prediction = read_flags(_of_prediction(args))
    folder = find_model(of_prediction).resolve()
    images = find_cases(args.i, folder)
    paths = [checked_folder(path) for path in (args.global_model, *args.local_model)]
    with contextlib.redirect_stdout(None):  # which folds and classes there are is told once, below
        members = tuple(ModelFolder(path, tuple(find_folds(path, args.f, args.chk))) for path in paths)
    num_patches = list(dict.fromkeys(args.k or [*DEFAULT_NUM_PATCHES, *(["auto"] if args.calibration else [])]))
    methods = build_stock_methods(num_patches, mirrorings(args), args.backend)
    nmsw = StockModels(
        "nmsw",
        members,
        is_set(of_prediction),
        args.chk,
        partial(made, of_prediction, folder),
        args.trust_model,
        of_prediction.orientation,
        args.explore,
        args.calibration,
    )
    # Raises where models do not fit.
    make_predictor(of_prediction, folder, find_folds(folder, args.f, args.chk), args.device)
    ending = nmsw.json("dataset.json")["file_ending"]
    names = [case_name(files, ending) for files in images]
    if args.labels is None:
        references = [args.o / "methods" / reference_method(methods).key / (name + ending) for name in names]
    else:
        references = find_references("--labels", args.labels, images, folder)
    cases = [
        Case(name, 0, tuple(files), str(reference), args.labels is not None)
        for name, files, reference in zip(names, images, references, strict=True)
    ]
    return Comparison(
        args.o,
        "stock models",
        [dataclasses.replace(nmsw, role="baseline"), nmsw],
        methods,
        cases,
        **measuring(args),
        about=about_stock(nmsw, cases, args.labels),
        remarks=tuple(_remarks(nmsw, names, bool(args.timed_cases))),
        conditions={
            "-i": str(Path(args.i).resolve()),
            "--labels": args.labels and list(map(sha256_of, references)),
            "--explore": args.explore,
            "--orientation": of_prediction.orientation,
            "--calibration": args.calibration and sha256_of(args.calibration),
        },
    )


def _remarks(models: StockModels, names: Sequence[str], timed: bool) -> Iterator[str]:
    """What a reader of the report has to know."""
    if models.is_set and timed:
        yield LOADING
    if models.calibration is not None:
        fitted = set(read_json(models.calibration, SCHEMA).get("case_names", [])) & set(names)
        if fitted:
            yield (
                f"The fusion and K = auto were fitted to {len(fitted)} images of these names, so that they look better "
                f"than they are: {', '.join(sorted(fitted)[:10])}."
            )


def made(of_prediction: argparse.Namespace, folder: Path, device: str, mirrored: bool, backend: str) -> FilesPredictor:
    """What predicts with all models; see `StockModels.make`.

    Args:
        of_prediction: flags of `nmsw_predict`.
        folder: of the model whose labels the predictions have.
        device: to predict on.
        mirrored: average over mirrorings.
        backend: computes the networks.
    """
    flags = argparse.Namespace(**{**vars(of_prediction), "disable_tta": not mirrored, "backend": backend})
    with contextlib.redirect_stdout(None):
        return make_predictor(flags, folder, find_folds(folder, flags.f, flags.chk), device)


def _of_prediction(args: argparse.Namespace) -> list[str]:
    """Flags of `nmsw_predict` with the same models."""
    words = ["-i", args.i, "-o", str(args.o), "-chk", args.chk, "-device", args.device, "--backend", PYTORCH]
    words += ["--global_model", str(args.global_model), "--local_model", *map(str, args.local_model)]
    words += ["--explore", str(args.explore), "--disable_progress_bar"]
    words += ["-f", *args.f] if args.f else []
    words += ["--calibration", str(args.calibration)] if args.calibration else []
    words += ["--orientation", args.orientation] if args.orientation else []
    words += ["-k", "auto"] if "auto" in (args.k or []) else []  # which is checked as there
    return [*words, *(["--trust_model"] if args.trust_model else [])]
