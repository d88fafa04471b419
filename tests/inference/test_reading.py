import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from old_model import FLAGS, FOLDER

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference import reading


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name in ("b_0000", "a_0000", "a_0001"):
        image = sitk.GetImageFromArray(random.normal(size=(4, 5, 6)).astype(np.float32))
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    (tmp_path / "a note").write_text("of the person who made them")
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """Files that were read, in order."""
    files, read = [], SimpleITKIO.read_images
    monkeypatch.setattr(SimpleITKIO, "read_images", lambda self, of: files.append(list(of)) or read(self, of))
    return files


def test_the_first_case_is_read_once(folder, reads):
    first, second = [str(folder / f"a_000{channel}.nii.gz") for channel in range(2)], [str(folder / "b_0000.nii.gz")]
    expected = SimpleITKIO().read_images(first)
    reads.clear()
    reading.read_ahead([str(folder)])
    image, properties, not_finite = reading.read_image(SimpleITKIO(), first)
    np.testing.assert_array_equal(image, expected[0])
    assert (properties["spacing"], not_finite) == (expected[1]["spacing"], 0)
    reading.read_image(SimpleITKIO(), second)
    assert reads == [first, second]
    reading.read_image(SimpleITKIO(), first)  # whoever asks again reads again
    assert reads == [first, second, first]


def test_the_files_of_one_image_are_read_once(folder, reads):
    files = [str(folder / f"a_000{channel}.nii.gz") for channel in range(2)]
    reading.read_ahead(files)
    reading.read_image(SimpleITKIO(), files)
    assert reads == [files]
    reading.read_ahead([*files, str(folder / "missing.nii.gz")])  # which others say
    assert reads == [files]


def test_what_was_read_for_another_model_is_not_taken(folder, reads):
    reading.read_ahead([str(folder)])
    files = [str(folder / f"a_000{channel}.nii.gz") for channel in range(2)]
    _, properties, _ = reading.read_image(NibabelIO(), files)
    assert "nibabel_stuff" in properties
    image, _, _ = reading.read_image(SimpleITKIO(), files[:1])  # a model of one channel
    assert len(image) == 1
    assert files[:1] in reads
    reading.read_image(SimpleITKIO(), files)


def test_what_fails_is_said_where_the_image_is_asked_for(folder):
    broken = folder / "a_0001.nii.gz"
    broken.write_bytes(broken.read_bytes()[:100])
    reading.read_ahead([str(folder)])
    with pytest.raises(UserError, match=r"cannot read .*a_0001"):
        reading.read_image(SimpleITKIO(), [str(folder / "a_0000.nii.gz"), str(broken)])


def test_a_folder_without_images_is_nothing_to_read(tmp_path, reads):
    reading.read_ahead([str(tmp_path)])
    reading.read_ahead([str(tmp_path / "missing")])
    (tmp_path / "file.txt").write_text("")
    reading.read_ahead([str(tmp_path)])
    reading.read_ahead([str(tmp_path / "file.txt")])
    assert reads == []


def test_a_name_that_ends_itk_is_left_to_who_refuses_it(tmp_path, reads):
    """ITK ends the process where a name is not UTF-8."""
    name = os.fsdecode(bytes(tmp_path / "a") + b"\xff_0000.nii.gz")
    Path(name).write_bytes(b"")
    reading.read_ahead([str(tmp_path)])
    reading.read_ahead([name])
    assert not reading._ahead
    assert reads == []


def test_what_nobody_will_ask_for_is_forgotten(folder, reads):
    files = [str(folder / f"a_000{channel}.nii.gz") for channel in range(2)]
    reading.read_ahead([str(folder)])
    reading.forget_others([files])
    reading.read_image(SimpleITKIO(), files)
    assert reads == [files]
    reading.read_ahead([str(folder)])
    reading.forget_others([files[:1]])
    assert not reading._ahead


def test_the_command_reads_every_image_once(tmp_path):
    code = f"""
import sys
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunet_nmsw.commands import entry_points
read = SimpleITKIO.read_images
SimpleITKIO.read_images = lambda self, files: print("READ", *files) or read(self, files)
sys.argv = ["nmsw_predict", "-i", {f"{FOLDER / 'images'}/"!r}, "-o", {str(tmp_path / "out")!r}, *{FLAGS!r}, "-k", "3"]
entry_points.predict()
from nnunet_nmsw.inference import reading
print("LEFT", len(reading._ahead))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    images = sorted(map(str, (FOLDER / "images").glob("*.nii.gz")))
    assert sorted(line.removeprefix("READ ") for line in lines if line.startswith("READ")) == images
    assert lines[-1] == "LEFT 0"
