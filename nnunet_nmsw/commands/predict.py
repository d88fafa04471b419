"""The command `nmsw_predict`: the flags of `nnUNetv2_predict`, and how many patches to spend."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_nmsw.commands.find import find_cases, find_folds, find_model
from nnunet_nmsw.commands.predict_flags import read_flags
from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.files import remove_leftovers, written_whole
from nnunet_nmsw.flags import parse_memory
from nnunet_nmsw.inference.device import prepare_device
from nnunet_nmsw.inference.loading import load_model
from nnunet_nmsw.inference.memory import check_least
from nnunet_nmsw.inference.model_folder import (
    checked_folder,
    read_configuration,
    read_document,
)
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.ray_engine import RayPredictor, Workers
from nnunet_nmsw.inference.reading import forget_others
from nnunet_nmsw.inference.two_models import TwoModelPredictor
from nnunet_nmsw.model.plans import settings_of
from nnunet_nmsw.model.safe_loading import configuration_of, read_checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict a folder of images from the command line."""
    args = read_flags(arguments)
    if args.engine != "ray":  # whose workers have devices of their own
        prepare_device(args.device)
    folder = find_model(args).resolve()
    folds = find_folds(folder, args.f, args.chk)
    cases = find_cases(args.i, folder)
    forget_others(cases)
    _check_output(args.o)
    if args.max_memory is not None:
        _check_memory(args, cases, folder, folds[0])
    make = partial(make_predictor, args, folder, folds)
    predictor = make("cpu" if args.engine == "ray" else args.device)
    _check_previous_stage(cases, predictor, args.prev_stage_predictions)
    engine: nnUNetPredictor = predictor
    if args.engine == "ray":
        engine = for_ray(predictor, args, make)
    else:
        predictor.bound_memory(cases, args.npp)
    try:
        remove_leftovers(Path(args.o))
        engine.predict_from_files(
            args.i,
            args.o,
            save_probabilities=args.save_probabilities,
            overwrite=not args.continue_prediction,
            num_processes_preprocessing=args.npp,
            num_processes_segmentation_export=args.nps,
            num_parts=args.num_parts,
            part_id=args.part_id,
            folder_with_segs_from_prev_stage=args.prev_stage_predictions,
        )
    except BrokenPipeError:  # nobody reads what is printed
        raise
    except OSError as error:  # not of a case: these are reported with the case
        raise UserError(f"cannot write into {args.o}: {reason(error)}") from error


def for_ray(predictor: NMSWPredictor, args: argparse.Namespace, make: Callable[[str], NMSWPredictor]) -> RayPredictor:
    """A predictor of the same model whose work is done by Ray's workers."""
    workers = Workers(
        partial(make, args.device), args.ray_address, args.device == "cuda", args.cores_per_worker, args.verbose
    )
    by_ray = RayPredictor(workers, device=torch.device("cpu"), allow_tqdm=not args.disable_progress_bar)
    by_ray.manual_initialization(
        predictor.network,
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.list_of_parameters,
        predictor.dataset_json,
        predictor.trainer_name,
        predictor.allowed_mirroring_axes,
    )
    return by_ray


def make_predictor(args: argparse.Namespace, folder: Path, folds: list[int | str], device: str) -> NMSWPredictor:
    """A predictor as the flags ask for, with its model."""
    of_stock: dict[str, Any] = {
        "use_mirroring": not args.disable_tta,
        "perform_everything_on_device": not args.not_on_device,
        "device": prepare_device(device),
        "verbose": args.verbose,
        "verbose_preprocessing": args.verbose,
        "allow_tqdm": not args.disable_progress_bar,
    }
    of_nmsw: dict[str, Any] = {"num_patches": args.k, "save_patches": args.save_patches, **of_stock}
    of_nmsw |= {"max_drop": args.max_drop, "max_memory": args.max_memory and parse_memory(args.max_memory)}
    of_nmsw |= {"precision": args.precision, "trust_model": args.trust_model, "backend": args.backend}
    if args.global_model is None:
        predictor = NMSWPredictor(**of_nmsw)
    else:
        of_global = checked_folder(args.global_model)
        coarse = nnUNetPredictor(**of_stock)
        load_model(coarse, of_global, find_folds(of_global, args.f, args.chk), args.chk, args.trust_model)
        predictor = TwoModelPredictor(coarse, **of_nmsw)
    load_model(predictor, folder, folds, args.chk, args.trust_model)
    return predictor


def _check_output(folder: str) -> None:
    """See that files can be written into a folder, or into the one that it will be made in.

    Raises:
        UserError: they cannot.
    """
    there = Path(os.path.abspath(folder))
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise UserError(f"-o {folder}: {there} is a file, give a folder")
    try:
        with written_whole(there):
            pass
    except OSError as error:
        raise UserError(f"-o {folder} cannot be written into: {error.strerror or reason(error)}") from error


def _check_memory(args: argparse.Namespace, cases: list[list[str]], folder: Path, fold: int | str) -> None:
    """See that memory suffices but for what the network itself takes, which is known when it is loaded.

    Raises:
        UserError: it does not.
    """
    file = folder / f"fold_{fold}" / args.chk
    name = configuration_of(read_checkpoint(file, args.trust_model, mmap=True), file)
    resolved, dataset = read_configuration(folder, name), read_document(folder, "dataset.json")
    plans = PlansManager(read_document(folder, "plans.json"))
    configuration = plans.get_configuration(name)
    channels = determine_num_input_channels(plans, configuration, dataset)
    classes = plans.get_label_manager(dataset).num_segmentation_heads
    factor = settings_of(resolved).downsampling_factor
    check_least(parse_memory(args.max_memory), cases, plans, configuration, channels, classes, factor)


def _check_previous_stage(cases: list[list[str]], predictor: NMSWPredictor, folder: str | None) -> None:
    previous_stage = predictor.configuration_manager.previous_stage_name
    if previous_stage is None:
        if folder is not None:
            raise UserError("-prev_stage_predictions is for the cascade, and this configuration has no previous stage")
        return
    if folder is None:
        raise UserError(
            f"the cascade needs the predictions of {previous_stage} for these images: make them with that "
            "configuration's model and give their folder with -prev_stage_predictions"
        )
    ending = predictor.dataset_json["file_ending"]
    for files in cases:
        name = os.path.basename(files[0])[: -len(f"_0000{ending}")] + ending
        if not os.path.isfile(os.path.join(folder, name)):
            raise UserError(f"-prev_stage_predictions {folder} has no {name}, the {previous_stage} of an input image")


if __name__ == "__main__":
    main()
