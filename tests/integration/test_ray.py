"""Prediction by Ray's workers, here all on one machine."""

import json
import os
from pathlib import Path

import pytest
import torch
from commands import DATASET, TRAINER, run
from test_commands import images, prediction

from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.ray_engine import RayPredictor, Workers

pytestmark = pytest.mark.integration

FLAGS = "-d 998 -p nnUNetPlans_small -k 10% --disable_tta -device cpu --save_patches"


@pytest.mark.compatibility("distributed", "a folder on many machines: nmsw_predict --engine ray")
def test_ray_predicts_what_one_process_does(workspace, model):
    command = f"nmsw_predict -i {images(workspace)} -tr {TRAINER} {FLAGS}"
    run(f"{command} -o {workspace / 'local'} -npp 1 -nps 1 --max_memory 8G", workspace)
    workers = "--engine ray --cores_per_worker 1 --max_memory 8G"
    run(f"{command} -o {workspace / 'ray'} {workers}", workspace)
    names = sorted(str(file.relative_to(workspace / "local")) for file in (workspace / "local").rglob("*"))
    assert names == sorted(str(file.relative_to(workspace / "ray")) for file in (workspace / "ray").rglob("*"))
    for case in ("case_005", "case_006"):
        # With other numbers of threads sums round otherwise, and of windows with the same score another may come first.
        assert (prediction(workspace / "ray", case) != prediction(workspace / "local", case)).mean() < 0.01
        local, by_ray = (
            json.loads((workspace / of / "patches" / f"{case}.json").read_text()) for of in ("local", "ray")
        )
        scores, by_ray_scores = ([window["score"] for window in of.pop("windows")] for of in (local, by_ray))
        assert by_ray_scores == pytest.approx(scores, rel=1e-2)
        assert by_ray == local


def test_cases_whose_workers_die_are_done_by_others_and_none_twice(workspace, model, tmp_path):
    log = tmp_path / "predicted"
    log.touch()

    def make() -> NMSWPredictor:
        class Mortal(NMSWPredictor):
            def predict_from_data_iterator(self, cases, *args):
                before = len(log.read_text().split())
                with log.open("a") as file:
                    file.write(f"{Path(cases[0]['ofile']).name}\n")
                if before == 0:
                    os._exit(1)
                result = super().predict_from_data_iterator(cases, *args)
                if before == 1:
                    os._exit(1)  # all is written, and nobody has been told
                return result

        predictor = Mortal(3, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
        return predictor

    by_ray = RayPredictor(Workers(make, cores=2), device=torch.device("cpu"), allow_tqdm=False)
    by_ray.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    by_ray.predict_from_files(str(images(workspace)), str(tmp_path / "out"))
    predicted = log.read_text().split()
    assert set(predicted) == {"case_005", "case_006"}
    assert len(predicted) == 3  # the one that was not finished a second time, the one that was written not
    assert {file.name for file in (tmp_path / "out").glob("case*")} == {"case_005.nii.gz", "case_006.nii.gz"}


def test_a_cluster_that_is_not_there(workspace, model):
    flags = f"{FLAGS} -tr {TRAINER} --engine ray --ray_address 127.0.0.1:1"
    result = run(f"nmsw_predict -i {images(workspace)} -o {workspace / 'unreachable'} {flags}", workspace, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("cannot reach the Ray cluster at 127.0.0.1:1")
    assert DATASET not in result.stderr
