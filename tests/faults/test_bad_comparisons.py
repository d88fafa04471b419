"""Flags and documents of nmsw_compare that cannot work, and names that are no plain text."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import DATASET_JSON
from untrained import refused_by, write_image, write_model

from nnunet_nmsw.commands.compare import main
from nnunet_nmsw.evaluation.report.write import _escaped

DATASET = "Dataset001_Bad"
PLANS = "nnUNetPlans__3d_fullres"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's folders with a dataset of two cases, an NMSW model and a stock one."""
    folder = tmp_path_factory.mktemp("comparison")
    raw = folder / "nnUNet_raw" / DATASET
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for number, case in enumerate(("a", "b")):
        write_image(raw / "imagesTr" / f"{case}_0000.nii.gz", number)
        write_image(raw / "labelsTr" / f"{case}.nii.gz", number)
    (raw / "dataset.json").write_text(json.dumps(DATASET_JSON))
    (folder / "nnUNet_preprocessed" / DATASET).mkdir(parents=True)
    splits = [{"train": ["b"], "val": ["a"]}, {"train": ["a"], "val": ["b"]}]
    (folder / "nnUNet_preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(splits))
    for trainer in ("nnUNetTrainerNMSW", "nnUNetTrainer"):
        write_model(folder / "nnUNet_results" / DATASET / f"{trainer}__{PLANS}", trainer)
    return folder


@pytest.fixture
def folders(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, which is where nnU-Net looks."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(flags: str, capfd: pytest.CaptureFixture[str]) -> str:
    return refused_by(main, ["-device", "cpu", "-timed_cases", "0", *flags.split()], capfd)


FLAGS = {
    "-d abc": "no such dataset",
    "-d 2": "no such dataset",
    "-f 2": "fold 2 of nnUNetTrainerNMSW is not trained",
    "-f all": "its validation cases were trained on",
    "-f x": "give folds as numbers",
    "-f ²": "give folds as numbers",
    "-f": "expected at least one argument",
    "-k": "expected at least one argument",
    "-k 0": '-k is "0"',
    "-k 10% nan%": '-k is "nan%"',
    "-k auto": "-k auto needs",
    "-tolerance 0": "-tolerance is 0",
    "-tolerance nan": "-tolerance is nan",
    "-tolerance inf": "-tolerance is inf",
    "-margin -1": "-margin is -1",
    "-margin nan": "-margin is nan",
    "-nps 0": "-nps is 0",
    "-rounds 0": "-rounds is 0",
    "-timed_cases -1": "-timed_cases is -1",
    "-cases_shown -1": "-cases_shown is -1",
    "-num_parts 0": "-num_parts is 0: give a number of at least 1",
    "-num_parts 2 -part_id 2": "-part_id is 2",
    "-tta maybe": "invalid choice",
    "-device tpu": "invalid choice",
    "-c 2d": "is not the folder of a trained model",
    "-p Missing": "is not the folder of a trained model",
    "-tr Missing": "is not the folder of a trained model",
    "-tr nnUNetTrainer": "was not trained with an NMSW trainer",
    "-tr_baseline Missing": "is not the folder of a trained model",
    "-tr_baseline nnUNetTrainerNMSW": "was trained with NMSW",
    "-tr_baseline none -p_baseline X": "-tr_baseline none asks for none",
    "-p_baseline Missing": "-p_baseline",
    "-c_baseline Missing": "-p_baseline, -c_baseline and -chk_baseline name",
    "-chk_baseline missing.pth": "-p_baseline, -c_baseline and -chk_baseline name",
    "-chk missing.pth": "is not trained",
    "-o nnUNet_raw": "holds no comparison",
    "-o file": "is a file",
    "-o file/within": "cannot be written into",
    "-o broken": "comparison.json is no JSON",
    "--unknown": "unrecognized arguments",
}


@pytest.mark.parametrize("flags", list(FLAGS))
def test_flags_are_refused_in_one_line(folders, flags, capfd):
    (folders / "file").touch()
    (folders / "broken").mkdir()
    (folders / "broken" / "comparison.json").write_text('{"dataset": ')
    given = flags
    for flag, value in (("-d", "1"), ("-f", "0"), ("-o", "report")):
        if flag not in flags.split():
            given = f"{flag} {value} {given}"
    assert FLAGS[flags] in refused(given, capfd)
    assert not (folders / "report").exists()


NMSW = f"nnUNet_results/{DATASET}/nnUNetTrainerNMSW__{PLANS}"
SPLITS = f"nnUNet_preprocessed/{DATASET}/splits_final.json"
DOCUMENTS = {
    SPLITS: [
        b"",
        b"{}",
        b"[",
        b"[1]",
        b'[{"train": []}]',
        b'[{"train": [], "val": "a"}]',
        b'[{"train": [], "val": ["x"]}]',
    ],
    f"nnUNet_raw/{DATASET}/dataset.json": [b"", b"[]", b'{"labels": 1}', b"\xff"],
    f"{NMSW}/plans.json": [b"", b"[]", b"{}", b'{"configurations": {}}'],
    f"{NMSW}/dataset.json": [b"", b"[]", b"{}"],
    f"{NMSW}/fold_0/validation/summary.json": [
        b"",
        b"[]",
        b"{}",
        b'{"metric_per_case": [{}]}',
        b'{"metric_per_case": []}',
    ],
    f"{NMSW}/fold_0/validation/automatic_patches.json": [b"", b"[]", b"{}"],
}


@pytest.mark.parametrize(("document", "text"), [(name, text) for name, texts in DOCUMENTS.items() for text in texts])
def test_broken_documents_are_named(folders, document, text, capfd):
    (folders / document).parent.mkdir(exist_ok=True)
    (folders / document).write_bytes(text)
    k = "auto" if "automatic" in document else "2"
    message = refused(f"-d 1 -f 0 -o report -k {k}", capfd)
    assert Path(document).name in message, message
    assert not (folders / "report").exists()


def test_the_second_stage_of_a_cascade_is_refused(folders, capfd):
    plans = folders / NMSW / "plans.json"
    content = json.loads(plans.read_text())
    content["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    plans.write_text(json.dumps(content))
    assert "is the second stage of a cascade" in refused("-d 1 -f 0 -o report -k 2", capfd)
    assert not (folders / "report").exists()


def test_a_missing_image_is_named(folders, capfd):
    (folders / "nnUNet_raw" / DATASET / "labelsTr" / "a.nii.gz").unlink()
    assert "misses a file" in refused("-d 1 -f 0 -o report -k 2", capfd)


def test_a_damaged_checkpoint_is_named(folders, capfd):
    file = folders / NMSW / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    content["network_weights"] = {name: weight * float("nan") for name, weight in content["network_weights"].items()}
    torch.save(content, file)
    assert "no numbers" in refused("-d 1 -f 0 -o report -k 2", capfd)


def test_one_bad_case_does_not_stop_the_others(folders, capfd):
    """Its line names it, the other's record is there, and the report waits for the bad one."""
    model = folders / NMSW
    shutil.copytree(model / "fold_0", model / "fold_1")
    image = folders / "nnUNet_raw" / DATASET / "imagesTr" / "a_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:-100])
    flags = "-d 1 -f 0 1 -o report -k 2 -nps 1 -tr_baseline none --disable_tta --disable_progress_bar"
    assert "a_0000.nii.gz" in refused(flags, capfd)
    assert [file.name for file in (folders / "report" / "cases").glob("*.json")] == ["b.json"]
    assert not (folders / "report" / "index.html").exists()
    record = folders / "report" / "cases" / "a.json"
    record.write_text("{")  # as if somebody had written there
    assert "a.json is no JSON" in refused(flags, capfd)
    assert "delete it, and call the same command again" in refused(flags, capfd)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a|b", "a\\|b"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("[x](javascript:1)", "\\[x\\](javascript:1)"),
        ("`code`", "\\`code\\`"),
        ("a\n# b", "a # b"),
        ("plain_name 1.5", "plain_name 1.5"),
    ],
)
def test_names_are_escaped_in_markdown(name, shown):
    assert _escaped(name) == shown
