import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_nmsw import files
from nnunet_nmsw.files import PREFIX, check_whole, remove_leftovers, write_json, written_whole

FORMATS = [(".nii.gz", True), (".nii", False), (".mha", True), (".gipl", False)]
"""Formats of images that their readers take when they are cut off, or damaged and compressed."""


def write(file: Path, compressed: bool, shape: tuple[int, ...] = (20, 21, 22)) -> np.ndarray:
    array = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(file), compressed)
    return array


@pytest.mark.parametrize(("ending", "compressed"), [*FORMATS, (".nrrd", True), (".mha", False)])
def test_whole_files_are_whole(tmp_path, ending, compressed):
    file = tmp_path / f"image{ending}"
    write(file, compressed)
    check_whole(file)
    write(file, compressed, (1, 5, 7))
    check_whole(file)


def test_what_is_not_compressed_may_be_named_so(tmp_path):
    """ITK looks inside, too."""
    write(tmp_path / "image.nii", False)
    (tmp_path / "image.nii").rename(tmp_path / "image.nii.gz")
    check_whole(tmp_path / "image.nii.gz")
    content = (tmp_path / "image.nii.gz").read_bytes()
    (tmp_path / "image.nii.gz").write_bytes(content[:-100])
    with pytest.raises(OSError, match="cut off"):
        check_whole(tmp_path / "image.nii.gz")


@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_voxels_that_are_no_numbers_are_counted_block_by_block(tmp_path, monkeypatch, kind, order, ending, dtype):
    monkeypatch.setattr(files, "BLOCK", 101)  # which no voxel's size divides
    array = np.random.default_rng(0).normal(size=(9, 10, 11)).astype(dtype)
    file = tmp_path / f"image{ending}"
    of_order = getattr(nibabel, kind)(array, np.eye(4)).header.as_byteswapped(order)
    nibabel.save(getattr(nibabel, kind)(array, np.eye(4), of_order), file)
    assert check_whole(file) == 0
    array.flat[[0, 500, 989]] = np.nan, np.inf, -np.inf
    nibabel.save(getattr(nibabel, kind)(array, np.eye(4), of_order), file)
    assert check_whole(file) == 3


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
@pytest.mark.parametrize(("ending", "compressed"), FORMATS)
def test_files_that_are_cut_off_are_recognised(tmp_path, ending, compressed, share):
    file = tmp_path / f"image{ending}"
    write(file, compressed)
    content = file.read_bytes()
    if len(content) * share < 360 and ending in (".nii", ".mha"):
        share = 360 / len(content) if share else 0  # behind the header: without one, readers refuse a file
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(OSError, match=r"cut off|empty|bytes"):
        check_whole(file)


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_compressed_files_are_checked_byte_by_byte(tmp_path, ending):
    file = tmp_path / f"image{ending}"
    write(file, True)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    file.write_bytes(content)
    with pytest.raises(OSError, match=r"damaged|CRC"):
        check_whole(file)


def test_files_appear_together_the_last_one_last(tmp_path, monkeypatch):
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    with written_whole(tmp_path / "new", last="a") as folder:
        (folder / "within").mkdir()
        for name in ("a", "b", "within/c"):
            (folder / name).write_text(name)
        assert not (tmp_path / "new" / "a").exists()
    assert sorted(moved) == ["a", "b", "c"]
    assert moved[-1] == "a"
    assert (tmp_path / "new" / "within" / "c").read_text() == "within/c"
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_after_an_error_there_is_nothing(tmp_path):
    (tmp_path / "a").write_text("before")

    def fail() -> None:
        with written_whole(tmp_path) as folder:
            (folder / "a").write_text("half")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        fail()
    assert (tmp_path / "a").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_dead_processes_are_removed_and_those_of_the_living_are_not(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom nnunet_nmsw.files import written_whole\n"
        "with written_whole(Path(sys.argv[1])) as folder:\n    (folder / 'x').touch(); os._exit(9)\n"
    )
    for _ in range(5):  # random names, some with underscores
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "within")], check=False)
    left = list((tmp_path / "within").glob(f"{PREFIX}*"))
    assert len(left) == 5
    # The host is this one, and the process is gone.
    foreign = tmp_path / re.sub(r"_[^_]*_(\d+_\d+_)", r"_other-host-1_\1", left[0].name, count=1)
    foreign.mkdir()
    link = tmp_path / f"{PREFIX}_link"
    link.symlink_to(tmp_path / "elsewhere")
    with written_whole(tmp_path) as folder:
        remove_leftovers(tmp_path)
        assert folder.is_dir()
    assert not list((tmp_path / "within").glob(f"{PREFIX}*"))
    assert foreign.is_dir()  # its machine may still write
    assert link.is_symlink()
    os.utime(foreign, (0, 0))
    remove_leftovers(tmp_path)
    assert not foreign.exists()


def test_a_link_beside_the_output_is_replaced_and_not_followed(tmp_path):
    victim, file = tmp_path / "victim", tmp_path / "a.json"
    victim.write_text("untouched")
    file.symlink_to(victim)
    write_json(file, [1])
    assert victim.read_text() == "untouched"
    assert file.read_text() == "[\n 1\n]"
    assert not file.is_symlink()
