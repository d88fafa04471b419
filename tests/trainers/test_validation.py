"""What a validation says of a model."""

import torch
from predictors import nmsw
from tiny import build_network, initialized

from nnunet_nmsw.selection.calibration import THRESHOLDS
from nnunet_nmsw.trainers.cases import PreprocessedCase
from nnunet_nmsw.trainers.validation import calibrate
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
