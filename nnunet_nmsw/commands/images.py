"""What `nmsw_predict` is to predict, and where to: folders of cases as for nnU-Net, or the files of one image."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.files import written_whole
from nnunet_nmsw.inference.export import ending_in, endings_of_one_image
from nnunet_nmsw.inference.model_folder import read_document

DICOM_MARK = 128, b"DICM"
"""Where DICOM files say what they are."""


class Images(NamedTuple):
    """Images to predict.

    Attributes:
        cases: files by case and channel.
        output: folder, or the file of the labels.
        ending: of the file; None of a folder.
    """

    cases: list[list[str]]
    output: str
    ending: str | None

    @property
    def is_file(self) -> bool:
        """`output` is a file."""
        return self.ending is not None

    @property
    def probabilities(self) -> str:
        """Where nnU-Net puts the probabilities of one image."""
        return self.output.removesuffix(self.ending or "") + ".npz"


def case_name(files: Sequence[str], ending: str) -> str:
    """Name of a case of a folder.

    Args:
        files: of the case, by channel.
        ending: of the dataset's files.
    """
    return os.path.basename(files[0])[: -len(f"_0000{ending}")]


def find_images(inputs: Sequence[str], output: str, model_folder: Path) -> Images:
    """The images that -i and -o name.

    Args:
        inputs: a folder, or the files of an image by channel.
        output: a folder, or where the inputs are files the file to write.
        model_folder: of the model.

    Raises:
        UserError: something is missing, cannot be read or written, or does not fit the model.
    """
    if not output:
        raise UserError("-o is empty: give a folder, or where -i names files the file to write")
    plans = _plans(model_folder)
    ending = ending_in(output, _endings(plans, model_folder))
    if len(inputs) > 1 or os.path.isfile(inputs[0]):
        endings = endings_of_one_image(plans)
        images = Images([_channels(inputs, model_folder, endings)], output, ending_in(output, endings))
        if not images.is_file or os.path.isdir(output):
            raise UserError(
                f"-o {output}: -i names the files of one image, so give the file to write, with an ending such as "
                f"{endings[0]}"
            )
        if any(os.path.realpath(file) == os.path.realpath(output) for file in inputs):
            raise UserError(f"-o {output} is the image itself: give another file")
    else:
        images = Images(find_cases(inputs[0], model_folder), output, None)
        if ending is not None and not os.path.isdir(output):
            raise UserError(f"-o {output} is a file, and -i {inputs[0]} a folder: give a folder for the predictions")
    check_output(os.path.dirname(output) or "." if images.is_file else output)
    return images


def still_to_do(
    images: Images, part_id: int, num_parts: int, overwrite: bool, save_probabilities: bool, model_folder: Path
) -> list[list[str]]:
    """The cases of a folder that a call will predict, chosen as nnU-Net does.

    Args:
        images: of all parts.
        part_id: of this part.
        num_parts: number of parts.
        overwrite: cases that are there, too.
        save_probabilities: a case without them is not done.
        model_folder: of the model.

    Returns:
        Files by case and channel.
    """
    ending = read_document(model_folder, "dataset.json")["file_ending"]
    endings = [ending, ".npz"] if save_probabilities else [ending]

    def is_done(files: Sequence[str]) -> bool:
        name = os.path.join(images.output, case_name(files, ending))
        return all(os.path.isfile(name + of_file) for of_file in endings)

    return [files for files in images.cases[part_id::num_parts] if overwrite or not is_done(files)]


def find_cases(input_folder: str, model_folder: Path) -> list[list[str]]:
    """The images in a folder, one list of channel files a case.

    Raises:
        UserError: there is no folder, no case in it, a file that belongs to none, or a case lacks a channel.
    """
    dataset = read_document(model_folder, "dataset.json")
    ending, channels = dataset["file_ending"], len(dataset.get("channel_names") or dataset["modality"])
    convention = f"the model expects files named CASE_0000{ending}" + (
        f", with _0000 to _{channels - 1:04d} for the channels" if channels > 1 else ""
    )
    if not os.path.isdir(input_folder):
        what = "is a file, give the folder that holds it" if os.path.exists(input_folder) else "does not exist"
        raise UserError(f"-i {input_folder} {what}")
    try:
        names = sorted(name for name in os.listdir(input_folder) if name.endswith(ending))
    except OSError as error:
        raise UserError(f"-i {input_folder} cannot be read: {error.strerror}") from error
    cases: dict[str, list[str]] = {}
    for name in names:
        if not os.path.isfile(os.path.join(input_folder, name)):
            raise UserError(f"{os.path.join(input_folder, name)} is no file, or a link to a file that is missing")
        match = re.fullmatch(r"(.*)_(\d{4})", name.removesuffix(ending), re.DOTALL)
        if match is None:
            raise UserError(f"{input_folder} has {name}, and {convention}: rename the file or move it away")
        cases.setdefault(match[1], []).append(name)
    if not cases:
        others = (os.path.join(input_folder, name) for name in os.listdir(input_folder))
        if any(os.path.isfile(file) and _is_dicom(file) for file in others):
            raise UserError(f"-i {input_folder} holds DICOM files: convert them first, with dcm2niix for example")
        raise UserError(f"no cases in {input_folder}: {convention}")
    for case, files in cases.items():
        if files != [f"{case}_{channel:04d}{ending}" for channel in range(channels)]:
            raise UserError(
                f"the model takes {channels} channel(s) a case, and {input_folder} has {', '.join(files)}: {convention}"
            )
    return [[os.path.join(input_folder, name) for name in files] for files in cases.values()]


def find_references(flag: str, folder: Path, images: Sequence[Sequence[str]], model_folder: Path) -> list[Path]:
    """The files of reference labels of the images of a folder.

    Args:
        flag: that names the folder of labels.
        folder: of labels.
        images: files by case and channel.
        model_folder: of the model.

    Raises:
        UserError: one is missing.
    """
    ending = read_document(model_folder, "dataset.json")["file_ending"]
    references = [folder / (case_name(files, ending) + ending) for files in images]
    for files, reference in zip(images, references, strict=True):
        if not reference.is_file():
            raise UserError(f"{flag} {folder} has no {reference.name}, the labels of the image {files[0]}")
    return references


def check_output(folder: str) -> None:
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


def _plans(model_folder: Path) -> PlansManager:
    """A model's plans, whose reader exists.

    Raises:
        UserError: nnU-Net has no such reader.
    """
    plans = PlansManager(read_document(model_folder, "plans.json"))
    try:
        _ = plans.image_reader_writer_class
    except RuntimeError as error:
        raise UserError(f"{model_folder / 'plans.json'}, image_reader_writer: {reason(error)}") from error
    return plans


def _endings(plans: PlansManager, model_folder: Path) -> list[str]:
    """Endings by which a name is a file's and not a folder's."""
    known = plans.image_reader_writer_class().supported_file_endings
    return [*known, ".nii", read_document(model_folder, "dataset.json")["file_ending"]]


def _channels(inputs: Sequence[str], model_folder: Path, endings: Sequence[str]) -> list[str]:
    """The files of one image, checked."""
    dataset = read_document(model_folder, "dataset.json")
    names = dataset.get("channel_names") or dataset["modality"]
    for file in inputs:
        if os.path.isdir(file):
            raise UserError(f"-i {file} is a folder: give one folder, or the files of one image by channel")
        if not os.path.isfile(file):
            raise UserError(f"-i {file} does not exist")
        if ending_in(file, endings) is None:
            raise UserError(f"-i {file}: {_advice(file)}the model reads {', '.join(endings)}")
    if len(inputs) != len(names):
        raise UserError(
            f"-i names {len(inputs)} file(s), and the model takes {len(names)} channel(s) of an image, in this order: "
            f"{', '.join(map(str, names.values()))}"
        )
    return list(inputs)


def _advice(file: str) -> str:
    return "it is a DICOM file, convert it first, with dcm2niix for example; " if _is_dicom(file) else ""


def _is_dicom(file: str) -> bool:
    position, mark = DICOM_MARK
    try:
        with open(file, "rb") as content:
            content.seek(position)
            return content.read(len(mark)) == mark
    except OSError:  # its reader says so
        return False
