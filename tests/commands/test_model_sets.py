"""`nmsw_predict` with a coarse model and several fine ones."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from untrained import refused_by, write_image, write_model

from nnunet_nmsw.commands.predict import main

COARSE = ("liver", "spleen", "kidney", "rib")
FINE = {"organs": ("kidney", "liver"), "bones": ("rib", "vertebra")}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The models, and how to predict with them."""
    folder = tmp_path_factory.mktemp("models")
    low = {"spacing": [2.0] * 3, "data_identifier": "low"}
    coarse = write_model(folder / "coarse", "nnUNetTrainer", COARSE, seed=7, **low)
    fine = [
        write_model(folder / name, "nnUNetTrainer", labels, seed) for seed, (name, labels) in enumerate(FINE.items())
    ]
    return ["--global_model", str(coarse), "--local_model", *map(str, fine), "-device", "cpu", "--disable_tta"]


def labels(file: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    return array


@pytest.mark.compatibility("pretrained weights", "a set of stock models, matched by the names of their classes")
def test_a_folder_and_one_image(flags, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for seed, name in enumerate(("a", "b")):
        write_image(images / f"{name}_0000.nii.gz", seed)
    (images / "c_0000.nii.gz").write_bytes(b"broken")
    with pytest.raises(SystemExit, match=r"cannot read .*c_0000"):
        main(["-i", str(images), "-o", str(tmp_path / "out"), "-k", "25%", "--save_patches", *flags])
    output = capsys.readouterr().out
    assert "vertebra" in output
    assert output.count("perform_everything_on_device") <= 1  # which nnU-Net's predictor says
    assert sorted(file.name for file in (tmp_path / "out").glob("*.nii.gz")) == ["a.nii.gz", "b.nii.gz"]
    # What is written beside the labels is the coarse model's: its numbers are theirs.
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"]["rib"] == 4
    windows = json.loads((tmp_path / "out" / "patches" / "a.json").read_text())
    of_models = windows["windows_to_choose_from_per_model"]
    assert len(of_models) == 2
    assert windows["patches_per_model"] == [-(-number // 4) for number in of_models]

    main(["-i", str(images / "a_0000.nii.gz"), "-o", str(tmp_path / "a.nii.gz"), "-k", "25%", *flags])
    found = labels(tmp_path / "a.nii.gz")
    assert np.array_equal(found, labels(tmp_path / "out" / "a.nii.gz"))
    assert len(set(found.flat)) > 2


@pytest.mark.compatibility("input", "--orientation: images turned before a model sees them, labels turned back")
def test_images_in_another_orientation(flags, tmp_path):
    write_image(tmp_path / "scan.nii.gz")
    turned = sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / "scan.nii.gz")), "PIR")
    sitk.WriteImage(turned, str(tmp_path / "turned.nii.gz"))
    for name in ("scan", "turned"):
        image, output = (str(tmp_path / f"{stem}.nii.gz") for stem in (name, f"{name}_labels"))
        main(["-i", image, "-o", output, "-k", "5", "--orientation", "ras", *flags])
    back = sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / "turned_labels.nii.gz")), "LPS")
    assert np.array_equal(sitk.GetArrayFromImage(back), labels(tmp_path / "scan_labels.nii.gz"))


def write_labels(file: Path, shape: tuple[int, ...] = (14, 15, 16), largest: int = 4) -> None:
    """Labels of noise, for `write_image`."""
    array = np.random.default_rng(0).integers(0, largest + 1, shape).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(file))


def test_a_set_is_calibrated(flags, tmp_path, capsys):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for seed, name in enumerate(("a", "b")):
        write_image(tmp_path / "images" / f"{name}_0000.nii.gz", seed)
        write_labels(tmp_path / "labels" / f"{name}.nii.gz")
    given, file = ["-i", str(tmp_path / "images")], str(tmp_path / "new" / "calibration.json")
    main([*given, "--calibrate", str(tmp_path / "labels"), "-o", file, "-k", "25%", *flags])
    output = capsys.readouterr().out
    assert "Left-out cases gain" in output
    assert re.search(r"  rib: \d+ of \d+ objects", output)
    assert f"Predict with --calibration {file}" in output
    assert json.loads(Path(file).read_text())["cases"] == 2
    main([*given, "-o", str(tmp_path / "out"), "--calibration", file, *flags])
    assert (tmp_path / "out" / "b.nii.gz").is_file()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"-o": "out"}, "give the file to write"),
        ({"-i": "images/a_0000.nii.gz"}, "takes a folder of images"),
        ({"--calibrate": "images"}, "has no a.nii.gz, the labels of the image"),
        ({"--calibrate": "large"}, "has 14 × 15 × 17 voxels"),
        ({"--calibrate": "empty"}, "no label is of a class"),
        ({"--calibrate": "strange"}, "has a label that is none of the models'"),
        ({"--calibration": "x.json"}, "give one of them"),
    ],
)
def test_calibrations_that_cannot_be_made(flags, tmp_path, monkeypatch, capfd, change, says):
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "labels", "large", "strange", "empty"):
        Path(folder).mkdir()
    write_image(Path("images/a_0000.nii.gz"))
    write_labels(Path("labels/a.nii.gz"))
    write_labels(Path("large/a.nii.gz"), (14, 15, 17))
    write_labels(Path("strange/a.nii.gz"), largest=9)
    write_labels(Path("empty/a.nii.gz"), largest=0)
    given = {"-i": "images", "--calibrate": "labels", "-o": "calibration.json", **change}
    command = [word for pair in given.items() for word in pair]
    assert says in partial(refused_by, main)([*command, *flags], capfd)
    assert not Path(given["-o"]).exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["-k", "auto"], "-k auto needs"),
        (["--save_probabilities"], "leave out --save_probabilities"),
        (["--max_memory", "8G"], "--max_memory needs"),
        (["--precision", "int8"], "--precision int8 is for"),
        (["-f", "3"], "there is no checkpoint"),
        (["-prev_stage_predictions", "x"], "for the cascade"),
    ],
)
def test_flags_that_a_set_does_not_have(flags, tmp_path, capfd, more, says):
    write_image(tmp_path / "scan.nii.gz")
    files = ["-i", str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "out.nii.gz")]
    assert says in partial(refused_by, main)([*files, *flags, *more], capfd)
    assert not (tmp_path / "out.nii.gz").exists()
