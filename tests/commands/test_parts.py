"""A part of a folder is checked by its own cases."""

import types

import pytest
from predictors import nmsw
from tiny import DATASET_JSON, build_network, initialized
from untrained import write_image, write_model

from nnunet_nmsw.commands import predict
from nnunet_nmsw.commands.images import find_images, still_to_do
from nnunet_nmsw.errors import UserError


@pytest.fixture
def images(tmp_path):
    """Four cases, the second of which is predicted, and has no probabilities."""
    (tmp_path / "in").mkdir()
    for name in "abcd":
        write_image(tmp_path / "in" / f"{name}_0000.nii.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.nii.gz").touch()
    model = write_model(tmp_path / "model")
    return find_images([str(tmp_path / "in")], str(tmp_path / "out"), model), model


@pytest.mark.parametrize("part", [(0, 1), (0, 2), (1, 2), (2, 3), (4, 5)])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("save_probabilities", [False, True])
def test_the_cases_of_a_part_are_those_that_nnunet_takes(images, part, overwrite, save_probabilities):
    found, model = images
    predictor = initialized(nmsw(), build_network())
    expected, *_ = predictor.input_and_output(
        f"{model.parent}/in", found.output, None, overwrite, part, save_probabilities
    )
    assert still_to_do(found, *part, overwrite, save_probabilities, model) == expected


def test_the_previous_stage_is_needed_of_a_parts_own_cases(images, tmp_path):
    found, model = images
    (tmp_path / "previous").mkdir()
    for name in "ac":
        (tmp_path / "previous" / f"{name}.nii.gz").touch()
    cascade = types.SimpleNamespace(
        configuration_manager=types.SimpleNamespace(previous_stage_name="3d_lowres"), dataset_json=DATASET_JSON
    )
    given = str(tmp_path / "previous")
    parts = [found._replace(cases=still_to_do(found, part, 2, True, False, model)) for part in (0, 1)]
    predict._check_previous_stage(parts[0], cascade, given)
    with pytest.raises(UserError, match=r"has no b\.nii\.gz, the 3d_lowres of an input image"):
        predict._check_previous_stage(parts[1], cascade, given)
    with pytest.raises(UserError, match="the cascade needs the predictions of 3d_lowres"):
        predict._check_previous_stage(found, cascade, None)
    one = found._replace(cases=found.cases[:1], output="labels.nii.gz", ending=".nii.gz")
    predict._check_previous_stage(one, cascade, f"{given}/a.nii.gz")
    for nothing in (given, f"{given}/b.nii.gz"):
        with pytest.raises(UserError, match="is no file: give the 3d_lowres of this image"):
            predict._check_previous_stage(one, cascade, nothing)


def test_a_part_without_cases_is_nothing_to_do(images, tmp_path, capsys):
    _, model = images
    command = ["-i", f"{tmp_path}/in", "-o", f"{tmp_path}/out", "-m", str(model), "-device", "cpu", "-k", "2"]
    predict.main([*command, "-num_parts", "5", "-part_id", "4", "--max_memory", "8G"])
    assert sorted(file.name for file in (tmp_path / "out").glob("*.nii.gz")) == ["b.nii.gz"]
