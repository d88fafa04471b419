"""Windows in JSON and overlay, counted as the file counts its voxels."""

import itertools
import json

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import make_plans

from nnunet_nmsw.inference.volume import ChosenWindows
from nnunet_nmsw.inference.windows import write_windows

ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(("RL", "AP", "IS")) for letters in itertools.product(*axes)
]
SHAPE_RAS = (22, 24, 26)


def write_image(file, orientation: str) -> None:
    """An image whose axes have an orientation, all others being the same."""
    in_ras = np.zeros(SHAPE_RAS, np.float32)
    turn = nibabel.orientations.ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    array = nibabel.orientations.apply_orientation(in_ras, turn)
    affine = np.diag([1.0, 2.0, 3.0, 1.0]) @ inv_ornt_aff(turn, SHAPE_RAS)
    nibabel.save(nibabel.Nifti1Image(array, affine), file)
    assert "".join(nibabel.aff2axcodes(affine)) == orientation


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("reader", [NibabelIO, NibabelIOWithReorient, SimpleITKIO, SimpleITKIOWithReorient])
def test_voxels_are_those_of_the_file(tmp_path, reader):
    """The box in the JSON is where the overlay, read without turning its axes, has the window's rank."""
    plans = PlansManager({**make_plans(), "image_reader_writer": reader.__name__})
    for orientation in ORIENTATIONS:
        file = str(tmp_path / f"{orientation}_0000.nii.gz")
        write_image(file, orientation)
        data, properties = reader().read_images([file])
        shape = data.shape[1:]
        properties |= {
            "shape_before_cropping": shape,
            "bbox_used_for_cropping": [[0, n] for n in shape],
            "shape_after_cropping_and_before_resampling": shape,
        }
        chosen = ChosenWindows(np.array([[1, 2, 3], [9, 0, 15]]), np.array([2.0, 1.0]), (4, 5, 6), shape, 77)
        write_windows(tmp_path, orientation, [chosen], properties, plans, ".nii.gz")
        overlay = nibabel.load(tmp_path / f"{orientation}.nii.gz")
        image = nibabel.load(file)
        np.testing.assert_allclose(overlay.affine, image.affine, atol=1e-5)
        values = np.asarray(overlay.dataobj)
        content = json.loads((tmp_path / f"{orientation}.json").read_text())
        assert content["image_shape_xyz"] == list(values.shape) == list(image.shape)
        for window in content["windows"]:
            first, last = np.array(window["first_voxel_xyz"]), np.array(window["last_voxel_xyz"])
            inside = np.zeros(values.shape, bool)
            inside[tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))] = True
            assert np.array_equal(values == window["rank"], inside), orientation
            # nibabel counts millimetres RAS, and the JSON LPS.
            centre = image.affine @ [*((first + last) / 2), 1]
            np.testing.assert_allclose(window["centre_mm_lps"], centre[:3] * [-1, -1, 1], atol=1e-3)


def test_ranks_beyond_those_of_a_byte_share_the_last(tmp_path):
    shape, number = (4, 5, 300), 300
    properties = {
        "spacing": [1.0] * 3,
        "sitk_stuff": {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)},
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, n] for n in shape],
        "shape_after_cropping_and_before_resampling": shape,
    }
    starts = np.stack([[0, 0, x] for x in range(number)])
    chosen = ChosenWindows(starts, np.linspace(1, 0, number), (4, 5, 1), shape, number)
    write_windows(tmp_path, "case", [chosen], properties, PlansManager(make_plans()), ".nii.gz")
    overlay = np.asarray(nibabel.load(tmp_path / "case.nii.gz").dataobj)
    assert overlay[:, 0, 0].tolist() == [min(rank, 255) for rank in range(1, number + 1)]
