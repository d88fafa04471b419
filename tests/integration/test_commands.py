"""The installed console commands, in subprocesses, on a tiny generated dataset."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from commands import DATASET, TRAINER, run, run_executable

from nnunet_nmsw.commands.predict import main

pytestmark = pytest.mark.integration


def set_plans(workspace: Path, **nmsw: object) -> None:
    """Write the settings under `nmsw` into the plans."""
    file = workspace / "nnUNet_preprocessed" / DATASET / "nnUNetPlans_small.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["nmsw"] = nmsw
    file.write_text(json.dumps(plans))


def images(workspace: Path) -> Path:
    return workspace / "nnUNet_raw" / DATASET / "imagesTs"


def prediction(folder: Path, case: str = "case_005") -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{case}.nii.gz")))
    return array


@pytest.mark.compatibility("label types", "plain labels: nnUNetv2_plan_and_preprocess, nnUNetv2_train with validation")
@pytest.mark.compatibility("configurations", "3d_fullres: nnUNetv2_train")
def test_training_leaves_what_nnunet_leaves(model):
    fold = model / "fold_0"
    for name in (
        "checkpoint_final.pth",
        "checkpoint_best.pth",
        "progress.png",
        "validation/summary.json",
        "progress_nmsw.png",
    ):
        assert (fold / name).is_file(), name
    assert list((fold / "sampling").glob("epoch_*.png"))
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert "foreground_mean" in summary
    settings = json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]["nmsw"]
    assert settings["downsampling_factor"]
    (log,) = fold.glob("training_log_*.txt")
    text = log.read_text()
    for part in ("NMSW loss local", "global", "fused", "window entropy", "windows with foreground", "fusion weights"):
        assert part in text


def test_two_flags_are_enough(workspace, model):
    output = workspace / "two_flags"
    command = f"nmsw_predict -i {images(workspace)} -o {output} -device cpu -npp 1 -nps 1"
    result = run_executable(command, workspace)
    assert model.name in result.stdout
    for case in ("case_005", "case_006"):
        image = sitk.ReadImage(str(images(workspace) / f"{case}_0000.nii.gz"))
        labels = sitk.ReadImage(str(output / f"{case}.nii.gz"))
        assert labels.GetSize() == image.GetSize()
        assert labels.GetSpacing() == image.GetSpacing()
    assert (output / "predict_from_raw_data_args.json").is_file()


def test_patches_probabilities_and_model_folder(workspace, model):
    output = workspace / "flags"
    flags = "-k 3 --save_patches --save_probabilities --disable_tta --disable_progress_bar --verbose --not_on_device"
    run(
        f"nmsw_predict -i {images(workspace)} -o {output} -m {model} -f 0 -chk checkpoint_best.pth "
        f"-device cpu -npp 1 -nps 1 -num_parts 2 -part_id 1 {flags}",
        workspace,
        nnUNet_results="",
    )
    assert not (output / "case_005.nii.gz").exists()
    assert (output / "case_006.npz").is_file()
    windows = json.loads((output / "patches" / "case_006.json").read_text())
    assert windows["patches_per_model"] == [3]
    overlay = prediction(output / "patches", "case_006")
    assert overlay.shape == prediction(output, "case_006").shape
    assert set(np.unique(overlay)) <= {0, 1, 2, 3}
    assert 1 in overlay


def test_continued_predictions_leave_out_what_is_there(workspace):
    output = workspace / "continued"
    output.mkdir()
    (output / "case_005.nii.gz").write_bytes(b"not touched")
    flags = "-d 998 -p nnUNetPlans_small --continue_prediction --disable_tta -device cpu -npp 1 -nps 1 -k 10%"
    run(f"nmsw_predict -i {images(workspace)} -o {output} -tr {TRAINER} {flags}", workspace)
    assert (output / "case_005.nii.gz").read_bytes() == b"not touched"
    assert (output / "case_006.nii.gz").is_file()


@pytest.mark.compatibility("stock code", "nnUNetv2_predict on an NMSW model is the local branch's sliding window")
def test_stock_prediction_is_the_local_branchs_sliding_window(workspace):
    output = workspace / "stock"
    model = f"-d 998 -c 3d_fullres -p nnUNetPlans_small -tr {TRAINER} -f 0"
    run(f"nnUNetv2_predict -i {images(workspace)} -o {output} {model} --disable_tta -device cpu", workspace)
    # The same from Python, as nnU-Net's documentation has it.
    code = (
        "import torch\n"
        "from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor\n"
        "if __name__ == '__main__':\n"
        "    p = nnUNetPredictor(use_mirroring=False, device=torch.device('cpu'))\n"
        f"    p.initialize_from_trained_model_folder({str(workspace / 'nnUNet_results' / DATASET)!r} + "
        f"'/{TRAINER}__nnUNetPlans_small__3d_fullres', (0,))\n"
        f"    p.predict_from_files({str(images(workspace))!r}, {str(workspace / 'python')!r}, "
        "num_processes_preprocessing=1, num_processes_segmentation_export=1)\n"
    )
    script = workspace / "predict.py"
    script.write_text(code)
    subprocess.run([sys.executable, str(script)], check=True, capture_output=True)
    for case in ("case_005", "case_006"):
        assert np.array_equal(prediction(output, case), prediction(workspace / "python", case))


def test_wrong_settings_end_training_in_one_line_before_anything_is_written(workspace):
    results = workspace / "nnUNet_results" / DATASET
    before = sorted(results.rglob("*"))
    set_plans(workspace, score_training="magic")
    train = "nnUNetv2_train 998 3d_fullres 0 -p nnUNetPlans_small -tr nnUNetTrainerNMSW_5epochs -device cpu"
    result = run(train, workspace, check=False)
    set_plans(workspace)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1] == (
        'setting "score_training" under "nmsw" in the plans is \'magic\'; allowed: one of benefit, contribution'
    )
    assert sorted(results.rglob("*")) == before


@pytest.mark.compatibility("configurations", "2d: nnUNetv2_train refuses in one line")
def test_training_a_2d_configuration_is_refused(workspace):
    file = workspace / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    assert "2d" in json.loads(file.read_text())["configurations"]
    result = run(f"nnUNetv2_train 998 2d 0 -tr {TRAINER} -device cpu", workspace, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "3d_fullres" in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("-k 0", "-k is"),
        ("-k 200%", "-k is"),
        ("-k foo", "-k is"),
        ("-d 998 -tr nnUNetTrainerNMSW_250epochs -p nnUNetPlans_small", "not the folder of a trained model"),
        ("-d 123", "no such dataset"),
        ("-chk checkpoint_other.pth", "no fold in"),
        ("-f 3", "there is no checkpoint"),
        ("-f x", "give folds as numbers"),
        ("-m nowhere", "not the folder of a trained model"),
        ("-i empty", "no cases"),
        ("-i missing", "does not exist"),
        ("-i two_channels", "1 channel"),
        ("-part_id 2 -num_parts 2", "-part_id is 2"),
        ("-m unreadable_model", "no checkpoint of PyTorch"),
        ("-m stock_model", "no NMSW trainer"),
        ("--max_memory lots", "such as 8G"),
        ("--bfloat16 -device cuda", "--precision bfloat16 is for -device cpu"),
        ("--max_memory 100M -f 0", "too small for one patch"),
        ("--ray_address host:6379", "are for --engine ray"),
    ],
)
def test_bad_input_is_refused_before_any_work(workspace, model, flags, says, monkeypatch):
    """The command's function in this process, which saves starting Python for each; the next test is the command."""
    monkeypatch.chdir(workspace)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(workspace / variable))
    (workspace / "empty").mkdir(exist_ok=True)
    two_channels = workspace / "two_channels"
    two_channels.mkdir(exist_ok=True)
    for channel in (0, 1):
        shutil.copy(images(workspace) / "case_005_0000.nii.gz", two_channels / f"case_005_000{channel}.nii.gz")
    make_broken_models(workspace, model)
    source = [] if "-i " in flags else ["-i", str(images(workspace))]
    with pytest.raises(SystemExit) as error:
        main([*source, "-o", "out", "-device", "cpu", *flags.split()])
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (workspace / "out").exists()


