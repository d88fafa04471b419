"""Image files, read by nnU-Net's readers and checked beside it. The first ones are read before PyTorch is imported.

Nothing heavy is imported here: reading starts before seconds of imports, and leaves Python's lock to them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_nmsw.console import printable
from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.files import check_whole

HEADERS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".hdr")
"""Files whose headers SimpleITK reads without the image."""

Read = tuple[np.ndarray, dict[str, Any], int]
"""An image or labels, nnU-Net's properties, and what `check_whole` counts."""

_ahead: dict[tuple[str, ...], Future[Read]] = {}
"""What is being read before it is asked for, by files. Who asks for it takes it out."""


def read_ahead(inputs: Sequence[str]) -> None:
    """Start to read the first image, for whoever calls `read_image` for it.

    Which model they are for is not known yet. So this is for nnU-Net's usual reader, and whatever is wrong with the
    inputs is left to others to say.

    Args:
        inputs: a folder with files CASE_0000.nii.gz, CASE_0001.nii.gz and so on; or the files of an image.
    """
    if len(inputs) == 1 and os.path.isdir(inputs[0]):
        files = _first_case(inputs[0])
    else:
        files = tuple(inputs) if all(os.path.isfile(file) and file.endswith(HEADERS) for file in inputs) else ()
    if not files or any(printable(file) != file for file in files):  # ITK ends the process at names that are not UTF-8
        return
    thread = ThreadPoolExecutor(1, "reading ahead")
    _ahead[files] = thread.submit(_read, SimpleITKIO().read_images, files)
    thread.shutdown(wait=False)


def _first_case(folder: str) -> tuple[str, ...]:
    """Files of the first case of a folder, by channel."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ()
    endings = "|".join(map(re.escape, HEADERS))
    matches = [match for name in names if (match := re.fullmatch(rf"(.*)_\d{{4}}({endings})", name, re.DOTALL))]
    return tuple(os.path.join(folder, match[0]) for match in matches if match.groups() == matches[0].groups())


def forget_others(cases: Sequence[Sequence[str]]) -> None:
    """Do not keep what was read ahead and is none of these cases, files by case and channel."""
    for files in set(_ahead) - set(map(tuple, cases)):
        del _ahead[files]


def read_image(reader: Any, files: Sequence[str]) -> Read:
    """The channels of an image, shape C, Z, Y, X, float32.

    Args:
        reader: nnU-Net's.
        files: by channel.

    Raises:
        UserError: a file cannot be read or is damaged.
    """
    future = _ahead.pop(tuple(files), None)
    return future.result() if future is not None and type(reader) is SimpleITKIO else _read(reader.read_images, files)


def read_segmentation(reader: Any, file: str) -> np.ndarray:
    """Labels, shape 1, Z, Y, X.

    Args:
        reader: nnU-Net's.
        file: of the labels.

    Raises:
        UserError: the file cannot be read or is damaged.
    """
    labels, _, _ = _read(lambda files: reader.read_seg(files[0]), [file])
    return labels


def check_file(file: str) -> int:
    """See that an image file is whole, and its voxels are real numbers: nnU-Net's readers drop the imaginary part.

    Returns:
        See `check_whole`.

    Raises:
        OSError: it is not whole.
        ValueError: its voxels are complex.
    """
    if file.lower().endswith(HEADERS):
        _check_type(file)
    return check_whole(file)


def _read(read: Callable[[Sequence[str]], Any], files: Sequence[str]) -> Read:
    """By nnU-Net's reader, while the files are checked beside it."""
    try:
        with ThreadPoolExecutor(len(files), "checking") as threads:
            checks = [threads.submit(check_file, file) for file in files]
            image, properties = read(files)
            not_finite = sum(check.result() for check in checks)
    except Exception as error:
        # Readers raise errors of every type, and all of them are about the files.
        why = reason(error) if str(error) or len(files) == 1 else "its channels differ in size or spacing"
        raise UserError(f"cannot read {', '.join(files)}: {why}") from error
    return image, properties, not_finite


def _check_type(file: str) -> None:
    header = sitk.ImageFileReader()
    header.SetFileName(file)
    try:
        header.ReadImageInformation()
    except RuntimeError:  # nnU-Net's reader, perhaps another one, decides
        return
    kind = sitk.GetPixelIDValueAsString(header.GetPixelID())
    if "complex" in kind:
        raise ValueError(f"its voxels are complex numbers ({kind})")
