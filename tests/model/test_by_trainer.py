"""Networks by the names of their trainers."""

import subprocess
import sys
from unittest.mock import Mock

import old_model
import pytest

import nnunet_nmsw.trainers
from nnunet_nmsw.model.by_trainer import parts_by_trainer, predicts_benefits
from nnunet_nmsw.model.context import AddedContext


@pytest.mark.parametrize("name", nnunet_nmsw.trainers.__all__)
def test_the_table_says_what_the_trainer_builds(name, monkeypatch):
    taken = []
    monkeypatch.setattr("nnunet_nmsw.trainers.builder.build_network", lambda *given: taken.append(given[-1]) or Mock())
    getattr(nnunet_nmsw.trainers, name).build_network_architecture(None, None, 1, 2)
    (parts_of,) = taken
    settings = Mock(score_training="benefit")
    expected, found = parts_of(settings), parts_by_trainer(name)(settings)
    assert type(found.sampler) is type(expected.sampler)
    assert found[1:] == expected[1:]
    assert (found.sampler.at_inference.name == "top_k") == ("paper" in name)
    assert (found.context is AddedContext) == ("retrofit_context" in name)


def test_who_predicts_benefits():
    settings = Mock(score_training="benefit")
    assert predicts_benefits("nnUNetTrainerNMSW_5epochs", settings)
    assert predicts_benefits("MyTrainerNMSW", settings)
    assert not predicts_benefits("nnUNetTrainerNMSW_paper_5epochs", settings)
    assert not predicts_benefits("nnUNetTrainerNMSW", Mock(score_training="contribution"))


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainer",
        "nnUNetTrainer_5epochs",
        "MyTrainerNMSW",
        "nnUNetTrainerNMSW_mine",
        "nnUNetTrainerNMSW_30epochs",
        "",
    ],
)
def test_other_trainers_are_nnunets_to_find(name):
    assert parts_by_trainer(name) is None


def test_a_model_is_loaded_without_any_trainer():
    """The import of nnU-Net's trainers takes longer than the prediction of a small image."""
    program = f"""
import sys, torch
from nnunet_nmsw.inference.predictor import NMSWPredictor
predictor = NMSWPredictor(device=torch.device("cpu"), allow_tqdm=False)
predictor.initialize_from_trained_model_folder({str(old_model.FOLDER / "model")!r}, (0,))
print([name for name in sys.modules if name.startswith(("nnunetv2.training.nnUNetTrainer", "nnunet_nmsw.trainers"))])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
