"""A bad image beside a good one: it is named in one line, and the good one is predicted."""

import gzip
import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from untrained import write_image, write_model

from nnunet_nmsw.commands.predict import main
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.loading import load_model
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.preprocessing import check_names, preprocessed
from nnunet_nmsw.inference.ray_engine import RayPredictor, Workers
from nnunet_nmsw.inference.two_models import TwoModelPredictor


def predict(images: Path, model: Path, *flags: str) -> Path:
    output = images.parent / "out"
    main(["-i", str(images), "-o", str(output), "-m", str(model), "-device", "cpu", "-npp", "1", "-nps", "1", *flags])
    return output


def of_type(pixel: int, file: Path) -> None:
    image = sitk.Image([8, 8, 8], pixel)
    sitk.WriteImage(image, str(file))


def cut(file: Path, share: float) -> None:
    write_image(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def four_axes(file: Path) -> None:
    write_image(file, shape=(3, 14, 15, 16))


def other_header(file: Path, offset: int, value: bytes) -> None:
    write_image(file)
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[offset : offset + len(value)] = value
    file.write_bytes(gzip.compress(bytes(content)))


def sheared(file: Path) -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.7
    nibabel.save(nibabel.Nifti1Image(np.ones((9, 9, 9), np.float32), affine), file)


def flipped(file: Path) -> None:
    write_image(file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    file.write_bytes(content)


BAD = {
    "four axes": four_axes,
    "RGB": lambda file: of_type(sitk.sitkVectorUInt8, file),
    "complex": lambda file: of_type(sitk.sitkComplexFloat32, file),
    "cut in half": lambda file: cut(file, 0.5),
    "without its last byte": lambda file: (write_image(file), file.write_bytes(file.read_bytes()[:-1])),
    "whole gzip of half an image": lambda file: (
        write_image(file),
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:5000])),
    ),
    "a byte flipped": flipped,
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_bytes(b"this is no image"),
    "unknown data type": lambda file: other_header(file, 70, b"\x99\x09"),
    "no axes": lambda file: other_header(file, 40, b"\x00" * 16),
    "huge axes": lambda file: other_header(file, 42, b"\xff\x7f" * 3),
    "sheared": sheared,
}


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_bad_images_are_named_and_the_good_one_is_predicted(images, tmp_path, reader, capsys):
    names = {name: name.replace(" ", "_") for name in BAD}
    for name, write in BAD.items():
        write(images / f"{names[name]}_0000.nii.gz")
    model = write_model(tmp_path / "model")
    plans = json.loads((model / "plans.json").read_text())
    (model / "plans.json").write_text(json.dumps({**plans, "image_reader_writer": reader}))
    with pytest.raises(SystemExit) as ended:
        predict(images, model)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert "\n" not in str(ended.value)
    printed = [line for line in captured.out.splitlines() if line.startswith("cannot ")]
    refused = [name for name in BAD if (name, reader) not in ACCEPTED]
    assert len(printed) == len(refused)
    for name in refused:
        (line,) = (line for line in printed if f"{names[name]}_0000.nii.gz" in line)
        assert line in str(ended.value)
        assert len(line) < 900
    there = {file.name for file in (tmp_path / "out").glob("*.nii.gz")}
    assert there == {"good.nii.gz", *(f"{names[name]}.nii.gz" for name in BAD if name not in refused)}


ACCEPTED = {("sheared", "NibabelIO")}
"""Images that this reader reads, and the other does not."""


@pytest.mark.parametrize("ending", [".nii", ".mha", ".nrrd", ".gipl"])
def test_images_of_other_formats_that_are_cut_off_are_refused(tmp_path, ending):
    model, images = write_model(tmp_path / "model"), tmp_path / "images"
    dataset = json.loads((model / "dataset.json").read_text())
    (model / "dataset.json").write_text(json.dumps({**dataset, "file_ending": ending}))
    images.mkdir()
    for name in ("bad", "good"):
        write_image(images / f"{name}_0000{ending}")
    bad = images / f"bad_0000{ending}"
    bad.write_bytes(bad.read_bytes()[:-700])
    with pytest.raises(SystemExit, match=f"bad_0000{ending}"):
        predict(images, model)
    assert [file.name for file in (tmp_path / "out").glob(f"*{ending}")] == [f"good{ending}"]


