"""What `nmsw_retrofit` decides: which folds begin, go on, are validated or done, and what it refuses."""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DATASET_JSON, make_plans
from untrained import refused_by, write_model

from nnunet_nmsw.commands import retrofit
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import sha256_of
from nnunet_nmsw.selection.calibration import CALIBRATION_KEY

DATASET, SPLITS = "Dataset998_Tiny", [{"train": ["b"], "val": ["a"]}, {"train": ["a"], "val": ["b"]}]
STOCK, RETROFIT = (f"{name}__nnUNetPlans__3d_fullres" for name in ("nnUNetTrainer", "nnUNetTrainerNMSW_retrofit"))
CALIBRATION = {"cases": 1, "thresholds": [{"stop_at": 0.1, "mean_dice": 0.5, "patches": [3]}]}


@pytest.fixture
def stock(folders: Path) -> Path:
    """A stock model of two folds, with its dataset."""
    model = write_model(folders / "nnUNet_results" / DATASET / STOCK, "nnUNetTrainer")
    write_other_fold(model, fold=1)
    preprocessed, raw = (folders / name / DATASET for name in ("nnUNet_preprocessed", "nnUNet_raw"))
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for case in "ab":
        (raw / "imagesTr" / f"{case}_0000.nii.gz").touch()
        (raw / "labelsTr" / f"{case}.nii.gz").touch()
    (raw / "dataset.json").write_text(json.dumps({**DATASET_JSON, "numTraining": 2}))
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(make_plans()))
    (preprocessed / "dataset.json").write_text(json.dumps(DATASET_JSON))
    (preprocessed / "splits_final.json").write_text(json.dumps(SPLITS))
    return model


def write_other_fold(model: Path, fold: int | str, **changes: Any) -> None:
    """A fold as fold 0, with changes of its checkpoint."""
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    checkpoint["init_args"] = {**checkpoint["init_args"], "fold": fold}
    (model / f"fold_{fold}").mkdir(exist_ok=True)
    torch.save({**checkpoint, **changes}, model / f"fold_{fold}" / "checkpoint_final.pth")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is run, without running it; a command fails that holds the word of the variable `FAILS`."""
    called: list[list[str]] = []

    def status_of(words: list[str]) -> int:
        called.append(words)
        return int(os.environ.get("FAILS", "no word") in words)

    monkeypatch.setattr(retrofit, "status_of", status_of)
    return called


def main(model: Path, flags: str = "") -> None:
    retrofit.main(["-m", str(model), "-device", "cpu", *shlex.split(flags)])


def begun(model: Path, fold: int, *checkpoints: str) -> Path:
    """A fold of the retrofit that has begun from the stock model's, with these checkpoints."""
    folder = model.parent / RETROFIT / f"fold_{fold}"
    (folder / "validation").mkdir(parents=True)
    stock = model / f"fold_{fold}" / "checkpoint_final.pth"
    (folder / "local_branch.json").write_text(json.dumps({"checkpoint": str(stock), "sha256": sha256_of(stock)}))
    for name in checkpoints:
        save_trained(folder / name, {}, CALIBRATION)
    return folder


def save_trained(checkpoint: Path, settings: dict[str, Any], calibration: dict[str, Any] | None) -> None:
    """A checkpoint of the retrofit, which a validation may have calibrated."""
    trained = {
        "trainer_name": "nnUNetTrainerNMSW_retrofit",
        "init_args": {"configuration": "3d_fullres", "plans": make_plans(**settings)},
        "network_weights": {},
    }
    torch.save({**trained, **({CALIBRATION_KEY: calibration} if calibration else {})}, checkpoint)


def validated(folder: Path) -> None:
    (folder / "validation" / "automatic_patches.json").write_text(json.dumps(CALIBRATION))
    (folder / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": []}))


def test_each_fold_begins_from_its_own_checkpoint_and_all_are_compared(stock, commands, capsys):
    main(stock, "-tr nnUNetTrainerNMSW_retrofit_context_50epochs --compare -k 10% auto")
    for fold, command in enumerate(commands[:2]):
        assert command[:4] == ["nnUNetv2_train", DATASET, "3d_fullres", str(fold)]
        assert command[-1] == str(stock / f"fold_{fold}" / "checkpoint_final.pth")
    trainer = "nnUNetTrainerNMSW_retrofit_context_50epochs"
    report = stock.parent / f"{trainer}__nnUNetPlans__3d_fullres" / "comparison"
    assert shlex.join(commands[2]) == (
        f"nmsw_compare -k 10% auto -d {DATASET} -c 3d_fullres -p nnUNetPlans -f 0 1 -tr {trainer} "
        "-tr_baseline nnUNetTrainer -chk checkpoint_final.pth -chk_baseline checkpoint_final.pth -device cpu "
        f"-o {report}"
    )
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("n")] == [shlex.join(command) for command in commands]


