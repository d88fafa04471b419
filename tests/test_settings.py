import json
from pathlib import Path

import pydantic
import pytest
from tiny import make_configuration

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.model.plans import default_downsampling_factor, settings_of
from nnunet_nmsw.selection.budget import parse_num_patches, resolve_num_patches
from nnunet_nmsw.settings import ALLOWED, RETIRED, table
from nnunet_nmsw.trainers.checkpoints import settings_of_training


def test_defaults_are_resolved_and_survive_a_round_trip_through_json():
    config = settings_of(make_configuration())
    saved = {**make_configuration(), "nmsw": json.loads(json.dumps(config.to_dict()))}
    assert settings_of(saved) == config
    with pytest.raises(pydantic.ValidationError):
        config.seed = 1


def test_overrides_are_taken():
    config = settings_of(make_configuration(num_patches=7, downsampling_factor=[1, 2, 2]))
    assert config.num_patches == 7
    assert config.downsampling_factor == (1, 2, 2)


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("num_patch", 3, "num_patches"),  # unknown: the allowed names are listed
        ("num_patches", 0, "10%"),
        ("score_training", "magic", "benefit, contribution"),
        ("gradient_path", "input", "0.1.0"),  # retired
        ("fuse_random_windows", 1, "0.1.0"),
        ("seed", -1, "at least 0"),
        ("downsampling_factor", [2, 2], "three integers"),
        ("downsampling_factor", [2, 0, 2], "three integers"),
        ("global_width", 0, "above 0"),
        ("global_width", "wide", "above 0"),
        ("sampled_windows", 0, "from 1 to 1024"),
        ("sampled_windows", 100_000, "from 1 to 1024"),
        ("downsampling_factor", [1000] * 3, "no more voxels than a patch"),
        ("random_windows", 1.5, "from 0 to 1024"),
        ("global_width", float("nan"), "above 0"),
        ("global_width", True, "above 0"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(setting, value, says):
    with pytest.raises(UserError) as error:
        settings_of(make_configuration(**{setting: value}))
    message = str(error.value)
    assert setting in message
    assert says in message
    assert "\n" not in message


def test_plans_of_models_trained_before_are_taken_where_nothing_has_changed():
    """They hold all settings of their version, and what dataset and trainer say by themselves."""
    before = {**RETIRED, "regions": True, "freeze_local_branch": False, "num_patches": "20%"}
    settings = settings_of(make_configuration(**before))
    assert settings == settings_of(make_configuration(num_patches="20%"))
    assert not set(settings.to_dict()) & set(before) - {"num_patches"}
    for name, value in RETIRED.items():
        with pytest.raises(UserError, match=f'"{name}".*0\\.1\\.0'):
            settings_of(make_configuration(**{**before, name: not value}))


def test_defaults_of_a_trainer_stand_behind_the_plans():
    configuration = make_configuration(sampled_windows=3)
    settings = settings_of(configuration, {"sampled_windows": 4, "random_windows": 1})
    assert (settings.sampled_windows, settings.random_windows) == (3, 1)


def test_the_documented_table_is_that_of_the_settings():
    """`python -m nnunet_nmsw.settings` prints it."""
    documented = (Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    assert table() in documented
    assert len(ALLOWED) == 10


def test_a_2d_configuration_is_refused():
    with pytest.raises(UserError, match="2D"):
        settings_of(make_configuration((8, 8)))


def test_the_papers_setting_gets_the_papers_downsampling():
    assert default_downsampling_factor([480, 480, 384], [128, 128, 128], [1, 1, 1]) == (3, 3, 3)


def test_downsampling_is_isotropic_in_space():
    factor = default_downsampling_factor([40, 512, 512], [16, 128, 128], [5.0, 1.0, 1.0])
    assert factor[0] == 1
    assert factor[1] == factor[2] > 2


@pytest.mark.parametrize(
    ("given", "windows", "patches"),
    [("10%", 245, 25), ("100%", 7, 7), ("1%", 7, 1), (5, 3, 3), ("all", 9, 9), ("4", 9, 4)],
)
def test_number_of_patches(given, windows, patches):
    assert resolve_num_patches(parse_num_patches(given), windows) == patches


@pytest.mark.parametrize("given", ["0", "200%", "foo", "0%", "-3", "1.5", "", "%", "nan%"])
def test_impossible_numbers_of_patches(given):
    with pytest.raises(UserError, match="-k"):
        parse_num_patches(given)


@pytest.mark.parametrize(("batch_size", "windows"), [(1, (1, 1)), (2, (1, 1)), (3, (2, 1)), (4, (2, 2)), (9, (5, 4))])
def test_a_step_has_as_many_patches_as_the_plans_batch(batch_size, windows):
    configuration = {**make_configuration(), "batch_size": batch_size}
    settings = settings_of(configuration)
    assert (settings.sampled_windows, settings.random_windows) == windows
    del configuration["batch_size"]
    assert settings_of(configuration).random_windows == 1


def test_a_training_that_goes_on_keeps_the_windows_that_the_plans_do_not_name():
    settings = settings_of(make_configuration())
    before = settings.model_copy(update={"sampled_windows": 2, "random_windows": 2})
    plans = {"configurations": {"3d_fullres": {"nmsw": before.to_dict()}}}
    checkpoint = {"init_args": {"plans": plans}}
    assert settings_of_training(checkpoint, "3d_fullres", settings, set(), "fold_0") == before
    with pytest.raises(UserError, match=r'"sampled_windows" under "nmsw" in the plans is 1, and was 2 .* fold_0'):
        settings_of_training(checkpoint, "3d_fullres", settings, {"sampled_windows"}, "fold_0")
    wider = settings.model_copy(update={"global_width": 1.0})
    with pytest.raises(UserError, match='"global_width"'):
        settings_of_training(checkpoint, "3d_fullres", wider, set(), "fold_0")
