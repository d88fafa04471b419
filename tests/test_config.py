import json
from dataclasses import FrozenInstanceError

import pytest
from tiny import make_configuration

from nnunet_nmsw.settings import NMSWConfig, default_downsampling_factor, parse_num_patches, resolve_num_patches
from nnunet_nmsw.errors import UserError


def test_defaults_are_resolved_and_survive_a_round_trip_through_json():
    config = NMSWConfig.from_configuration(make_configuration())
    saved = {**make_configuration(), "nmsw": json.loads(json.dumps(config.to_dict()))}
    assert NMSWConfig.from_configuration(saved) == config
    with pytest.raises(FrozenInstanceError):
        config.temperature = 1.0


def test_overrides_are_taken():
    config = NMSWConfig.from_configuration(make_configuration(num_patches=7, downsampling_factor=[1, 2, 2]))
    assert config.num_patches == 7
    assert config.downsampling_factor == (1, 2, 2)


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("num_patch", 3, "num_patches"),  # unknown: the allowed names are listed
        ("num_patches", 0, "10%"),
        ("gradient_path", "magic", "none, contribution, contribution_logits, input"),
        ("selection", "best", "top_k, greedy_coverage, greedy_benefit"),
        ("fusion", "mean", "class_weights, affine"),
        ("fuse_random_windows", 1, "true or false"),
        ("seed", -1, "at least 0"),
        ("benefit_loss_weight", 0, "nothing would train the scores"),
        ("coverage_discount", 2, "up to 1"),
        ("downsampling_factor", [2, 2], "three integers"),
        ("downsampling_factor", [2, 0, 2], "three integers"),
        ("global_width", 0, "above 0"),
        ("global_width", "wide", "above 0"),
        ("temperature", -1, "above 0"),
        ("candidate_threshold", 1, "below 1"),
        ("sampled_windows", 0, "from 1 to 1024"),
        ("sampled_windows", 100_000, "from 1 to 1024"),
        ("placement_step", 1e-9, "a voxel of a patch"),
        ("tile_step_size", 1e-9, "a voxel of a patch"),
        ("downsampling_factor", [1000] * 3, "no more voxels than a patch"),
        ("random_windows", 1.5, "from 0 to 1024"),
        ("entropy_weight", float("nan"), "at least 0"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(setting, value, says):
    with pytest.raises(UserError) as error:
        NMSWConfig.from_configuration(make_configuration(**{setting: value}))
    message = str(error.value)
    assert setting in message
    assert says in message
    assert "\n" not in message


def test_a_2d_configuration_is_refused():
    with pytest.raises(UserError, match="2D"):
        NMSWConfig.from_configuration(make_configuration((8, 8)))


def test_the_papers_setting_gets_the_papers_downsampling():
    assert default_downsampling_factor([480, 480, 384], [128, 128, 128], [1, 1, 1], 1.0) == (3, 3, 3)


def test_downsampling_is_isotropic_in_space():
    factor = default_downsampling_factor([40, 512, 512], [16, 128, 128], [5.0, 1.0, 1.0], 1.0)
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