@pytest.mark.parametrize("bad", ["broken", "json", "no json", "two-dimensional"])
def test_a_bad_tiff_is_named_and_the_good_one_is_predicted(tmp_path, bad):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("bad", "good"):
        array = np.random.default_rng(0).integers(0, 255, (14, 15, 16)).astype(np.uint8)
        tifffile.imwrite(images / f"{name}_0000.tif", array)
        (images / f"{name}.json").write_text(json.dumps({"spacing": [1.0, 1.0, 1.0]}))
    if bad == "broken":
        (images / "bad_0000.tif").write_bytes((images / "bad_0000.tif").read_bytes()[:300])
    elif bad == "json":
        (images / "bad.json").write_text("{")
    elif bad == "no json":
        (images / "bad.json").write_text(json.dumps({"spacings": 1}))
    else:
        tifffile.imwrite(images / "bad_0000.tif", np.zeros((3, 4, 5, 6), np.uint8))
    model = write_model(tmp_path / "model")
    for file, change in (
        ("plans.json", {"image_reader_writer": "Tiff3DIO"}),
        ("dataset.json", {"file_ending": ".tif"}),
    ):
        (model / file).write_text(json.dumps({**json.loads((model / file).read_text()), **change}))
    with pytest.raises(SystemExit, match=r"bad_0000\.tif"):
        predict(images, model)
    assert [file.name for file in (tmp_path / "out").glob("*.tif")] == ["good.tif"]


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])  # ITK makes zeros of them in NIfTI files alone
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_told(tmp_path, value, ending, capsys):
    model, images = write_model(tmp_path / "model"), tmp_path / "images"
    dataset = json.loads((model / "dataset.json").read_text())
    (model / "dataset.json").write_text(json.dumps({**dataset, "file_ending": ending}))
    images.mkdir()
    write_image(images / f"good_0000{ending}")
    array = write_image(images / f"strange_0000{ending}", 1)
    array[3, 4, 5] = value
    sitk.WriteImage(sitk.GetImageFromArray(array), str(images / f"strange_0000{ending}"))
    output = predict(images, model)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING"))
    assert f"strange_0000{ending} has 1 voxels that are no numbers" in line
    assert (output / f"good{ending}").is_file()


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_a_fourth_axis_of_one_voxel_is_no_channel(untrained, tmp_path, ending):
    """nnU-Net's reader takes it for the channel, and its writer fails after the prediction."""
    predictor = NMSWPredictor(2, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(untrained), (0,))
    file = str(tmp_path / f"a_0000.{ending}")
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(np.ones((8, 9, 10), np.float32))]), file)
    error = preprocessed(predictor, [file], None, None)["error"]
    assert isinstance(error, UserError)
    assert "it has 4 axes" in str(error)


@pytest.mark.parametrize("name", ["..", "", "."])
def test_names_that_no_file_can_have_are_refused(images, untrained, tmp_path, name):
    write_image(images / "x_0000.nii.gz", 1)
    (images / "x_0000.nii.gz").rename(images / f"{name}_0000.nii.gz")
    with pytest.raises(SystemExit, match="rename it"):
        predict(images, untrained)
    outside = {file.name for file in tmp_path.iterdir()}
    assert outside == {"images", "out"}
    assert [file.name for file in (tmp_path / "out").iterdir() if ".nii" in file.name] == ["good.nii.gz"]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.hdr", "a.img", "a b", "ä", "a$b$", "-k", "a.part1"])
def test_strange_names_are_those_of_the_result(images, untrained, tmp_path, name):
    write_image(images / "x_0000.nii.gz", 1)
    (images / "x_0000.nii.gz").rename(images / f"{name}_0000.nii.gz")
    output = predict(images, untrained, "--save_patches")
    assert (output / f"{name}.nii.gz").is_file()
    assert sitk.ReadImage(str(output / "good.nii.gz")).GetSize() == (16, 15, 14)
    assert (output / "patches" / f"{name}.json").is_file()
    assert (output / "patches" / f"{name}.nii.gz").is_file()
    assert not [file for file in output.rglob("*") if "nmsw" in file.name]


def test_a_name_that_is_not_utf8_is_refused(images, untrained, tmp_path):
    os.rename(images / "good_0000.nii.gz", os.fsencode(images / "bad_") + b"\xff_0000.nii.gz")
    write_image(images / "good_0000.nii.gz")
    with pytest.raises(SystemExit, match=r"not UTF-8"):
        predict(images, untrained)
    assert (tmp_path / "out" / "good.nii.gz").is_file()


class Failing(NMSWPredictor):
    """Fails for images of 17 voxels."""

    error: Exception

    def networks_of(self, case):
        if case["data"].shape[-1] == 17:
            raise self.error
        return super().networks_of(case)


@pytest.mark.parametrize("save_probabilities", [False, True])
@pytest.mark.parametrize(
    ("error", "is_a_bug"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("cuDNN error"), False),
        (MemoryError(), False),
        (OSError(28, "No space left on device"), False),
        (TypeError("a mistake of ours"), True),
        (AssertionError(), True),
        (IndexError("a mistake of ours"), True),
    ],
)
def test_a_case_that_fails_in_prediction(images, untrained, tmp_path, error, is_a_bug, save_probabilities, capfd):
    write_image(images / "bad_0000.nii.gz", shape=(14, 15, 17))
    predictor = Failing(2, device=torch.device("cpu"), allow_tqdm=False)
    predictor.error = error
    predictor.initialize_from_trained_model_folder(str(untrained), (0,))
    with pytest.raises(type(error) if is_a_bug else SystemExit) as raised:
        predictor.predict_from_files(str(images), str(tmp_path / "out"), save_probabilities=save_probabilities)
    assert (tmp_path / "out" / "good.nii.gz").is_file()
    assert not (tmp_path / "out" / "bad.nii.gz").exists()
    captured = capfd.readouterr()
    assert "cannot predict" in captured.out
    if is_a_bug:  # stays what it is, with its traceback
        assert raised.value is error
        assert "Traceback" in captured.err
    else:
        assert "bad" in str(raised.value)
        assert "Traceback" not in captured.err


