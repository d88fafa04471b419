"""Files are written whole or not at all, and files that were cut off are recognised."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import socket
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from nnunet_nmsw.console import unfinished_folders

PREFIX = ".nmsw_unfinished"
"""Of the folders that hold files until they are whole: prefix_HOST_PROCESS_START_random."""

SECONDS_TO_LIVE = 24 * 3600
"""How long an unfinished folder of another machine is left alone: nobody here knows whether it is still used."""

BLOCK = 1 << 20
"""Bytes that are read at a time."""


@contextmanager
def written_whole(folder: Path, last: str | None = None) -> Iterator[Path]:
    """Give an empty folder. What is in it at the end goes to `folder`, each file whole; after an error nothing does.

    Names are random, so nobody can have planted a link there. Files in folders within go to folders of the same names.

    Args:
        folder: where the files belong; made if needed.
        last: name of the file that is moved last: when it is there, all the others are.

    Raises:
        OSError: something cannot be written. Nothing has changed then, unless a file cannot be moved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = int(psutil.Process().create_time())
    prefix = f"{PREFIX}_{socket.gethostname()}_{os.getpid()}_{started}_"
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    unfinished_folders.add(unfinished)
    try:
        yield unfinished
        files = [file.relative_to(unfinished) for file in sorted(unfinished.rglob("*")) if file.is_file()]
        for file in files:
            _to_disk(unfinished / file)
        for file in sorted(files, key=lambda file: str(file) == last):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished / file, folder / file)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished_folders.discard(unfinished)


def write_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with written_whole(file.parent) as unfinished:
        (unfinished / file.name).write_text(text, encoding="utf-8")


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_text(file, json.dumps(content, indent=1))


def remove_leftovers(folder: Path) -> None:
    """Remove what earlier runs that were killed have left unfinished in a folder and in folders within it."""
    for leftover in [*folder.glob(f"{PREFIX}_*"), *folder.glob(f"*/{PREFIX}_*")]:
        if not leftover.is_symlink() and leftover.is_dir() and _is_abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def check_whole(file: str | Path) -> None:
    """See that an image file is complete, where its reader would not: ITK reads missing NIfTI slices as zeros.

    Compressed data is decompressed, which checks its checksum; the size that a header of NIfTI or GIPL promises is
    compared with what is there. Readers of other formats see for themselves.

    Raises:
        OSError: it is not complete, or damaged.
    """
    name = str(file).lower()
    try:
        if name.endswith(".gz"):
            with gzip.open(file) as data:
                start, size = _start_and_size(data)
        else:
            with open(file, "rb") as data:
                start, size = data.read(544), os.fstat(data.fileno()).st_size
                if name.endswith(".mha"):
                    data.seek(0)
                    _check_meta_image(data)
    except (EOFError, zlib.error) as error:
        raise OSError(f"the file is damaged or cut off ({error})") from error
    if not size:
        raise OSError("the file is empty")
    needed = 0
    if name.endswith((".nii", ".nii.gz")):
        needed = _size_of_nifti(start)
    elif name.endswith((".gipl", ".gipl.gz")):
        needed = _size_of_gipl(start)
    if size < needed:
        raise OSError(f"the file is cut off: it has {size:,} bytes of the {needed:,} that its header promises")


def _to_disk(file: Path) -> None:
    """Wait until a file is on the disk, which a full one says now if not before."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def _is_abandoned(folder: Path) -> bool:
    """Whether the process that wrote in a folder is gone."""
    match = re.fullmatch(rf"{re.escape(PREFIX)}_(.*)_(\d+)_(\d+)_[^-]{{8}}", folder.name)
    if match is None or match[1] != socket.gethostname():
        return time.time() - folder.stat().st_mtime > SECONDS_TO_LIVE
    try:
        return int(psutil.Process(int(match[2])).create_time()) != int(match[3])
    except psutil.NoSuchProcess:
        return True


def _start_and_size(data: Any) -> tuple[bytes, int]:
    """The first bytes of an open file, read to its end, and how many there are."""
    start = data.read(BLOCK)
    size = len(start)
    while block := data.read(BLOCK):
        size += len(block)
    return start[:544], size


def _check_meta_image(data: BinaryIO) -> None:
    """Decompress a MetaImage, whose reader goes on after an error."""
    fields = {}
    for line in iter(data.readline, b""):
        name, _, value = line.decode("latin-1").partition("=")
        fields[name.strip().lower()] = value.strip()
        if name.strip().lower() == "elementdatafile":
            break
    if fields.get("compresseddata", "").lower() != "true" or fields.get("elementdatafile", "").upper() != "LOCAL":
        return
    stream = zlib.decompressobj()
    while block := data.read(BLOCK):
        stream.decompress(block)
    if not stream.eof:
        raise EOFError("compressed data ends before its end")


def _size_of_nifti(start: bytes) -> int:
    """Bytes of an uncompressed NIfTI file by its header, version 1 or 2; 0 for what is none."""
    for order in "<>":
        if len(start) >= 348 and struct.unpack_from(order + "i", start)[0] == 348:
            axes, *shape = struct.unpack_from(order + "8h", start, 40)
            (bits,) = struct.unpack_from(order + "h", start, 72)
            (offset,) = struct.unpack_from(order + "f", start, 108)
        elif len(start) >= 540 and struct.unpack_from(order + "i", start)[0] == 540:
            axes, *shape = struct.unpack_from(order + "8q", start, 16)
            (bits,) = struct.unpack_from(order + "h", start, 14)
            (offset,) = struct.unpack_from(order + "q", start, 168)
        else:
            continue
        size = bits // 8
        for n in shape[: max(0, min(axes, 7))]:
            size *= max(1, n)
        return int(offset) + size if offset == offset else 0  # a NaN has no bytes
    return 0


def _size_of_gipl(start: bytes) -> int:
    """Bytes of an uncompressed GIPL file by its header of 256 bytes; 0 for a type of voxel that is not known."""
    bytes_of_type = {7: 1, 8: 1, 15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8}
    if len(start) < 256:
        return 256
    *shape, voxel_type = struct.unpack_from(">5H", start)
    size = bytes_of_type.get(voxel_type, 0)
    for n in shape:
        size *= max(1, n)
    return 256 + size
