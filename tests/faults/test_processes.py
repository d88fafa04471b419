"""Kills, signals and full disks, with the real commands. `--kills N` for the long version."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import SimpleITK as sitk
import torch
from commands import DATASET, run, set_configurations
from processes import OF_NNUNET, after, all_gone, can_mount, check_files, files_of, random_kill, small_disk
from untrained import write_image

from nnunet_nmsw.files import PREFIX

CASES = 4
FLAGS = "-device cpu -npp 1 -nps 2 --disable_tta"


@pytest.fixture(scope="module")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small images."""
    folder = tmp_path_factory.mktemp("many")
    for case in range(CASES):
        write_image(folder / f"case{case}_0000.nii.gz", case, (24, 26, 28))
    return folder


def labels_of(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in folder.glob("*.nii.gz")}


@pytest.mark.parametrize("flags", ["--save_patches", "--save_probabilities --save_patches"])
def test_kills_of_a_prediction(many_images, untrained, tmp_path, flags, pytestconfig):
    """Where a case's labels are, everything of the case is, and is whole; the rest is made by the next call."""
    predict = f"nmsw_predict -i {many_images} -m {untrained} {FLAGS} {flags}"
    run(f"{predict} -o whole", tmp_path)
    expected = labels_of(tmp_path / "whole")
    assert len(expected) == CASES
    random_, kills = random.Random(len(flags)), pytestconfig.getoption("kills")
    killed = 0
    for number in range((kills + 1) // 2):
        output = tmp_path / f"out{number}"
        for _ in range(2):  # the second goes on where the first was killed
            with_files = random_kill(random_, output, CASES, 1.5, kills)
            result = run(f"{predict} -o {output} --continue_prediction", tmp_path, check=False, meanwhile=with_files)
            killed += result.returncode == -signal.SIGKILL
            check_files(output)
            for name, labels in labels_of(output).items():
                assert np.array_equal(labels, expected[name])
                case = name.removesuffix(".nii.gz")
                assert (output / "patches" / f"{case}.json").is_file()
                assert (output / "patches" / name).is_file()
                assert ("probabilities" not in flags) or (output / f"{case}.npz").is_file()
        run(f"{predict} -o {output} --continue_prediction", tmp_path)
        assert files_of(output) == files_of(tmp_path / "whole")
        assert all(np.array_equal(labels, expected[name]) for name, labels in labels_of(output).items())
        assert not list(output.rglob(f"{PREFIX}*"))
        shutil.rmtree(output)
    assert killed == 2 or kills > 1
    print(f"killed {killed} of {2 * ((kills + 1) // 2)} calls")


TRAIN = "nnUNetv2_train 998 3d_fullres 0 -p nnUNetPlans_small -tr nnUNetTrainerNMSW_mortal -device cpu"


@pytest.fixture
def preprocessed(workspace: Path, tmp_path: Path) -> Path:
    """A workspace with the preprocessed dataset, and a seed in the plans."""
    shutil.copytree(workspace / "nnUNet_preprocessed", tmp_path / "nnUNet_preprocessed")
    plans = tmp_path / "nnUNet_preprocessed" / DATASET / "nnUNetPlans_small.json"
    set_configurations(plans, **{"3d_fullres": {"nmsw": {"seed": 3}}})
    return tmp_path


def test_kills_of_a_training(preprocessed, pytestconfig):
    """Checkpoints and pictures are whole at any time, and the training ends as if nothing had been."""
    if pytestconfig.getoption("kills") == 1:
        pytest.skip("test_continue.py stops trainings at exact points; --kills 2 and more kills them at random ones")
    fold = f"nnUNet_results/{DATASET}/nnUNetTrainerNMSW_mortal__nnUNetPlans_small__3d_fullres/fold_0"
    run(TRAIN, preprocessed, nnUNet_n_proc_DA="0")
    whole = preprocessed / fold
    expected = torch.load(whole / "checkpoint_final.pth", weights_only=False)["network_weights"]
    (preprocessed / "nnUNet_results").rename(preprocessed / "whole")
    random_, killed, kills = random.Random(1), 0, pytestconfig.getoption("kills")
    while killed < kills:
        for _ in range(min(5, kills - killed)):
            watch = random_kill(random_, preprocessed / fold, 4, 6.0, kills)
            run(f"{TRAIN} --c", preprocessed, check=False, meanwhile=watch, nnUNet_n_proc_DA="0")
            killed += 1
            check_files(preprocessed / fold, OF_NNUNET)
            for file in (preprocessed / fold).glob("checkpoint_*.pth"):
                torch.load(file, weights_only=False)
        run(f"{TRAIN} --c", preprocessed, nnUNet_n_proc_DA="0")
        weights = torch.load(preprocessed / fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert not list((preprocessed / fold).rglob(f"{PREFIX}*"))
        assert (preprocessed / fold / "validation" / "summary.json").is_file()
        shutil.rmtree(preprocessed / "nnUNet_results")


COMPARE = "nmsw_compare -d 998 -f 0 -p nnUNetPlans_small -tr nnUNetTrainerNMSW_1epoch -device cpu"
COMPARE += " -k 2 -timed_cases 0 --disable_tta"


@pytest.fixture
def compared(workspace: Path, model: Path, tmp_path: Path) -> Path:
    """A workspace with the trained model of one fold, and two cases to compare on."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).symlink_to(workspace / name)
    return tmp_path


def test_kills_of_a_comparison(compared, pytestconfig):
    """Records and predictions are whole, and the same command goes on to the same report."""
    command = f"{COMPARE} -nps 1"
    run(f"{command} -o whole", compared)
    random_ = random.Random(2)
    kills = pytestconfig.getoption("kills")
    for number in range((kills + 1) // 2):
        report = compared / f"report{number}"
        for _ in range(min(2, kills - 2 * number)):
            watch = random_kill(random_, report, 7, 8.0, kills)
            result = run(f"{command} -o {report}", compared, check=False, meanwhile=watch)
            assert result.returncode == -signal.SIGKILL or kills > 1
            check_files(report)
        run(f"{command} -o {report}", compared)
        assert files_of(report) == files_of(compared / "whole")
        ours, expected = ((f / "metrics.csv").read_text() for f in (report, compared / "whole"))
        assert ours == expected
        assert not list(report.rglob(f"{PREFIX}*"))
        shutil.rmtree(report)


@pytest.mark.parametrize("what", ["training", "comparison"])
def test_workers_notice_that_their_parent_was_killed(what, request):
    folder = request.getfixturevalue("preprocessed" if what == "training" else "compared")
    workers: list[psutil.Process] = []
    # A training of some minutes, which is killed when it has hardly begun.
    command = TRAIN.replace("mortal", "short") if what == "training" else f"{COMPARE} -o report -nps 2"

    def kill_the_parent(process: int) -> None:
        until, parent = time.monotonic() + 60, psutil.Process(process)
        # A file that the work itself leaves: nnU-Net has pools of its own before.
        pattern = "nnUNet_results/**/training_log*" if what == "training" else "report/methods/*/*.nii.gz"
        while time.monotonic() < until and not (list(folder.glob(pattern)) and len(parent.children()) >= 2):
            time.sleep(0.05)
        time.sleep(1.0)
        workers.extend(parent.children(recursive=True))
        parent.kill()

    run(command, folder, check=False, meanwhile=kill_the_parent, nnUNet_n_proc_DA="1")
    assert len(workers) >= 2
    assert all_gone(workers)


def test_a_worker_that_dies_in_a_comparison_is_told(compared):
    """The case is named."""

    def kill_workers(process: int) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and not list(compared.glob("report/methods/*/*.nii.gz")):
            time.sleep(0.02)
        for child in psutil.Process(process).children():
            if "resource_tracker" not in " ".join(child.cmdline()):
                child.kill()

    result = run(f"{COMPARE} -o report -nps 1", compared, check=False, meanwhile=kill_workers)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "a process died while it wrote predictions of case case_" in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(("number", "status", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_signals_end_a_prediction_in_one_line(many_images, untrained, tmp_path, number, status, word):
    output, images = tmp_path / "out", tmp_path / "images"
    images.mkdir()
    for copy in range(40):  # so many that it is not done when it is interrupted
        (images / f"case{copy}_0000.nii.gz").symlink_to(many_images / "case0_0000.nii.gz")
    asked: list[float] = []

    def interrupt(process: int) -> None:
        kill_behind = time.monotonic() + 20
        while time.monotonic() < kill_behind and not list(output.glob("*.nii.gz")):
            time.sleep(0.005)
        asked.append(time.monotonic())
        after(0.0, number, group=False)(process)

    predict = f"nmsw_predict -i {images} -m {untrained} -o {output} -k all -device cpu --disable_progress_bar"
    result = run(predict, tmp_path, check=False, meanwhile=interrupt)
    assert time.monotonic() - asked[0] < 30  # how fast it is, is told in docs/reliability.md
    assert result.returncode == status
    assert result.stderr.strip().splitlines()[-1].startswith(f"{word}: predictions that are there are whole")
    assert "Traceback" not in result.stderr
    check_files(output)
    assert not list(output.rglob(f"{PREFIX}*"))


def test_a_signal_ends_a_comparison_in_one_line(compared):
    workers: list[psutil.Process] = []

    def interrupt(process: int) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and len(files_of(compared / "report")) < 3:
            time.sleep(0.01)
        workers.extend(psutil.Process(process).children(recursive=True))
        after(0.0, signal.SIGTERM, group=False)(process)

    result = run(f"{COMPARE} -o report -nps 2", compared, check=False, meanwhile=interrupt)
    assert result.returncode == 143
    assert result.stderr.strip().splitlines()[-1].startswith("terminated: the folder keeps what is done")
    assert "Traceback" not in result.stderr
    assert workers
    assert all_gone(workers)
    assert not list((compared / "report").rglob(f"{PREFIX}*"))


@pytest.mark.skipif(not can_mount(), reason="only root may mount a small disk")
@pytest.mark.parametrize(
    ("flags", "ending"), [("", ".nii"), ("--save_patches", ".nii.gz"), ("--save_probabilities", ".nii.gz")]
)
def test_a_full_disk(untrained, tmp_path, flags, ending):
    """What fits is there and whole, what does not is named, and the rest is made when there is room."""
    images, model = tmp_path / "images", tmp_path / "model"
    images.mkdir()
    shutil.copytree(untrained, model)
    dataset = json.loads((model / "dataset.json").read_text())
    (model / "dataset.json").write_text(json.dumps({**dataset, "file_ending": ending}))
    if ending == ".nii":
        plans = json.loads((model / "plans.json").read_text())
        (model / "plans.json").write_text(json.dumps({**plans, "image_reader_writer": "NibabelIO"}))
    for case in range(3):
        write_image(images / f"case{case}_0000{ending}", case, (44, 46, 48))
    predict = f"nmsw_predict -i {images} -m {model} {FLAGS} {flags} -npp 0 -nps 1 -o"
    run(f"{predict} {tmp_path / 'whole'}", tmp_path)
    expected = files_of(tmp_path / "whole")
    size = sum((tmp_path / "whole" / name).stat().st_size for name in expected)
    with small_disk(tmp_path / "disk", int(size * 0.6 / 1024)) as disk:
        result = run(f"{predict} {disk}/out", tmp_path, check=False)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert "cannot write" in result.stderr.strip().splitlines()[-1]
        check_files(disk / "out")
        assert not list(disk.rglob(f"{PREFIX}*"))
        there = {name for name in files_of(disk / "out") if name.endswith(ending) and "/" not in name}
        for name in there:
            assert (disk / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert len(there) < 3
        shutil.copytree(disk / "out", tmp_path / "more_room")
    run(f"{predict} {tmp_path / 'more_room'} --continue_prediction", tmp_path)
    assert files_of(tmp_path / "more_room") == expected


@pytest.mark.skipif(not can_mount(), reason="only root may mount a small disk")
def test_a_training_on_a_full_disk_keeps_its_checkpoint(preprocessed):
    fold = f"{DATASET}/nnUNetTrainerNMSW_mortal__nnUNetPlans_small__3d_fullres/fold_0"
    with small_disk(preprocessed / "disk", 8 << 10) as disk:
        run(f"{TRAIN}", preprocessed, nnUNet_results=str(disk), nnUNet_n_proc_DA="0")
        before = {file.name: file.read_bytes() for file in (disk / fold).glob("*.pth")}
        (disk / fold / "checkpoint_final.pth").rename(disk / fold / "checkpoint_latest.pth")
        left = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(b"x" * (left - 50_000))
        checkpoint = torch.load(disk / fold / "checkpoint_latest.pth", weights_only=False)
        assert checkpoint["current_epoch"] == 3
        checkpoint["current_epoch"] = 2
        for values in checkpoint["logging"].values():
            del values[2:]
        (disk / "filler").unlink()
        torch.save(checkpoint, disk / fold / "checkpoint_latest.pth")
        latest = (disk / fold / "checkpoint_latest.pth").read_bytes()
        (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - 50_000))
        result = run(f"{TRAIN} --c", preprocessed, check=False, nnUNet_results=str(disk), nnUNet_n_proc_DA="0")
        assert result.returncode == 1
        assert (disk / fold / "checkpoint_latest.pth").read_bytes() == latest
        assert (disk / fold / "checkpoint_best.pth").read_bytes() == before["checkpoint_best.pth"]