@pytest.mark.parametrize("save_probabilities", [False, True])
def test_one_bad_array_leaves_the_results_of_the_others(untrained, save_probabilities):
    predictor = NMSWPredictor(2, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(untrained), (0,))
    shapes = [(1, 14, 15, 16), (3, 14, 15, 16), (1, 15, 14, 16)]
    arrays = [np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in shapes]
    properties = [{"spacing": [1.0, 1.0, 1.0]} for _ in shapes]
    with pytest.raises(SystemExit) as raised:
        predictor.predict_from_list_of_npy_arrays(arrays, None, properties, None, 2, save_probabilities)
    labels = [of[0] if save_probabilities and of is not None else of for of in raised.value.results]
    assert [None if of is None else of.shape for of in labels] == [(14, 15, 16), None, (15, 14, 16)]


def test_arrays_with_two_stock_models(tmp_path):
    models = [write_model(tmp_path / name, "nnUNetTrainer") for name in ("coarse", "fine")]
    coarse = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    load_model(coarse, models[0], [0], "checkpoint_final.pth")
    predictor = TwoModelPredictor(coarse, num_patches=2, device=torch.device("cpu"), allow_tqdm=False)
    load_model(predictor, models[1], [0], "checkpoint_final.pth")
    arrays = [np.random.default_rng(n).normal(size=(1, 14, 15, 16)).astype(np.float32) for n in range(2)]
    of_list = predictor.predict_from_list_of_npy_arrays(arrays, None, [{"spacing": [1.0] * 3} for _ in arrays], None, 1)
    for array, labels in zip(arrays, of_list, strict=True):
        alone = predictor.predict_single_npy_array(array, {"spacing": [1.0] * 3})
        assert (alone != labels).mean() < 0.02  # by nnU-Net's export, which rounds


@pytest.mark.parametrize("name", ["..", "."])
def test_ray_keeps_the_names_of_cases(untrained, tmp_path, name):
    """Its workers get whole paths, of which nothing may be cut away before names are checked."""
    by_ray = RayPredictor(Workers(lambda: None), device=torch.device("cpu"))
    by_ray.dataset_json = {"file_ending": ".nii.gz"}
    (job,) = by_ray._internal_get_data_iterator_from_lists_of_filenames([["a"]], None, [f"{tmp_path}/out/{name}"], 1)
    with pytest.raises(UserError, match="rename it"):
        check_names(job.images, job.output)


def test_labels_of_the_previous_stage_of_another_size_are_refused(untrained, tmp_path):
    predictor = NMSWPredictor(2, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(untrained), (0,))
    image, labels = tmp_path / "a_0000.nii.gz", tmp_path / "a.nii.gz"
    write_image(image)
    write_image(labels, shape=(14, 15, 17))
    case = preprocessed(predictor, [str(image)], str(labels), None)
    assert isinstance(case["error"], UserError)
    assert "14 × 15 × 17 voxels, and its image has 14 × 15 × 16" in str(case["error"])


def test_arrays_without_a_guard_in_the_script(untrained, tmp_path):
    """nnU-Net's iterator starts processes, each of which would run the script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np, torch\n"
        "from nnunet_nmsw.inference.predictor import NMSWPredictor\n"
        "p = NMSWPredictor(2, device=torch.device('cpu'), allow_tqdm=False)\n"
        f"p.initialize_from_trained_model_folder({str(untrained)!r}, (0,))\n"
        "images = [np.random.default_rng(n).normal(size=(1, 14, 15, 16)).astype(np.float32) for n in range(3)]\n"
        "properties = [{'spacing': [1.0, 1.0, 1.0]} for _ in images]\n"
        "labels = p.predict_from_list_of_npy_arrays(images, None, properties, None, 2, False, 2)\n"
        "print('SHAPES', [of_image.shape for of_image in labels])\n"
        "labels, probabilities = p.predict_from_list_of_npy_arrays(images[0], None, properties[0], None, 1, True)[0]\n"
        "print('SHAPES', labels.shape, probabilities.shape)\n"
    )
    import subprocess
    import sys

    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    shapes = [line for line in result.stdout.splitlines() if line.startswith("SHAPES")]
    assert shapes == [f"SHAPES {[(14, 15, 16)] * 3}", "SHAPES (14, 15, 16) (3, 14, 15, 16)"]
