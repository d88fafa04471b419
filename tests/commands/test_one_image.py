"""`nmsw_predict` and `predict_file` with the file of one image, of any name and type."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from predictors import nmsw
from untrained import write_image, write_model

from nnunet_nmsw.commands.predict import main
from nnunet_nmsw.errors import UserError

FLAGS = ["-device", "cpu", "--disable_tta", "-k", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("one_image") / "model")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Labels of the image of noise, predicted as a folder of one case."""
    folder = tmp_path_factory.mktemp("as_a_folder")
    (folder / "images").mkdir()
    write_image(folder / "images" / "a_0000.nii.gz")
    main(["-i", str(folder / "images"), "-o", str(folder / "out"), "-m", str(model), *FLAGS])
    return labels(folder / "out" / "a.nii.gz")


def labels(file: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    return array


@pytest.mark.compatibility("input", "the file of one image, of any name and type")
@pytest.mark.parametrize(
    ("image", "output"),
    [
        ("scan.nii.gz", "labels.nii.gz"),
        ("a b.c.nrrd", "new/labels.mha"),
        ("ct_0007.nii", "ct_0007.nrrd"),
        ("x.mha", "x.nii"),
    ],
)
def test_one_image_is_predicted_as_in_a_folder_and_nothing_else_is_written(model, expected, tmp_path, image, output):
    write_image(tmp_path / image)
    main(["-i", str(tmp_path / image), "-o", str(tmp_path / output), "-m", str(model), *FLAGS])
    assert np.array_equal(labels(tmp_path / output), expected)
    written = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {image, output}


def test_what_is_there_is_left_or_written_anew(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(Path("scan.nii.gz"))
    Path("labels.nii.gz").write_text("mine")
    command = ["-i", "scan.nii.gz", "-o", "labels.nii.gz", "-m", str(model), *FLAGS]
    main([*command, "--continue_prediction"])
    assert Path("labels.nii.gz").read_text() == "mine"
    main([*command, "--save_probabilities", "--save_patches"])
    assert labels(Path("labels.nii.gz")).shape == (14, 15, 16)
    assert Path("labels.npz").is_file()
    Path("labels.npz").unlink()
    main([*command, "--continue_prediction", "--save_probabilities"])
    assert Path("labels.npz").is_file()
    assert Path("patches/labels.json").is_file()


def test_several_files_are_the_channels_of_one_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two = {"dataset": {"channel_names": {"0": "T1", "1": "T2"}}, "normalization_schemes": ["ZScoreNormalization"] * 2}
    model = write_model(Path("model"), **two, use_mask_for_norm=[False] * 2)
    for number, name in enumerate(("first", "second")):
        write_image(Path(f"{name}.nii.gz"), seed=number)
    found = []
    for order in (("first", "second"), ("second", "first")):
        files = [f"{name}.nii.gz" for name in order]
        main(["-i", *files, "-o", f"{order[0]}_labels.nii.gz", "-m", str(model), *FLAGS])
        found.append(labels(Path(f"{order[0]}_labels.nii.gz")))
    assert not np.array_equal(*found)


def test_tiff_files_are_taken_by_folders_alone(model, tmp_path):
    predictor = nmsw()
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    predictor.plans_manager.plans["image_reader_writer"] = "Tiff3DIO"
    with pytest.raises(UserError, match="give folders"):
        predictor.predict_file(str(tmp_path / "scan.tif"), str(tmp_path / "labels.tif"))


def test_from_python(model, expected, tmp_path):
    predictor = nmsw(num_patches=3)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    write_image(tmp_path / "scan.nii.gz")
    predictor.predict_file(str(tmp_path / "scan.nii.gz"), str(tmp_path / "labels.nrrd"))
    assert np.array_equal(labels(tmp_path / "labels.nrrd"), expected)
    assert predictor.dataset_json["file_ending"] == ".nii.gz"
    bounded = nmsw(num_patches=3, max_memory=1 << 20)
    bounded.initialize_from_trained_model_folder(str(model), (0,))
    with pytest.raises(UserError, match="memory"):
        bounded.predict_file(str(tmp_path / "scan.nii.gz"), str(tmp_path / "other.nrrd"))
