"""What a validation says of a model."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from predictors import nmsw
from tiny import build_network, initialized, make_plans, make_trainer

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.selection.calibration import THRESHOLDS
from nnunet_nmsw.trainers.cases import PreprocessedCase
from nnunet_nmsw.trainers.validation import _save_for_next_stages, calibrate, check_losses
from nnunet_nmsw.volume.labels import LabelEncoding


def test_each_threshold_is_calibrated_by_what_a_prediction_with_it_is_like():
    network = build_network(downsampling_factor=[1, 2, 2]).eval()
    with torch.no_grad():
        network.local_branch.decoder.seg_layers[-1].weight *= 10
        network.global_branch.decoder.seg_layers[-1].weight *= 3
    volume_CDHW = torch.randn(1, 16, 20, 24, generator=torch.Generator().manual_seed(0))
    predictions = {}
    for threshold in THRESHOLDS:
        predictor = initialized(nmsw(num_patches="auto", threshold=threshold), network)
        properties = {
            "spacing": [1, 1, 1],
            "shape_before_cropping": (16, 20, 24),
            "shape_after_cropping_and_before_resampling": (16, 20, 24),
            "bbox_used_for_cropping": [[0, 16], [0, 20], [0, 24]],
        }
        predictions[threshold] = predictor.predict_case({"data": volume_CDHW, "data_properties": properties})
    counts = [len(predicted.windows[0].starts) for predicted in predictions.values()]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 2
    for threshold, predicted in predictions.items():
        case = PreprocessedCase("case", volume_CDHW, predicted.segmentation[None], {})
        measured = calibrate(network, iter([case]), LabelEncoding(3), torch.device("cpu"))
        dice_of = {}
        for of_threshold, ((count, dice),) in measured.items():
            assert count == len(predictions[of_threshold].windows[0].starts)
            dice_of[of_threshold] = dice
        assert (dice_of[threshold] == 1).all()
        others = [dice_of[other] for other in THRESHOLDS if counts_differ(predictions, other, threshold)]
        assert all((dice < 1).any() for dice in others)


def counts_differ(predictions, one, other):
    """Whether predictions of two thresholds have other numbers of windows."""
    return len(predictions[one].windows[0].starts) != len(predictions[other].windows[0].starts)


@pytest.mark.usefixtures("folders")
def test_the_next_stage_gets_what_was_predicted_in_its_resolution(tmp_path):
    plans = make_plans()
    plans["configurations"]["next"] = {"inherits_from": "3d_fullres", "data_identifier": "of_next"}
    plans["configurations"]["3d_fullres"] |= {"next_stage": "next", "spacing": [2.0] * 3}
    trainer = make_trainer(plans)
    folder = Path(trainer.preprocessed_dataset_folder_base, "of_next")
    folder.mkdir(parents=True)
    data = np.zeros((1, 12, 14, 16), np.float32)
    nnUNetDatasetBlosc2.save_case(data, data.astype(np.int16), {}, str(folder / "case"))
    labels = torch.zeros(6, 7, 8, dtype=torch.int64)
    labels[1:3, 2:6, 1:4], labels[4:, :3, 5:] = 1, 2
    logits_CDHW = 10 * F.one_hot(labels, 3).permute(3, 0, 1, 2).float()
    properties = {"spacing": [1.0] * 3, "shape_after_cropping_and_before_resampling": (12, 14, 16)}
    case = {"ofile": str(tmp_path / "validation" / "case"), "data_properties": properties}
    _save_for_next_stages(trainer, case, logits_CDHW)
    predicted = Path(trainer.output_folder_base, "predicted_next_stage", "next")
    assert [file.stem for file in predicted.iterdir()] == ["case"]
    cases = nnUNetDatasetBlosc2(str(folder), folder_with_segs_from_previous_stage=str(predicted))
    _, _, previous, _ = cases.load_case("case")
    expected = F.interpolate(labels[None, None].float(), (12, 14, 16), mode="nearest-exact")[0, 0].numpy()
    assert previous.shape == expected.shape
    assert (previous[:] == expected).mean() > 0.97  # but for the borders, which are interpolated
    assert (previous[:] > 0).sum() > 0.7 * (expected > 0).sum()


def test_a_training_stops_where_it_cannot_go_on():
    network = build_network()
    check_losses([1.0, float("nan"), float("inf")], network, 3)  # half precision overflows now and then
    with pytest.raises(UserError, match=r"epoch 3: no step had a finite loss"):
        check_losses([float("nan")] * 2, network, 3)
    with torch.no_grad():
        network.local_branch.decoder.seg_layers[-1].bias[0] = float("inf")
    check_losses([1.0, 2.0], network, 3)  # seen in the next step's loss, at the latest
    with pytest.raises(UserError, match=r"weights of local_branch\.decoder\.seg_layers\.0\.bias are no numbers"):
        check_losses([1.0, float("nan")], network, 3)
