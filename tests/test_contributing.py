"""What CONTRIBUTING.md says how to add, added."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from tiny import build_network
from torch import nn
from training import ENCODING, training_step

from nnunet_nmsw.evaluation.methods import build_methods, primary_method, timed_methods
from nnunet_nmsw.evaluation.metrics import METRICS, Metric, case_metrics
from nnunet_nmsw.evaluation.yardsticks import WAYS, CaseFacts, Way
from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.by_score import chosen, top_k
from nnunet_nmsw.selection.interface import CoarsePrediction, candidates, scores
from nnunet_nmsw.volume.windows import WindowGrid

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
NAMES = {
    "nn": nn,
    "math": math,
    "scores": scores,
    "candidates": candidates,
    "chosen": chosen,
    "top_k": top_k,
    "WAYS": WAYS,
    "Way": Way,
    "METRICS": METRICS,
    "Metric": Metric,
}


@pytest.fixture
def added(monkeypatch):
    """The names that the blocks define; tables are as they were afterwards."""
    for table in (WAYS, METRICS):
        for name in ("far_from_the_mean", "volume difference"):
            monkeypatch.delitem(table, name, raising=False)  # restored at the end, which removes them again
    names = dict(NAMES)
    before = dict(WAYS), dict(METRICS)
    for block in BLOCKS:
        exec(block, names)
    yield names
    for table, content in zip((WAYS, METRICS), before, strict=True):
        table.clear()
        table.update(content)


def test_a_backbone(added, monkeypatch):
    monkeypatch.setattr("nnunet_nmsw.backbones.OneConvolution", added["OneConvolution"], raising=False)
    setting = {"network_class_name": "nnunet_nmsw.backbones.OneConvolution"}
    assert training_step(build_network(global_architecture=setting), (16, 16, 16)).loss.isfinite()


def test_a_selector_and_a_yardstick(added):
    grid = WindowGrid((24, 24, 24), (8, 8, 8), (2, 2, 2))
    coarse = CoarsePrediction(torch.randn(3, *grid.low_shape), torch.randn(grid.low_shape), ENCODING)
    selector = WAYS["far_from_the_mean"].selector(CaseFacts())
    assert len(selector.choose(coarse, grid, Budget(4)).starts_K3) == 4
    methods = build_methods(False, [5], [False])
    (method,) = [m for m in methods if m.selection == "far_from_the_mean"]
    assert method.key == "nmsw_far_from_the_mean_5"
    assert method.name == "windows far from the mean, K = 5"
    assert method.is_yardstick
    assert method not in timed_methods(methods, primary_method(methods, 5))


@pytest.mark.usefixtures("added")
def test_a_metric(tmp_path):
    files = []
    for name, size in (("reference", 3), ("prediction", 5)):
        labels = np.zeros((10, 10, 10), np.uint8)
        labels[:size] = 1
        image = sitk.GetImageFromArray(labels)
        image.SetSpacing((1, 1, 2))
        files.append(str(tmp_path / f"{name}.nii.gz"))
        sitk.WriteImage(image, files[-1])
    (of_class,) = case_metrics(*files, SimpleITKIO(), [1], None, 2.0).values()
    assert of_class["volume difference"] == 2 * 100 * 2
