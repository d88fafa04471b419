"""The command `nmsw_predict`: the flags of `nnUNetv2_predict`, and how many patches to spend."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_nmsw.commands.find import find_folds, find_model, is_set
from nnunet_nmsw.commands.images import Images, case_name, find_images, still_to_do
from nnunet_nmsw.commands.predict_flags import read_flags
from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.files import remove_leftovers
from nnunet_nmsw.flags import parse_memory
from nnunet_nmsw.inference.device import prepare_device
from nnunet_nmsw.inference.files import FilesPredictor
from nnunet_nmsw.inference.loading import load_model
from nnunet_nmsw.inference.memory import check_least
from nnunet_nmsw.inference.model_folder import (
    checked_folder,
    read_configuration,
    read_document,
)
from nnunet_nmsw.inference.orientation import orient
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
        prepare_device(args.device, args.not_on_device)
    folder = find_model(args).resolve()
    folds = find_folds(folder, args.f, args.chk)
    if args.calibrate is not None:
        from nnunet_nmsw.commands.calibrate_set import calibrate_set  # of what predictions do not import

        with in_one_line(f"cannot write {args.o}, or temporary files"):
            calibrate_set(args, folder, lambda: make_predictor(args, folder, folds, args.device))
        return
    images = find_images(args.i, args.o, folder)
    if images.is_file:
        _check_one_image(args)
    else:
        which = (args.part_id, args.num_parts, not args.continue_prediction, args.save_probabilities)
        images = images._replace(cases=still_to_do(images, *which, folder))
    forget_others(images.cases)
    if args.max_memory is not None and images.cases:
        _check_memory(args, images.cases, folder, folds[0])
    make = partial(make_predictor, args, folder, folds)
    predictor = make("cpu" if args.engine == "ray" else args.device)
    _check_previous_stage(images, predictor, args.prev_stage_predictions)
    engine: FilesPredictor = predictor
    if args.engine == "ray":
        engine = for_ray(predictor, args, make)
    elif images.cases:
        predictor.bound_memory(images.cases, args.npp)
    with in_one_line(f"cannot write into {args.o}"):
        if images.is_file:
            remove_leftovers(Path(args.o).absolute().parent)
            if not (args.continue_prediction and _is_there(images, args.save_probabilities)):
                engine.predict_file(args.i, args.o, args.save_probabilities, args.prev_stage_predictions)
            return
        remove_leftovers(Path(args.o))
        engine.predict_from_files(
            args.i[0],
            args.o,
            save_probabilities=args.save_probabilities,
            overwrite=not args.continue_prediction,
            num_processes_preprocessing=args.npp,
            num_processes_segmentation_export=args.nps,
            num_parts=args.num_parts,
            part_id=args.part_id,
            folder_with_segs_from_prev_stage=args.prev_stage_predictions,
        )
        remove_leftovers(Path(args.o))  # of Ray's workers that were killed meanwhile


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Say in one line what the system does not allow, but for errors of cases, which are reported with the case."""
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed
        raise
    except OSError as error:
        raise UserError(f"{what}: {reason(error)}") from error


def for_ray(predictor: FilesPredictor, args: argparse.Namespace, make: Callable[[str], FilesPredictor]) -> RayPredictor:
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


def make_predictor(args: argparse.Namespace, folder: Path, folds: list[int | str], device: str) -> FilesPredictor:
    """A predictor as the flags ask for, with its model."""
    of_stock: dict[str, Any] = {
        "use_mirroring": not args.disable_tta,
        "perform_everything_on_device": not args.not_on_device,
        "device": prepare_device(device, args.not_on_device),
        "verbose": args.verbose,
        "verbose_preprocessing": args.verbose,
        "allow_tqdm": not args.disable_progress_bar,
    }
    of_both: dict[str, Any] = {"num_patches": args.k, "save_patches": args.save_patches, **of_stock}
    of_both |= {"precision": args.precision, "trust_model": args.trust_model, "backend": args.backend}
    of_nmsw = {**of_both, "max_drop": args.max_drop, "max_memory": args.max_memory and parse_memory(args.max_memory)}
    predictor: FilesPredictor
    coarse = None
    if is_set(args):
        if args.save_probabilities:
            raise UserError("a set of models gives labels alone: leave out --save_probabilities")
        # Of what other predictions do not import.
        from nnunet_nmsw.inference.model_set import ModelSetPredictor
        from nnunet_nmsw.inference.set_members import ModelFolder

        fine = [ModelFolder(path, tuple(find_folds(path, args.f, args.chk))) for path in args.local_model]
        predictor = ModelSetPredictor(fine, explore=args.explore, calibration=args.calibration, **of_both)
    elif args.explore or args.calibration is not None:
        flag = "--explore" if args.explore else "--calibration"
        raise UserError(f"{flag} is for a set of models: several with --local_model, or one with labels of its own")
    elif args.global_model is not None:
        of_global = checked_folder(args.global_model)
        coarse = nnUNetPredictor(**of_stock)
        load_model(coarse, of_global, find_folds(of_global, args.f, args.chk), args.chk, args.trust_model)
        predictor = TwoModelPredictor(coarse, **of_nmsw)
    else:
        predictor = NMSWPredictor(**of_nmsw)
    load_model(predictor, folder, folds, args.chk, args.trust_model)
    if args.orientation is not None:
        for of_image in (predictor, *([] if coarse is None else [coarse])):
            orient(of_image, args.orientation)
    return predictor


def _is_there(images: Images, with_probabilities: bool) -> bool:
    """Whether the labels of one image are there, with what is asked for beside them."""
    return all(map(os.path.isfile, [images.output, *([images.probabilities] if with_probabilities else [])]))


def _check_one_image(args: argparse.Namespace) -> None:
    if args.engine == "ray":
        raise UserError("--engine ray shares out a folder, and -i names one image: leave it out, or give a folder")
    if args.num_parts != 1:
        raise UserError("-num_parts shares out a folder, and -i names one image: leave it out, or give a folder")


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


def _check_previous_stage(images: Images, predictor: FilesPredictor, given: str | None) -> None:
    previous_stage = predictor.configuration_manager.previous_stage_name
    if previous_stage is None:
        if given is not None:
            raise UserError("-prev_stage_predictions is for the cascade, and this configuration has no previous stage")
        return
    if given is None:
        raise UserError(
            f"the cascade needs the predictions of {previous_stage} for these images: make them with that "
            "configuration's model and give their folder with -prev_stage_predictions"
        )
    if images.is_file:
        if not os.path.isfile(given):
            raise UserError(f"-prev_stage_predictions {given} is no file: give the {previous_stage} of this image")
        return
    ending = predictor.dataset_json["file_ending"]
    for files in images.cases:
        name = case_name(files, ending) + ending
        if not os.path.isfile(os.path.join(given, name)):
            raise UserError(f"-prev_stage_predictions {given} has no {name}, the {previous_stage} of an input image")


if __name__ == "__main__":
    main()
