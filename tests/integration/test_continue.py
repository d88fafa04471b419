"""Training flags: `--c` after kills, `--val`, `--val_best`, `--npz`, `--disable_checkpointing`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import DATASET, run_all, set_configurations

pytestmark = pytest.mark.integration

MORTAL = "nnUNetTrainerNMSW_mortal"
TRAIN = f"nnUNetv2_train 998 3d_fullres 0 -p nnUNetPlans_small -tr {MORTAL} -device cpu"


@pytest.fixture(scope="module")
def prepared(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preprocessed dataset, with a seed in the plans."""
    folder = tmp_path_factory.mktemp("continue")
    shutil.copytree(workspace / "nnUNet_preprocessed", folder / "nnUNet_preprocessed")
    set_configurations(plans_file(folder), **{"3d_fullres": {"nmsw": {"seed": 3}}})
    return folder


@pytest.fixture(scope="module")
def results(prepared: Path) -> Path:
    """Folder `whole` with a training that ran through, folder `killed` with one that was killed four times."""
    killed = f"nnUNet_results={prepared}/killed"
    run_all(
        f"nnUNet_results={prepared}/whole {TRAIN} --npz",
        f"-{killed} NMSW_TEST_KILL='epoch 0 step 2' {TRAIN}",  # before there is a checkpoint
        f"-{killed} NMSW_TEST_KILL='epoch 1 step 1' {TRAIN} --c",
        f"-{killed} NMSW_TEST_KILL='epoch 1 checkpoint_latest' {TRAIN} --c",  # half of the file is written
        f"-{killed} NMSW_TEST_KILL=validation {TRAIN} --c",
        f"{killed} {TRAIN} --c --npz",
        workspace=prepared,
        # What is drawn in this process is drawn in the same order; worker processes run ahead of the training.
        nnUNet_n_proc_DA="0",
    )
    return prepared


def plans_file(folder: Path) -> Path:
    return folder / "nnUNet_preprocessed" / DATASET / "nnUNetPlans_small.json"


def fold(results: Path) -> Path:
    return results / DATASET / f"{MORTAL}__nnUNetPlans_small__3d_fullres" / "fold_0"


def checkpoint(results: Path, name: str = "checkpoint_final.pth") -> dict:
    content: dict = torch.load(fold(results) / name, weights_only=False)
    return content


def probabilities(results: Path) -> np.ndarray:
    (file,) = (fold(results) / "validation").glob("*.npz")
    array: np.ndarray = np.load(file)["probabilities"]
    return array


@pytest.mark.compatibility(
    "training flags",
    "--c after kills before the first checkpoint, in an epoch, while a checkpoint is written and in validation: with a "
    "seed and without worker processes the same weights, optimizer, benefit scale, log and validation, bit for bit",
)
def test_a_killed_training_goes_on_to_the_same_result(results):
    logs = [file.read_text() for file in fold(results / "killed").glob("training_log_*.txt")]
    begun = sorted(line.split()[-1] for log in logs for line in log.splitlines() if ": Epoch " in line)
    assert len(begun) > 3  # it was killed
    whole, continued = checkpoint(results / "whole"), checkpoint(results / "killed")
    assert continued["current_epoch"] == whole["current_epoch"] == 3
    assert np.isfinite(whole["logging"]["train_losses"]).all()
    for name, weights in whole["network_weights"].items():
        assert torch.equal(weights, continued["network_weights"][name]), name
    assert whole["network_weights"]["benefit_scale"] > 0
    momentum = [
        [state["momentum_buffer"] for state in c["optimizer_state"]["state"].values()] for c in (whole, continued)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*momentum, strict=True))
    for name, values in whole["logging"].items():
        assert len(values) == 3
        if "timestamps" not in name:
            assert np.array_equal(values, continued["logging"][name], equal_nan=True), name
    assert continued["init_args"]["plans"] == whole["init_args"]["plans"]
    assert np.array_equal(probabilities(results / "whole"), probabilities(results / "killed"))
    assert not list(results.rglob("*.unfinished"))
    assert not list(results.rglob("checkpoint_latest.pth"))


@pytest.mark.compatibility("training flags", "--npz: probabilities and properties of the validation cases are written")
def test_npz(results):
    files = {file.suffix for file in (fold(results / "whole") / "validation").iterdir()}
    assert files == {".npz", ".pkl", ".gz", ".json"}
    sums = probabilities(results / "whole").sum(0)
    assert np.allclose(sums, 1, atol=1e-3)


@pytest.mark.compatibility("training flags", "--val: the same validation again; --val_best: that of checkpoint_best")
@pytest.mark.compatibility("training flags", "--disable_checkpointing: trains and validates, and writes no checkpoint")
def test_other_flags(results):
    trained = fold(results / "whole")
    expected = probabilities(results / "whole")
    shutil.copytree(results / "whole", results / "best")
    # A checkpoint that nothing but --val_best can have read: every class is as probable.
    best = checkpoint(results / "best", "checkpoint_best.pth")
    best["network_weights"] = {name: torch.zeros_like(w) for name, w in best["network_weights"].items()}
    torch.save(best, fold(results / "best") / "checkpoint_best.pth")
    (trained / "validation" / "summary.json").unlink()
    run_all(
        f"nnUNet_results={results}/whole {TRAIN} --val --npz",
        f"nnUNet_results={results}/best {TRAIN} --val --val_best --npz",
        f"nnUNet_results={results}/none {TRAIN} --disable_checkpointing",
        workspace=results,
        nnUNet_n_proc_DA="0",
    )
    assert (trained / "validation" / "summary.json").is_file()
    assert np.array_equal(probabilities(results / "whole"), expected)
    assert np.allclose(probabilities(results / "best"), 1 / 3, atol=1e-3)
    assert json.loads((fold(results / "none") / "validation" / "summary.json").read_text())["foreground_mean"]
    assert not list((results / "none").rglob("*.pth*"))


@pytest.mark.compatibility("training flags", "--c and --val with changed settings: refused in one line")
def test_changed_settings_are_refused(results):
    set_configurations(plans_file(results), **{"3d_fullres": {"nmsw": {"seed": 3, "random_windows": 1}}})
    refused = run_all(
        f"-nnUNet_results={results}/whole {TRAIN} --c",
        f"-nnUNet_results={results}/whole {TRAIN} --val",
        workspace=results,
    )
    set_configurations(plans_file(results), **{"3d_fullres": {"nmsw": {"seed": 3}}})
    errors = [line for line in refused.stderr.splitlines() if line.startswith("setting")]
    assert len(errors) == 2
    assert '"random_windows" under "nmsw" in the plans is 1, and was 2' in errors[0]
    assert "Traceback" not in refused.stderr
    assert len(list(fold(results / "whole").glob("checkpoint_*"))) == 2
