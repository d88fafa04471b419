"""A bound on the memory of the host: what a prediction takes, and how much of it may go on at a time within the bound.

All numbers are bytes but where they say otherwise.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import SimpleITK as sitk
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_nmsw.console import printable
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.flags import in_words
from nnunet_nmsw.inference.networks import Fold
from nnunet_nmsw.inference.planes import FEWEST_PLANES, bytes_of_plane
from nnunet_nmsw.inference.reading import HEADERS
from nnunet_nmsw.inference.resampling import is_known
from nnunet_nmsw.inference.volume import Share

OF_READING, OF_RESAMPLING = 16, 8
"""Most bytes at a time by channel and voxel of the image as read, and of the resampled volume, while a case is
preprocessed: measured 13.2 and 5.6 with one channel."""

OF_RESAMPLING_BY_NNUNET = 32
"""The same where the plans resample in another way: nnU-Net computes in double precision."""

OF_LABELS, OF_WRITING = 6, 6
"""Bytes by voxel of the image: labels of the case that is predicted, and those of one that is written."""

COPIES_OF_COARSE = 5
"""Of the coarse logits in float32, while mirrored predictions are added and then interpolated."""

SLACK = 256 << 20
"""For what is not counted, and for memory that the allocator keeps."""


class Size(NamedTuple):
    """Of a case.

    Attributes:
        case: one of its files.
        image: voxels of the image as it is read.
        volume: voxels by axis as the network sees it.
    """

    case: str
    image: int
    volume: tuple[int, ...]


class Needs(NamedTuple):
    """What the largest case takes.

    Attributes:
        preprocessing: while it is preprocessed.
        prediction: while it is predicted, without what follows here and without activations.
        writing: while its labels are written.
        plane: a plane of the volume, for the logits that are worked out.
        window: the logits of a window.
    """

    preprocessing: int
    prediction: int
    writing: int
    plane: int
    window: int


def size_of(files: Sequence[str], plans: PlansManager, configuration: ConfigurationManager) -> Size | None:
    """Size of a case by the header of its first file; where that has none, the image is read.

    None where it cannot be read: the case takes no memory, and its preprocessing will report why.

    Args:
        files: by channel.
        plans: the model's.
        configuration: the model's.
    """
    if files[0] != printable(files[0]):  # readers do not survive it
        return None
    try:
        if files[0].endswith(HEADERS):
            reader = sitk.ImageFileReader()
            reader.SetFileName(files[0])
            reader.ReadImageInformation()
            shape, spacing = reader.GetSize()[::-1], reader.GetSpacing()[::-1]
            shape, spacing = (1,) * (3 - len(shape)) + shape, (1.0,) * (3 - len(spacing)) + spacing
        else:
            image, properties = plans.image_reader_writer_class().read_images(list(files[:1]))
            shape, spacing = image.shape[1:], properties["spacing"]
    except Exception:  # noqa: BLE001 - readers raise errors of every type
        return None
    shape, spacing = ([of[axis] for axis in plans.transpose_forward] for of in (shape[-3:], spacing[-3:]))
    volume = compute_new_shape(shape, spacing, configuration.spacing)
    padded = tuple(max(int(n), p) for n, p in zip(volume, configuration.patch_size, strict=True))
    return Size(files[0], math.prod(shape), padded)


def needs_of(
    size: Size, configuration: ConfigurationManager, channels: int, classes: int, factor: Sequence[int]
) -> Needs:
    """What a case takes.

    Args:
        size: of the case.
        configuration: the model's.
        channels: of the network's input.
        classes: channels of its output.
        factor: voxels of the volume per low-resolution voxel, by axis.
    """
    voxels, plane = math.prod(size.volume), math.prod(size.volume[1:])
    of_resampling = OF_RESAMPLING if is_known(configuration, "data") else OF_RESAMPLING_BY_NNUNET
    coarse = COPIES_OF_COARSE * 4 * classes * voxels // math.prod(factor)
    return Needs(
        preprocessing=channels * (OF_READING * size.image + of_resampling * voxels),
        prediction=4 * channels * voxels + coarse + OF_LABELS * size.image,
        writing=OF_WRITING * size.image,
        plane=bytes_of_plane(classes, plane),
        window=2 * classes * math.prod(configuration.patch_size),
    )


def check_least(
    limit: int,
    cases: Sequence[Sequence[str]],
    plans: PlansManager,
    configuration: ConfigurationManager,
    channels: int,
    classes: int,
    factor: Sequence[int],
) -> None:
    """See that a bound is not too small for what is known before a network is loaded. Arguments as in `needs_of`.

    Raises:
        UserError: it is.
    """
    wanted = Share(0, 1, 0, 0, 1)
    for files in cases:
        if size := size_of(files, plans, configuration):
            needs = needs_of(size, configuration, channels, classes, factor)
            share_out(limit, memory_of_process(), needs, 0, wanted, FEWEST_PLANES, size.case)


def share_within(
    limit: int, cases: Sequence[Sequence[str]], predictor: nnUNetPredictor, fold: Fold, wanted: Share
) -> Share:
    """What may go on at a time within a bound for some cases. Predicts a patch to see what it takes.

    Args:
        limit: the bound.
        cases: files by case and channel.
        predictor: of the model.
        fold: one of its folds.
        wanted: what there would be without a bound.

    Raises:
        UserError: the bound is too small for one of the cases.
    """
    plans, configuration, network = predictor.plans_manager, predictor.configuration_manager, fold.network
    channels = determine_num_input_channels(plans, configuration, predictor.dataset_json)
    classes, factor = predictor.label_manager.num_segmentation_heads, network.settings.downsampling_factor
    sizes = [size for files in cases if (size := size_of(files, plans, configuration))]
    if not sizes:
        return wanted
    needs = [needs_of(size, configuration, channels, classes, factor) for size in sizes]
    size, largest = max(zip(sizes, needs, strict=True), key=lambda case: sum(case[1][:3]))
    used = memory_of_process()
    forget_most_memory()
    with torch.inference_mode():
        fold.patch_logits(torch.zeros(1, channels, *network.patch_size))
    patch = max(0, most_memory_of_process() - used)
    if predictor.device.type == "cpu":  # the global branch sees a volume of its own
        patch = max(patch, patch * math.prod(size.volume) // math.prod(factor) // math.prod(network.patch_size))
    wanted = wanted._replace(num_writers=default_num_processes)
    return share_out(limit, used, largest, patch, wanted, FEWEST_PLANES, size.case)


def share_out(
    limit: int, used: int, needs: Needs, patch: int, wanted: Share, fewest_planes: int, case: str = "a case"
) -> Share:
    """What may go on at a time within a bound.

    Args:
        limit: the bound.
        used: by this process before it predicts.
        needs: of the largest case.
        patch: activations of a patch.
        wanted: what there would be without a bound.
        fewest_planes: that must be worked out at a time.
        case: the largest, for the message.

    Raises:
        UserError: not even one patch of the case fits.
    """
    prediction = used + SLACK + needs.prediction + patch + fewest_planes * needs.plane + 2 * needs.window
    least = max(prediction, used + SLACK + needs.preprocessing) + needs.writing  # one case after the other
    if least > limit:
        raise UserError(
            f"--max_memory is {in_words(limit)}, too small for one patch of {case}: this needs about {in_words(least)}"
        )
    left = limit - prediction - needs.writing

    def take(least: int, most: int, each: int, share: float) -> int:
        """As many as wanted, but only a share of what is left for what is more than the least."""
        nonlocal left
        more = max(0, min(most - least, int(share * left // max(1, each))))
        left -= more * each
        return least + more

    num_preprocessing = take(0, wanted.num_preprocessing, needs.preprocessing, 0.5)
    num_writers = take(1, wanted.num_writers, needs.writing, 0.25)
    patches_at_once = take(1, wanted.patches_at_once, patch, 0.25)
    planes = take(fewest_planes * needs.plane, wanted.planes, 1, 0.5)
    return Share(num_preprocessing, num_writers, planes, left, patches_at_once)


def memory_of_process() -> int:
    """Memory of this process now."""
    resident: int = psutil.Process().memory_info().rss
    return resident


def forget_most_memory() -> None:
    """Let `most_memory_of_process` begin anew. Linux alone can; elsewhere it says more than was needed since."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def most_memory_of_process() -> int:
    """The most memory that this process has had."""
    if sys.platform == "win32":
        on_windows: int = psutil.Process().memory_info().peak_wset
        return on_windows
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