def test_flags_are_passed_on(stock, commands, tmp_path):
    (stock / "fold_1" / "checkpoint_final.pth").rename(stock / "fold_1" / "checkpoint_best.pth")
    main(stock, f"-d 998 -chk checkpoint_best.pth -o '{tmp_path / 'a report'}' --trust_model")
    train, compare = commands
    assert train[3] == "1"
    assert train[-2:] == ["-pretrained_weights", str(stock / "fold_1" / "checkpoint_best.pth")]
    assert compare[-2:] == [str(tmp_path / "a report"), "--trust_model"]
    assert shlex.join(compare).count("-chk checkpoint_final.pth -chk_baseline checkpoint_best.pth") == 1


def test_folds_are_done_go_on_or_are_validated(stock, commands, capsys):
    for fold in (2, 3, 4):
        write_other_fold(stock, fold)
    splits = stock.parents[2] / "nnUNet_preprocessed" / DATASET / "splits_final.json"
    splits.write_text(json.dumps([*SPLITS, *({"train": ["a"], "val": [name]} for name in "cde")]))
    validated(begun(stock, 0, "checkpoint_final.pth", "checkpoint_best.pth"))
    begun(stock, 1, "checkpoint_final.pth")
    begun(stock, 2, "checkpoint_latest.pth", "checkpoint_best.pth")
    begun(stock, 3, "checkpoint_best.pth")
    begun(stock, 4)
    main(stock, "--no_compare")
    assert [(command[3], *command[12:]) for command in commands] == [
        ("1", "--val"),
        ("2", "--c"),
        ("3", "--c"),
        ("4", "-pretrained_weights", str(stock / "fold_4" / "checkpoint_final.pth")),
    ]
    assert "Fold 0: done" in capsys.readouterr().out


def test_without_predicted_benefits_a_summary_is_the_end(stock, commands, capsys):
    folder = begun(stock, 0)
    save_trained(folder / "checkpoint_final.pth", {"score_training": "contribution"}, None)
    main(stock, "-f 0 --no_compare")
    assert "--val" in commands[0]
    (folder / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": []}))
    main(stock, "-f 0 --no_compare")
    assert len(commands) == 1
    assert "Fold 0: done" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["of other weights", "older", "half a file", "without summary"])
def test_a_validation_that_is_not_whole_is_done_again(stock, commands, what):
    folder = begun(stock, 0, "checkpoint_final.pth")
    validated(folder)
    summary = folder / "validation" / "summary.json"
    if what == "of other weights":
        save_trained(folder / "checkpoint_final.pth", {}, {"cases": 2})
    elif what == "older":
        os.utime(summary, (time.time() - 60,) * 2)
    elif what == "half a file":
        summary.write_text('{"metric_per')
    else:
        summary.unlink()
    main(stock, "-f 0 --no_compare")
    assert [command[-1] for command in commands] == ["--val"]


def test_what_failed_is_named_and_nothing_else_runs(stock, commands, monkeypatch):
    monkeypatch.setenv("FAILS", "0")
    with pytest.raises(UserError, match=r"^fold 0: nnUNetv2_train ended with status 1\..*the same command again"):
        main(stock, "-f 0 1 --no_compare")
    assert len(commands) == 1
    monkeypatch.setenv("FAILS", "-tr_baseline")
    with pytest.raises(UserError, match=r"^the comparison: nmsw_compare ended with status 1\."):
        main(stock)


