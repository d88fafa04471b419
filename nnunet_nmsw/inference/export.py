"""From labels of the cropped image to a file, and when labels can be had without a volume of logits.

Tensor suffixes: Z Y X axes of the cropped image, transposed as the plans say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
    export_prediction_from_logits,
)
from nnunetv2.preprocessing.resampling.default_resampling import ANISO_THRESHOLD, determine_do_sep_z_and_axis
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import check_whole
from nnunet_nmsw.inference.resampling import is_known
from nnunet_nmsw.volume.interpolation import Axis, linear_axis, nearest_axis
from nnunet_nmsw.volume.labels import LabelEncoding

PLAIN = "labels"
"""What files are named while they are written."""


def can_stream(configuration: ConfigurationManager) -> bool:
    """Whether the plans resample probabilities in a way that `resampling_axes` knows: linearly."""
    linear = configuration.configuration["resampling_fn_probabilities_kwargs"].get("order") == 1
    return linear and is_known(configuration, "probabilities")


def reason_for_logits(
    configuration: ConfigurationManager, save_probabilities: bool, for_next_stage: bool
) -> str | None:
    """Why volumes of logits are needed; None where they are not."""
    if save_probabilities:
        return "probabilities are asked for"
    if for_next_stage:
        return "the cascade's next stage needs them"
    if not can_stream(configuration):
        function = configuration.configuration["resampling_fn_probabilities"]
        return f"the plans resample probabilities with {function} and settings of their own"
    return None


def resampling_axes(
    plans: PlansManager, configuration: ConfigurationManager, properties: dict[str, Any], shape: Sequence[int]
) -> list[Axis]:
    """How nnU-Net's export resamples a preprocessed volume to the cropped image.

    Args:
        plans: the model's plans.
        configuration: one that `can_stream`.
        properties: nnU-Net's of the preprocessed image.
        shape: of the volume, without padding.
    """
    keywords = configuration.configuration["resampling_fn_probabilities_kwargs"]
    separate, separate_axis = determine_do_sep_z_and_axis(
        keywords.get("force_separate_z", False),
        configuration.spacing,
        [properties["spacing"][axis] for axis in plans.transpose_forward],
        keywords.get("separate_z_anisotropy_threshold", ANISO_THRESHOLD),
    )
    target = properties["shape_after_cropping_and_before_resampling"]
    return [
        (nearest_axis if separate and axis == separate_axis else linear_axis)(int(n), int(m))
        for axis, (n, m) in enumerate(zip(shape, target, strict=True))
    ]


def in_image(
    decisions_ZYX: Tensor, plans: PlansManager, labels: LabelManager, properties: dict[str, Any]
) -> np.ndarray:
    """Labels of the whole image, in the axis order of nnU-Net's reader.

    Args:
        decisions_ZYX: labels of the cropped image; of regions their numbers, see `LabelEncoding.decided`.
        plans: the model's plans.
        labels: of the dataset.
        properties: nnU-Net's of the preprocessed image.
    """
    dtype = np.uint8 if len(labels.foreground_labels) < 255 else np.uint16
    image = np.zeros(properties["shape_before_cropping"], dtype)
    segmentation = LabelEncoding.of(labels).labels_of(decisions_ZYX).numpy().astype(dtype)
    image = insert_crop_into_image(image, segmentation, properties["bbox_used_for_cropping"])
    transposed: np.ndarray = image.transpose(plans.transpose_backward)
    return transposed


def write_labels(segmentation: np.ndarray, file: Path, plans: PlansManager, properties: dict[str, Any]) -> None:
    """Write labels with nnU-Net's writer, and see that they are whole.

    Writers of NIfTI take a name such as `a.nii.nii.gz` for another one, so files get their names afterwards.

    Args:
        segmentation: of `in_image`.
        file: in a folder that `written_whole` gave.
        plans: the model's plans.
        properties: nnU-Net's of the preprocessed image.

    Raises:
        OSError: it cannot be written; and whatever nnU-Net's writer raises.
    """
    ending = ending_of(file.name, plans)
    with plain_names(file.parent, file.name.removesuffix(ending)) as plain:
        plans.image_reader_writer_class().write_seg(segmentation, f"{plain}{ending}", properties)
        check_whole(f"{plain}{ending}")


def write_logits(
    logits: np.ndarray,
    folder: Path,
    name: str,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset: dict[str, Any],
    properties: dict[str, Any],
    save_probabilities: bool = False,
) -> None:
    """Write the labels of a volume of logits by nnU-Net's export, and probabilities where they are asked for.

    Args:
        logits: shape C, D, H, W.
        folder: that `written_whole` gave.
        name: of the case.
        plans: the model's.
        configuration: the model's.
        dataset: the model's dataset.json.
        properties: nnU-Net's of the preprocessed image.
        save_probabilities: write these, too.

    Raises:
        OSError: it cannot be written; and whatever nnU-Net's writer raises.
    """
    ending = dataset["file_ending"]
    with plain_names(folder, name) as plain:
        export_prediction_from_logits(
            logits,
            properties,
            configuration,
            plans,
            dataset,
            str(plain),
            save_probabilities,
            num_threads_torch=torch.get_num_threads(),  # of the whole process, hence as they are
        )
        check_whole(f"{plain}{ending}")


def labels_from_logits(
    logits: np.ndarray,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset: dict[str, Any],
    properties: dict[str, Any],
    with_probabilities: bool = False,
) -> Any:
    """Labels of the image by nnU-Net's export, and where they are asked for, probabilities.

    Args:
        logits: shape C, D, H, W.
        plans: the model's.
        configuration: the model's.
        dataset: the model's dataset.json.
        properties: nnU-Net's of the preprocessed image.
        with_probabilities: give these, too.
    """
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        logits,
        plans,
        configuration,
        plans.get_label_manager(dataset),
        properties,
        with_probabilities,
        torch.get_num_threads(),  # of the whole process, hence as they are
    )


@contextmanager
def plain_names(folder: Path, name: str) -> Iterator[Path]:
    """Give a plain name, without ending, for what is written, and rename all that has it to `name` at the end."""
    within = folder / PLAIN
    within.mkdir()
    yield within / PLAIN
    for file in within.iterdir():
        file.rename(folder / (name + file.name.removeprefix(PLAIN)))
    within.rmdir()


def endings_of_one_image(plans: PlansManager) -> list[str]:
    """Endings of files that a model's reader takes where the files of one image are named.

    Raises:
        UserError: it takes none.
    """
    reader = plans.image_reader_writer_class
    if "tif" in reader.__name__.lower():
        raise UserError(
            f"the model reads images with {reader.__name__}, which looks for their spacing in a JSON file beside them: "
            "give folders with -i and -o"
        )
    known = list(reader().supported_file_endings)
    # SimpleITK reads and writes this, too, though nnU-Net's reader does not list it.
    return known if ".nii" in known or not issubclass(reader, SimpleITKIO) else [*known, ".nii"]


def ending_in(name: str, endings: Sequence[str]) -> str | None:
    """The longest of the endings that a name has; None where it has none of them."""
    return max((ending for ending in endings if name.endswith(ending)), key=len, default=None)


def ending_of(name: str, plans: PlansManager) -> str:
    """The ending of a label file that nnU-Net's writer of the plans knows, the longest that fits."""
    endings = [e for e in plans.image_reader_writer_class().supported_file_endings if name.lower().endswith(e.lower())]
    return name[-len(max(endings, key=len)) :] if endings else Path(name).suffix