def test_an_error_is_one_line_without_a_traceback(workspace):
    result = run_executable(f"nmsw_predict -i {images(workspace)} -o out -device cpu -k foo", workspace, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith('-k is "foo"')


def make_broken_models(workspace: Path, model: Path) -> None:
    """One model with an unreadable checkpoint, one that a stock trainer could have written."""
    if (workspace / "stock_model_made").exists():
        return
    for name in ("unreadable_model", "stock_model"):
        shutil.copytree(model, workspace / name, ignore=shutil.ignore_patterns("validation", "*.png"))
    (workspace / "unreadable_model" / "fold_0" / "checkpoint_final.pth").write_bytes(b"half a file")
    code = (
        "import torch\n"
        f"file = {str(workspace / 'stock_model' / 'fold_0' / 'checkpoint_final.pth')!r}\n"
        "c = torch.load(file, weights_only=False)\n"
        "c['trainer_name'] = 'nnUNetTrainer'\n"
        "w = c['network_weights']\n"
        "c['network_weights'] = {k[13:]: v for k, v in w.items() if k.startswith('local_branch.')}\n"
        "torch.save(c, file)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    (workspace / "stock_model_made").touch()


def test_missing_environment(workspace):
    result = run(f"nmsw_predict -i {images(workspace)} -o out -device cpu", workspace, check=False, nnUNet_results="")
    assert result.returncode == 1
    assert "nnUNet_results is not set" in result.stderr.strip().splitlines()[-1]


def test_several_models_are_listed(workspace, model):
    other = model.with_name(f"nnUNetTrainerNMSW_5epochs__{model.name.split('__', 1)[1]}")
    shutil.copytree(model, other)
    try:
        result = run(f"nmsw_predict -i {images(workspace)} -o out -device cpu", workspace, check=False)
    finally:
        shutil.rmtree(other)
    assert result.returncode == 1
    assert str(model) in result.stderr
    assert str(other) in result.stderr
