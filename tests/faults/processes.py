"""Commands that are killed, interrupted, or run out of disk, and what must hold afterwards."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from nnunet_nmsw.files import PREFIX, check_whole

SECONDS_BETWEEN_LOOKS = 0.001


def files_of(folder: Path) -> set[str]:
    """Names of the files within, but of unfinished ones."""
    found = set()
    for path, folders, files in os.walk(folder):  # which does not mind that folders come and go
        folders[:] = [name for name in folders if not name.startswith(PREFIX)]
        found |= {os.path.relpath(os.path.join(path, name), folder) for name in files}
    return found


def kill_behind_a_file(folder: Path, number: int, seconds: float, group: bool = True) -> Callable[[int], None]:
    """Kill a command right behind the file that appears or changes as the given one, or when time is up."""

    def watch(process: int) -> None:
        seen: dict[str, int] = {}
        begun, appeared = time.monotonic(), 0
        for name in files_of(folder):
            with contextlib.suppress(FileNotFoundError):
                seen[name] = (folder / name).stat().st_mtime_ns
        while time.monotonic() < begun + seconds and psutil.pid_exists(process):
            for name in files_of(folder):
                with contextlib.suppress(FileNotFoundError):
                    changed = (folder / name).stat().st_mtime_ns
                    if seen.get(name) != changed:
                        seen[name] = changed
                        appeared += 1
            if appeared >= number:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
        kill(process, signal.SIGKILL, group)

    return watch


def after(seconds: float, number: int = signal.SIGKILL, group: bool = True) -> Callable[[int], None]:
    """Send a command a signal after some time."""

    def wait(process: int) -> None:
        time.sleep(seconds)
        kill(process, number, group)

    return wait


def kill(process: int, number: int, group: bool) -> None:
    """Send a signal to a command, and to its workers where the group is meant."""
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(process, number)


def random_kill(random_: random.Random, folder: Path, files: int, seconds: float, kills: int) -> Callable[[int], None]:
    """A kill at a random time, or right behind a random file; of a single kill always the latter, which takes place."""
    if kills == 1:
        return kill_behind_a_file(folder, random_.randint(1, files), 600)
    if random_.random() < 0.5:
        return after(random_.uniform(0, seconds))
    return kill_behind_a_file(folder, random_.randint(1, 3 * files), 2 * seconds)


OF_NNUNET = ("progress.png", "debug.json", "summary.json", "plans.json", "dataset.json", "dataset_fingerprint.json")
"""What nnU-Net's trainer writes itself, and again with `--c`."""


def check_files(folder: Path, of_others: Sequence[str] = ()) -> None:
    """See that every file that has its name is whole, but for those that others write."""
    for name in files_of(folder):
        file = folder / name
        if file.name in of_others:
            continue
        if name.endswith((".nii.gz", ".nii")):
            check_whole(file)
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".npz":
            with np.load(file) as arrays:
                assert all(arrays[key] is not None for key in arrays)
        elif file.suffix in (".png", ".jpg"):
            with Image.open(file) as image:
                image.load()


def all_gone(processes: list[psutil.Process], seconds: float = 20.0) -> bool:
    """Whether processes end within some time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(map(_is_running, processes)):
            return True
        time.sleep(0.1)
    return False


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A folder on a disk of its own, full after so much."""
    folder.mkdir()
    assert os.system(f"mount -t tmpfs -o size={kilobytes}k tmpfs {folder}") == 0
    try:
        yield folder
    finally:
        os.system(f"umount -l {folder}")


def can_mount() -> bool:
    """Whether this process may mount disks."""
    probe = Path(f"/tmp/nmsw_probe_{os.getpid()}")
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return False
    probe.mkdir()
    mounted = os.system(f"mount -t tmpfs -o size=64k tmpfs {probe} 2>/dev/null") == 0
    if mounted:
        os.system(f"umount {probe}")
    probe.rmdir()
    return mounted
