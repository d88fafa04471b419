"""Images in one of the 48 orientations, turned into another one and back."""

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from predictors import nmsw
from tiny import build_network, initialized

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.flags import parse_orientation
from nnunet_nmsw.inference.orientation import OrientedIO, orient

ORIENTATIONS = [
    "".join(letters) for order in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*order)
]
HEADER = ("pixdim", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x")


class RightAnteriorSuperior(OrientedIO):
    orientation = "RAS"


def write_turned(file, orientation: str) -> sitk.Image:
    """The same image of noise, stored in an orientation; a little oblique, with a spacing of its own for each axis."""
    array = np.random.default_rng(0).integers(0, 9, (9, 10, 11)).astype(np.float32)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.1, 0.7, 2.3))
    image.SetOrigin((-13.7, 51.3, 7.9))
    c, s = np.cos(0.1), np.sin(0.1)
    image.SetDirection((c, -s, 0, s, c, 0, 0, 0, 1))
    turned = sitk.DICOMOrient(image, orientation)
    sitk.WriteImage(turned, str(file))
    return turned


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_all_orientations_are_read_alike_and_written_as_they_were(orientation, tmp_path):
    write_turned(tmp_path / "canonical.nii.gz", "RAS")
    write_turned(tmp_path / "turned.nii.gz", orientation)
    reader = RightAnteriorSuperior()
    expected, canonical = SimpleITKIO().read_images([str(tmp_path / "canonical.nii.gz")])
    array, properties = reader.read_images([str(tmp_path / "turned.nii.gz")])
    assert np.array_equal(array, expected)
    assert np.allclose(properties["spacing"], canonical["spacing"])
    assert np.array_equal(array, SimpleITKIOWithReorient().read_images([str(tmp_path / "turned.nii.gz")])[0])

    labels = (array[0] > 4).astype(np.uint8)
    reader.write_seg(labels, str(tmp_path / "labels.nii.gz"), properties)
    image, written = (sitk.ReadImage(str(tmp_path / name)) for name in ("turned.nii.gz", "labels.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(image) > 4)
    assert all(image.GetMetaData(key) == written.GetMetaData(key) for key in HEADER if image.HasMetaDataKey(key))
    for of in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(image, of)() == getattr(written, of)()


def test_channels_of_different_directions_are_refused(tmp_path):
    write_turned(tmp_path / "a.nii.gz", "RAS")
    turned = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    turned.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(turned, str(tmp_path / "b.nii.gz"))
    with pytest.raises(ValueError, match="different directions"):
        RightAnteriorSuperior().read_images([str(tmp_path / "a.nii.gz"), str(tmp_path / "b.nii.gz")])


@pytest.mark.parametrize("orientation", ["LPS", "SRA", "IPL"])
def test_a_model_predicts_every_orientation_as_its_own(orientation, tmp_path):
    predictor = initialized(nmsw(num_patches=3), build_network())
    write_turned(tmp_path / "canonical.nii.gz", "RAS")
    predictor.predict_file(str(tmp_path / "canonical.nii.gz"), str(tmp_path / "expected.nii.gz"))
    orient(predictor, "RAS")
    write_turned(tmp_path / "turned.nii.gz", orientation)
    predictor.predict_file(str(tmp_path / "turned.nii.gz"), str(tmp_path / "labels.nii.gz"))
    expected, labels = (sitk.ReadImage(str(tmp_path / f"{name}.nii.gz")) for name in ("expected", "labels"))
    back = sitk.GetArrayFromImage(sitk.DICOMOrient(labels, "RAS"))
    assert np.array_equal(back, sitk.GetArrayFromImage(expected))
    assert len(set(back.flat)) > 1


@pytest.mark.parametrize("text", ["RAX", "RRS", "RA", "", "RLS", "RASL"])
def test_what_is_no_orientation_is_refused(text):
    with pytest.raises(UserError, match="give a letter for each axis"):
        parse_orientation(text)


def test_images_without_orientation_are_refused(tmp_path):
    predictor = initialized(nmsw(), build_network())
    predictor.plans_manager.plans["image_reader_writer"] = "Tiff3DIO"
    with pytest.raises(UserError, match="Tiff3DIO, which have no orientation"):
        orient(predictor, "RAS")
    flat = sitk.GetImageFromArray(np.zeros((4, 5), np.float32))
    sitk.WriteImage(flat, str(tmp_path / "flat.nii.gz"))
    with pytest.raises(ValueError, match="three axes"):
        RightAnteriorSuperior().read_images([str(tmp_path / "flat.nii.gz")])
