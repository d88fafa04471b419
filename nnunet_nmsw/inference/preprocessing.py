"""Cases of a prediction, preprocessed while others are predicted.

In threads of this process: reading, decompressing and resampling leave Python's lock alone, and a process of its own
would take seconds and half a gigabyte to import nnU-Net.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from nnunetv2.inference.data_iterators import PreprocessAdapter, PreprocessAdapterFromNpy
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_nmsw.console import printable
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.cases import Case, Cases, in_order
from nnunet_nmsw.inference.reading import check_file, forget_others, read_image, read_segmentation
from nnunet_nmsw.inference.resampling import InferenceConfiguration


class OfPlans(Protocol):
    """What a case is preprocessed by: nnU-Net's predictors are such, and fine models of a set, not loaded yet."""

    @property
    def device(self) -> torch.device:
        """To resample on."""
        ...

    @property
    def verbose_preprocessing(self) -> bool:
        """Tell of it."""
        ...

    @property
    def plans_manager(self) -> PlansManager:
        """The model's plans."""
        ...

    @property
    def configuration_manager(self) -> ConfigurationManager:
        """The model's configuration."""
        ...

    @property
    def dataset_json(self) -> dict[str, Any]:
        """The model's dataset.json."""
        ...


def preprocessed_cases(
    predictor: OfPlans,
    images: list[list[str]],
    previous_stage: list[str] | None,
    outputs: list[str] | None,
    num_threads: int,
) -> Cases:
    """Cases in their order, preprocessed as a predictor's plans say.

    Args:
        predictor: whose cases they are.
        images: files by case and channel.
        previous_stage: for the cascade, the file of each case.
        outputs: for each case, the file to be written, without ending.
        num_threads: that preprocess, see `in_order`.
    """
    previous: list[Any] = previous_stage if previous_stage is not None else [None] * len(images)
    files: list[Any] = outputs if outputs is not None else [None] * len(images)
    of_cases = zip(images, previous, files, strict=True)
    return in_order([partial(preprocessed, predictor, *of_case) for of_case in of_cases], num_threads)


def preprocessed_arrays(
    predictor: OfPlans,
    images: list[np.ndarray],
    properties: list[dict[str, Any]],
    previous_stage: list[np.ndarray | None],
    outputs: list[str | None],
    num_threads: int,
) -> Cases:
    """Cases from arrays in their order: for each the arguments of `preprocessed_array`; threads as in `in_order`."""
    of_cases = zip(images, properties, previous_stage, outputs, strict=True)
    return in_order([partial(preprocessed_array, predictor, *of_case) for of_case in of_cases], num_threads)


def preprocessed(predictor: OfPlans, images: list[str], previous_stage: str | None, output: str | None) -> Case:
    """A case from files; with `error` where they cannot be read or preprocessed.

    Args:
        predictor: whose case it is.
        images: files by channel.
        previous_stage: for the cascade, the file of its labels.
        output: the file to be written, without ending.
    """
    what = printable(f"cannot preprocess {', '.join(images)}")
    try:
        check_names(images, output)
        if not is_stock(predictor.configuration_manager.preprocessor_class(verbose=False)):
            preprocessor = predictor.configuration_manager.preprocessor_class(verbose=predictor.verbose_preprocessing)
            forget_others([])  # such a preprocessor reads by itself
            for file in [*images, *([previous_stage] if previous_stage else [])]:
                check_file(file)
            arguments = (predictor.plans_manager, predictor.dataset_json, _faster(predictor, True))
            case = next(PreprocessAdapter([images], [previous_stage], preprocessor, [output], *arguments))
            return _contiguous(case)
        image, properties = read_images(predictor, images)
        previous = None if previous_stage is None else read_labels(predictor, previous_stage, image.shape[1:])
        return preprocessed_array(predictor, image, properties, previous, output, what)
    except Exception as error:  # noqa: BLE001 - `Failures` tells apart what is the case's fault
        return {"error": error, "what": what}


