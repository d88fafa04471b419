"""Files are written whole or not at all, and files that were cut off are recognised."""

from __future__ import annotations

import gzip
import hashlib
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
from typing import Any, NamedTuple

import numpy as np
import psutil

from nnunet_nmsw.console import unfinished_folders

PREFIX = ".nmsw_unfinished"
"""Of the folders that hold files until they are whole: prefix_HOST_PROCESS_START_random."""

SECONDS_TO_LIVE = 24 * 3600
"""How long an unfinished folder of another machine is left alone: nobody here knows whether it is still used."""

SECONDS_OF_CLOCK = 600
"""By how much the time at which a process started may seem to change, when the clock is set."""

BLOCK = 1 << 20
"""Bytes that are read at a time."""

HEADER = 540
"""Bytes of the longest header that is looked at, NIfTI 2."""


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """Give an empty folder. It is removed at the end, by an interruption, and after a kill by `remove_leftovers`.

    Args:
        parent: where it is made; the system's folder of temporary files where None.

    Raises:
        OSError: it cannot be made.
    """
    started = int(psutil.Process().create_time())
    prefix = f"{PREFIX}_{_place()}_{os.getpid()}_{started}_"
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    unfinished_folders.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished_folders.discard(folder)


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
    with temporary_folder(folder) as unfinished:
        yield unfinished
        files = [file.relative_to(unfinished) for file in sorted(unfinished.rglob("*")) if file.is_file()]
        for file in files:
            _to_disk(unfinished / file)
        for file in sorted(files, key=lambda file: str(file) == last):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished / file, folder / file)


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


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, as a hexadecimal number.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def is_new(folder: Path) -> bool:
    """Whether a folder is not there, or has nothing but what others have not finished."""
    there = folder.exists()
    return not there or (folder.is_dir() and all(file.name.startswith(PREFIX) for file in folder.iterdir()))


def remove_leftovers(folder: Path) -> None:
    """Remove what earlier runs that were killed have left unfinished in a folder and in folders within it."""
    for leftover in [*folder.glob(f"{PREFIX}_*"), *folder.glob(f"*/{PREFIX}_*")]:
        if not leftover.is_symlink() and leftover.is_dir() and _is_abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def check_whole(file: str | Path) -> int:
    """See that an image file is complete, where its reader would not: ITK reads missing NIfTI slices as zeros.

    Compressed data of NIfTI, MetaImage and NRRD is decompressed, which checks its checksum; the size that a header of
    NIfTI or GIPL promises is compared with what is there. Readers of other formats see for themselves.

    Returns:
        How many voxels of a NIfTI file are no numbers, or infinite. ITK reads these as zeros, too.

    Raises:
        OSError: it is not complete, or damaged.
    """
    name = str(file).lower()
    try:
        with open(file, "rb") as opened, gzip.open(opened) if _is_gzip(opened) else opened as data:
            header = data.read(HEADER)
            if not header:
                raise OSError("the file is empty")
            if name.endswith((".mha", ".nrrd")):
                data.seek(0)
                (_check_meta_image if name.endswith(".mha") else _check_nrrd)(data)
                return 0
            nifti = _nifti(header) if name.endswith((".nii", ".nii.gz")) else None
            floating = None if nifti is None else nifti.floating
            if data is not opened or floating is not None:
                size, not_finite = _read_through(data, header, nifti)
            else:
                size, not_finite = os.fstat(opened.fileno()).st_size, 0
    except (EOFError, zlib.error) as error:
        raise OSError(f"the file is damaged or cut off ({error})") from error
    needed = 0 if nifti is None else nifti.size
    if name.endswith((".gipl", ".gipl.gz")):
        needed = _size_of_gipl(header)
    if size < needed:
        raise OSError(f"the file is cut off: it has {size:,} bytes of the {needed:,} that its header promises")
    return not_finite


