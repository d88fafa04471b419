"""`nmsw_predict --calibrate`: a set of stock models, and labelled images."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from nnunet_nmsw.commands.find import is_set
from nnunet_nmsw.commands.images import case_name, check_output, find_cases, find_references
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.evaluation.reference import reference_labels
from nnunet_nmsw.evaluation.set_calibration import Labelled, calibrate
from nnunet_nmsw.files import remove_leftovers, temporary_folder, write_json
from nnunet_nmsw.inference.files import FilesPredictor
from nnunet_nmsw.inference.model_folder import read_document
from nnunet_nmsw.inference.model_set import ModelSetPredictor
from nnunet_nmsw.inference.set_calibration import document_of
from nnunet_nmsw.inference.set_cases import AS_READ, COARSE_LOGITS


def calibrate_set(args: argparse.Namespace, model_folder: Path, make: Callable[[], FilesPredictor]) -> None:
    """Calibrate a set of models, and write the file that `--calibration` takes.

    Args:
        args: flags of `nmsw_predict`.
        model_folder: of the coarse model.
        make: makes the predictor of the set.

    Raises:
        UserError: a flag, a file or a model does not fit; or an image or its labels cannot be read.
    """
    if not is_set(args):
        raise UserError("--calibrate is for a set of models: several with --local_model, or one with labels of its own")
    if not args.o.endswith(".json") or os.path.isdir(args.o):
        raise UserError(f"-o {args.o}: with --calibrate, give the file to write, such as calibration.json")
    if len(args.i) > 1 or os.path.isfile(args.i[0]):
        raise UserError("--calibrate takes a folder of images with -i")
    check_output(os.path.dirname(args.o) or ".")
    ending = read_document(model_folder, "dataset.json")["file_ending"]
    images = find_cases(args.i[0], model_folder)
    names = [case_name(files, ending) for files in images]
    references = find_references("--calibrate", args.calibrate, images, model_folder)
    predictor = make()
    assert isinstance(predictor, ModelSetPredictor)
    remove_leftovers(Path(tempfile.gettempdir()))
    with temporary_folder() as folder:  # images of a whole set are more than a machine's memory
        cases = _labelled(predictor, names, images, references, folder)
        shared = {number for model in predictor.fine_models for number in model.labels.coarse}
        if not any(np.isin(labelled.reference, list(shared)).any() for labelled in cases):
            raise UserError(f"--calibrate {args.calibrate}: no label is of a class that a model of --local_model has")
        for number, labelled in enumerate(cases):
            logits_Cdhw = predictor.coarse_logits(labelled.case).half()  # as nnU-Net gives them
            kept = _mapped(folder / f"logits_{number}.npy", logits_Cdhw.numpy())
            labelled.case[COARSE_LOGITS] = torch.from_numpy(kept)
        found = calibrate(predictor, cases, args.max_drop, lambda line: print(line, flush=True))
    gained = None
    if found.left_out:
        gains = np.subtract(found.left_out, found.before)
        gained = 100 * float(np.nanmean(gains))  # some case has a class
        print(f"Left-out cases gain {gained:+.1f} Dice points by the fusion, over {np.isfinite(gains).sum()} cases")
    else:
        print("What is gained on left-out cases needs a second case")
    print(f"auto takes {found.patches:.1f} patches a case on these cases, which have set its threshold")
    objects = {
        name: found.reached[number]
        for name, number in predictor.dataset_json["labels"].items()
        if number in found.reached
    }
    print("These windows reach, of the objects that each fine model finds by its own sliding window:")
    for name, of_class in objects.items():
        print(f"  {name}: {of_class.reached} of {of_class.objects} objects, {of_class.percentage:.1f}% of their voxels")
    document = document_of(found.calibration, predictor.digest, predictor.fine_models)
    facts = {"cases": len(cases), "case_names": names, "gain_on_left_out_cases": gained}
    in_json = {name: of_class._asdict() for name, of_class in objects.items()}
    write_json(Path(args.o), {**document, **facts, "objects": in_json})
    print(f"Predict with --calibration {args.o}")


def _labelled(
    predictor: ModelSetPredictor,
    names: Sequence[str],
    images: Sequence[list[str]],
    references: Sequence[Path],
    folder: Path,
) -> list[Labelled]:
    """Preprocessed cases whose images and labels stay on the disk, in a folder."""
    cases = []
    of_cases = zip(names, references, predictor.preprocess(images, None, None, 0), strict=True)
    for number, (name, reference, case) in enumerate(of_cases):
        if "error" in case:
            raise UserError(f"{case['what']}: {case['error']}") from case["error"]
        labels = reference_labels(predictor, reference, case["data_properties"])
        image, properties = case[AS_READ]
        case[AS_READ] = _mapped(folder / f"image_{number}.npy", image), properties
        case["data"] = torch.from_numpy(_mapped(folder / f"volume_{number}.npy", case["data"].numpy()))
        cases.append(Labelled(name, case, _mapped(folder / f"labels_{number}.npy", labels)))
    return cases


def _mapped(file: Path, array: np.ndarray) -> np.ndarray:
    """The array, read from a new file where it is looked at. What is written to it stays in memory."""
    np.save(file, array)
    return np.load(file, mmap_mode="c")