def changed(file: str, **changes: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file in the folder of nnU-Net's folders."""

    def change(root: Path) -> None:
        content = json.loads((root / file).read_text())
        (root / file).write_text(json.dumps({**content, **changes}))

    return change


def removed(file: str) -> Callable[[Path], None]:
    return lambda root: (root / file).rename(root / "removed")


def other_fold(fold: int | str, **changes: Any) -> Callable[[Path], None]:
    return lambda root: write_other_fold(root / MODEL, fold, **changes)


def fold_of_another(root: Path) -> None:
    (root / MODEL / "fold_1" / "checkpoint_final.pth").write_bytes(
        (root / MODEL / "fold_0" / "checkpoint_final.pth").read_bytes()
    )


def changed_stock(root: Path) -> None:
    begun(root / MODEL, 0, "checkpoint_latest.pth")
    write_other_fold(root / MODEL, 0, current_epoch=7)


def unknown_origin(root: Path) -> None:
    (begun(root / MODEL, 0, "checkpoint_final.pth") / "local_branch.json").unlink()


def other_patch_size(root: Path) -> None:
    plans = make_plans(patch_size=(8, 8, 16))
    (root / PREPROCESSED / "nnUNetPlans.json").write_text(json.dumps(plans))


def moved_model(root: Path) -> None:
    (root / MODEL).rename(root / "elsewhere")
    (root / MODEL).mkdir()


def validated_on_other_cases(root: Path) -> None:
    (root / MODEL / "fold_0" / "validation").mkdir()
    summary = {"metric_per_case": [{"prediction_file": "b.nii.gz"}]}
    (root / MODEL / "fold_0" / "validation" / "summary.json").write_text(json.dumps(summary))


MODEL, PREPROCESSED, RAW = (
    f"nnUNet_results/{DATASET}/{STOCK}",
    f"nnUNet_preprocessed/{DATASET}",
    f"nnUNet_raw/{DATASET}",
)
NMSW = {"network_weights": {"local_branch.weight": torch.zeros(1)}}
LABELS = {"background": 0, "spleen": 1, "lesion": 2}

REFUSED: dict[str, tuple[Callable[[Path], None] | None, str, str]] = {
    "trainer": (None, "-tr nnUNetTrainerNMSW", "-tr nnUNetTrainerNMSW does not retrofit: give"),
    "unknown trainer": (None, "-tr nnUNetTrainer_missing", "-tr nnUNetTrainer_missing does not retrofit"),
    "device": (None, "-device tpu", "invalid choice"),
    "gpus": (None, "-num_gpus 2", "-num_gpus 2 needs -device cuda"),
    "no gpu": (None, "-num_gpus 0", "-num_gpus is 0"),
    "flags of compare": (None, "--compare -rounds 0", "-rounds is 0"),
    "unknown flags of compare": (None, "--compare --unknown", "unrecognized arguments: --unknown"),
    "parts of a comparison": (None, "--compare -num_parts 2", "leaves the report unfinished"),
    "report in a folder of something else": (None, f"-o {RAW}", "holds no comparison"),
    "compare or not": (None, "--no_compare --compare -k all", "--no_compare leaves out"),
    "dataset": (None, "-d 123", "-d 123: no such dataset"),
    "fold": (None, "-f 3", "there is no checkpoint"),
    "no fold": (None, "-f first", "-f first: give folds as numbers"),
    "checkpoint": (None, "-chk checkpoint_best.pth", "no fold in"),
    "fold all": (other_fold("all"), "-f all", "-f all: its cases were trained on"),
    "no model": (removed(f"{MODEL}/plans.json"), "", "it has no plans.json"),
    "no name of plans": (
        changed(f"{MODEL}/plans.json", plans_name=None),
        "",
        "plans.json is broken: it has no plans_name",
    ),
    "another fold": (fold_of_another, "", "fold_1/checkpoint_final.pth was trained on fold 0, so it has seen"),
    "an NMSW model": (other_fold(0, **NMSW), "", "is of an NMSW model"),
    "folds of two trainers": (
        other_fold(1, trainer_name="nnUNetTrainer_50epochs"),
        "",
        "another fold by nnUNetTrainer on",
    ),
    "unsafe": (other_fold(0, logging=Path("code")), "", "which no model needs and which may run code"),
    "not preprocessed": (removed(PREPROCESSED), "", "is not preprocessed with the model's plans: there is no"),
    "no data": (removed(f"{PREPROCESSED}/nnUNetPlans_3d_fullres"), "", "run nnUNetv2_preprocess -d Dataset998_Tiny"),
    "no such plans": (removed(f"{PREPROCESSED}/nnUNetPlans.json"), "", "there is no"),
    "other patch size": (other_patch_size, "", "nnUNetPlans.json differs in patch_size from"),
    "other reader": (
        changed(f"{PREPROCESSED}/nnUNetPlans.json", image_reader_writer="X"),
        "",
        "in image_reader_writer",
    ),
    "other name": (changed(f"{PREPROCESSED}/nnUNetPlans.json", dataset_name="Y"), "", "is broken at dataset_name"),
    "other labels": (changed(f"{PREPROCESSED}/dataset.json", labels=LABELS), "", "has other labels than the model"),
    "no splits": (removed(f"{PREPROCESSED}/splits_final.json"), "", "there are no cross-validation splits"),
    "other splits": (validated_on_other_cases, "", "has changed since fold 0 of nnUNetTrainer was trained"),
    "no images": (removed(f"{RAW}/imagesTr/b_0000.nii.gz"), "", "images of validation case b of fold 1 are missing"),
    "model elsewhere": (moved_model, "-m elsewhere", "nmsw_compare looks for the stock model in"),
    "changed checkpoint": (changed_stock, "", "is another checkpoint, or has changed since: put"),
    "unknown origin": (unknown_origin, "", "does not say which checkpoint it began from"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_refused_in_one_line_before_anything_runs(stock, commands, what, capfd, monkeypatch):
    change, flags, says = REFUSED[what]
    root = stock.parents[2]
    monkeypatch.chdir(root)
    if change is not None:
        change(root)
    assert says in refused_by(lambda words: main(stock, shlex.join(words)), shlex.split(flags), capfd)
    assert not commands


def test_a_command_is_run_and_its_status_told():
    assert retrofit.status_of([sys.executable, "-c", "import sys; sys.exit(7)"]) == 7


def test_a_missing_folder_of_nnunet_is_named(stock, commands, monkeypatch):
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(UserError, match="nnUNet_preprocessed is not set"):
        main(stock)


def test_only_the_comparison_needs_the_model_where_nnunet_puts_it(stock, commands, monkeypatch):
    monkeypatch.chdir(stock.parents[2])
    moved_model(stock.parents[2])
    main(Path("elsewhere"), "--no_compare")
    assert len(commands) == 2