def _to_disk(file: Path) -> None:
    """Wait until a file is on the disk, which a full one says now if not before."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def _is_abandoned(folder: Path) -> bool:
    """Whether the process that wrote in a folder is gone."""
    match = re.fullmatch(rf"{re.escape(PREFIX)}_(.*)_(\d+)_(\d+)_[^-]{{8}}", folder.name)
    try:
        if match is None or match[1] != _place():
            return time.time() - folder.stat().st_mtime > SECONDS_TO_LIVE
        return abs(psutil.Process(int(match[2])).create_time() - int(match[3])) > SECONDS_OF_CLOCK
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):  # nobody here knows, or another call has just removed it
        return False


def _place() -> str:
    """Where numbers of processes mean the same: the host, and on Linux the container."""
    namespace = Path("/proc/self/ns/pid")
    number = re.sub(r"\D", "", os.readlink(namespace)) if namespace.is_symlink() else ""
    return f"{socket.gethostname()}-{number}"


def _is_gzip(opened: Any) -> bool:
    """Whether an open file is compressed, whatever its name says: readers look inside, too."""
    start = opened.read(2)
    opened.seek(0)
    return bool(start == b"\x1f\x8b")


def _read_through(data: Any, header: bytes, nifti: Nifti | None) -> tuple[int, int]:
    """Read an open file from behind its header to its end: bytes in all, and voxels that are not finite."""
    size, not_finite, rest = len(header), 0, b""
    skip = 0
    if nifti is not None:
        rest, skip = header[nifti.offset :], max(0, nifti.offset - len(header))
    while block := data.read(BLOCK):
        size += len(block)
        if nifti is None or nifti.floating is None:
            continue
        skipped = min(skip, len(block))
        skip -= skipped
        block = rest + block[skipped:]
        whole = len(block) - len(block) % nifti.floating.itemsize
        values = np.frombuffer(block[:whole], nifti.floating)
        not_finite += len(values) - int(np.count_nonzero(np.isfinite(values)))
        rest = block[whole:]
    return size, not_finite


def _check_meta_image(data: Any) -> None:
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


class Nifti(NamedTuple):
    """What the header of an uncompressed NIfTI file says, version 1 or 2.

    Attributes:
        size: bytes of the file.
        offset: of the first voxel.
        floating: type of the voxels where that is a floating one.
    """

    size: int
    offset: int
    floating: np.dtype | None


def _nifti(header: bytes) -> Nifti | None:
    """Read the header; None for what is none."""
    for order in "<>":
        if len(header) >= 348 and struct.unpack_from(order + "i", header)[0] == 348:
            axes, *shape = struct.unpack_from(order + "8h", header, 40)
            kind, bits = struct.unpack_from(order + "2h", header, 70)
            (offset,) = struct.unpack_from(order + "f", header, 108)
        elif len(header) >= 540 and struct.unpack_from(order + "i", header)[0] == 540:
            axes, *shape = struct.unpack_from(order + "8q", header, 16)
            kind, bits = struct.unpack_from(order + "2h", header, 12)
            (offset,) = struct.unpack_from(order + "q", header, 168)
        else:
            continue
        if not 0 <= offset < 1 << 31:  # nor a NaN
            return None
        size = bits // 8
        for n in shape[: max(0, min(axes, 7))]:
            size *= max(1, n)
        floating = {16: np.dtype(order + "f4"), 64: np.dtype(order + "f8")}.get(kind)
        return Nifti(int(offset) + size, int(offset), floating)
    return None


def _check_nrrd(data: Any) -> None:
    """Decompress an NRRD file, whose reader does not look at the checksum."""
    compressed = False
    for line in iter(data.readline, b""):
        if not line.strip():
            break
        name, _, value = line.decode("latin-1").partition(":")
        compressed |= name.strip().lower() == "encoding" and value.strip().lower() in ("gz", "gzip")
    if compressed:
        with gzip.open(data) as content:
            while content.read(BLOCK):
                pass


def _size_of_gipl(header: bytes) -> int:
    """Bytes of an uncompressed GIPL file by its header of 256 bytes; 0 for a type of voxel that is not known."""
    bytes_of_type = {7: 1, 8: 1, 15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8}
    if len(header) < 256:
        return 256
    *shape, voxel_type = struct.unpack_from(">5H", header)
    size = bytes_of_type.get(voxel_type, 0)
    for n in shape:
        size *= max(1, n)
    return 256 + size