def preprocessed_array(
    predictor: OfPlans,
    image: np.ndarray,
    properties: dict[str, Any],
    previous_stage: np.ndarray | None,
    output: str | None,
    what: str = "cannot preprocess an array",
) -> Case:
    """A case from an array as nnU-Net's reader gives it; with `error` where it cannot be preprocessed.

    Args:
        predictor: whose case it is.
        image: shape C, Z, Y, X.
        properties: nnU-Net's of it; not changed.
        previous_stage: for the cascade, its labels, shape 1, Z, Y, X.
        output: the file to be written, without ending.
        what: cannot be done, for messages.
    """
    try:
        check_channels(predictor, image, output or "an array")
        case = next(
            PreprocessAdapterFromNpy(
                [image],
                [previous_stage],
                [deepcopy(properties)],
                [output],
                predictor.plans_manager,
                predictor.dataset_json,
                _faster(predictor, previous_stage is not None),
                verbose=predictor.verbose_preprocessing,
            )
        )
    except Exception as error:  # noqa: BLE001 - see above
        return {"error": error, "what": what}
    return _contiguous(case)


def read_images(predictor: OfPlans, files: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """The channels of an image, by nnU-Net's reader, and its properties. Warns of voxels that are no numbers.

    Raises:
        UserError: a file cannot be read, is damaged, or holds something else than one channel for the model.
    """
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties, not_finite = read_image(reader, files)
    check_channels(predictor, image, ", ".join(files))
    axes = len(properties.get("sitk_stuff", {}).get("spacing", image.shape[1:]))
    if axes > 3:  # which nnU-Net's reader takes for channels, and its writer does not know
        raise UserError(f"cannot use {', '.join(files)}: it has {axes} axes, give each channel as a file of three")
    # The sum of numbers is a number, unless it is too large; and it takes no memory.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(image.sum(dtype=np.float64))
    if suspicious:
        not_finite = max(not_finite, image.size - int(np.count_nonzero(np.isfinite(image))))
    if not_finite:
        what = f"WARNING: {', '.join(files)} has {not_finite:,} voxels that are no numbers or infinite"
        print(printable(f"{what}: the prediction may be worthless"), flush=True)
    return image, properties


def check_channels(predictor: OfPlans, image: np.ndarray, what: str) -> None:
    """See that an image has the channels that a model takes, and three axes.

    Args:
        predictor: of the model.
        image: of the shape that it has.
        what: it is, for the message.

    Raises:
        UserError: it does not.
    """
    channels = len(predictor.dataset_json.get("channel_names") or predictor.dataset_json["modality"])
    if image.ndim != 4 or len(image) != channels:
        raise UserError(
            f"cannot use {what}: its shape is {' × '.join(map(str, image.shape))}, and the model takes {channels} "
            "channel(s) of three axes"
        )


def read_labels(predictor: OfPlans, file: str, shape: Sequence[int]) -> np.ndarray:
    """Labels of an image, such as those of the cascade's previous stage, shape 1, Z, Y, X.

    Args:
        predictor: whose reader to use.
        file: of the labels.
        shape: of the image, Z, Y, X.

    Raises:
        UserError: the file cannot be read, is damaged, or has another size than the image.
    """
    reader = predictor.plans_manager.image_reader_writer_class()
    labels = read_segmentation(reader, file)
    if labels.shape[1:] != tuple(shape):
        sizes = [" × ".join(map(str, of)) for of in (labels.shape[1:], shape)]
        raise UserError(f"cannot use {file}: it has {sizes[0]} voxels, and its image has {sizes[1]}")
    return labels


def check_names(images: Sequence[str], output: str | None) -> None:
    """See that files can be named to libraries, and that the output lies where it should.

    Raises:
        UserError: a name is not UTF-8, which readers do not survive, or the case has no name for a file.
    """
    for name in (*images, output or ""):
        if name != printable(name):
            raise UserError(f"cannot read {name}: its name is not UTF-8, rename it")
    if output is not None and os.path.basename(output) in ("", ".", ".."):
        case = os.path.basename(output)
        raise UserError(f'cannot use {", ".join(images)}: no file can have the name of its case, "{case}"; rename it')


def is_stock(preprocessor: DefaultPreprocessor) -> bool:
    """Whether a preprocessor does with a case what nnU-Net's does."""
    return all(
        getattr(type(preprocessor), name) is getattr(DefaultPreprocessor, name) for name in ("run_case", "run_case_npy")
    )


def _faster(predictor: OfPlans, keeps_labels: bool) -> Any:
    """The configuration with a faster resampling of the same result."""
    return InferenceConfiguration(predictor.configuration_manager, predictor.device, keeps_labels)


def _contiguous(case: Case) -> Case:
    case["data"] = case["data"].to(dtype=torch.float32, memory_format=torch.contiguous_format)
    return case
