"""`nmsw_compare` of stock models: a set, and two of the same labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from predictors import stock
from untrained import refused_by, write_image, write_model

from nnunet_nmsw.commands.compare import main
from nnunet_nmsw.commands.predict import main as predict
from nnunet_nmsw.errors import UserError

COARSE = ("liver", "spleen", "kidney", "rib")
FINE = {"organs": ("kidney", "liver"), "bones": ("rib", "vertebra")}
SLIDING = "baseline_sliding_window_step_0.5"
QUIET = ["-device", "cpu", "--disable_tta", "--disable_progress_bar"]
ARGUMENTS = [*QUIET, *["-nps", "1", "-rounds", "1"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and two images."""
    folder = tmp_path_factory.mktemp("stock")
    low = {"spacing": [2.0] * 3, "data_identifier": "low"}
    write_model(folder / "coarse", "nnUNetTrainer", COARSE, seed=7, **low)
    write_model(folder / "whole", "nnUNetTrainer", COARSE, seed=8)
    for seed, (name, labels) in enumerate(FINE.items()):
        write_model(folder / name, "nnUNetTrainer", labels, seed)
    (folder / "images").mkdir()
    for seed, name in enumerate(("a", "b")):
        write_image(folder / "images" / f"{name}_0000.nii.gz", seed)
    return folder


def of_set(folder: Path) -> list[str]:
    models = ["--global_model", str(folder / "coarse"), "--local_model", *(str(folder / name) for name in FINE)]
    return ["-i", str(folder / "images"), *models]


def labels(file: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    return array


def compared(report: Path, *flags: str) -> pd.DataFrame:
    main([*flags, "-o", str(report), *ARGUMENTS])
    return pd.read_csv(report / "metrics.csv").set_index(["method", "case", "class"]).sort_index()


def record(report: Path, case: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((report / "cases" / f"{case}.json").read_text())["methods"]
    return found


def check_sliding_windows(folder: Path, report: Path, fine: dict[str, tuple[str, ...]]) -> None:
    """See that they are nnU-Net's own, where no two models claim a voxel."""
    found = labels(report / "methods" / SLIDING / "a.nii.gz")
    image, properties = SimpleITKIO().read_images([str(folder / "images" / "a_0000.nii.gz")])
    claims = []
    for name, classes in fine.items():
        predictor = stock(False)
        predictor.initialize_from_trained_model_folder(str(folder / name), (0,))
        numbers = [0, *(COARSE.index(label) + 1 if label in COARSE else 0 for label in classes)]
        claims.append(np.array(numbers)[predictor.predict_single_npy_array(image, properties)])
    undisputed = np.sum([of_model > 0 for of_model in claims], axis=0) == 1
    assert undisputed.any()
    # nnU-Net adds its windows up in half precision, which decides on a few voxels of noise.
    assert np.mean(found[undisputed] == np.max(claims, axis=0)[undisputed]) > 0.99


@pytest.mark.compatibility(
    "pretrained weights", "nmsw_compare of stock models, a set and two: a few windows against their sliding windows"
)
def test_a_set_without_reference_labels(folder, tmp_path, capsys):
    report = tmp_path / "report"
    table = compared(report, *of_set(folder), "-k", "25%", "all", "-timed_cases", "0")
    output = capsys.readouterr().out
    assert "vertebra" in output
    assert output.count("Using folds") == 1 + len(FINE)
    # The sliding windows are what everything is compared with.
    assert (table.loc[SLIDING, "Dice"].dropna() == 1).all()
    text = (report / "report.md").read_text()
    assert "without reference labels" in text
    assert "NMSW, K = 25% agrees with the stock sliding windows, step 0.5 by a Dice of" in text
    assert "worse" not in text
    assert "oracle" not in text
    predict([*of_set(folder), "-o", str(tmp_path / "predicted"), "-k", "25%", "--backend", "pytorch", *QUIET])
    for case in ("a", "b"):
        few, most = (record(report, case)[f"nmsw_greedy_benefit_{k}"] for k in ("25percent", "all"))
        found = labels(report / "methods" / "nmsw_greedy_benefit_25percent" / f"{case}.nii.gz")
        assert np.array_equal(found, labels(tmp_path / "predicted" / f"{case}.nii.gz"))
        assert set(most["reached"]) == {"1", "3", "4"}  # no fine model has the spleen
        for label, of_label in most["reached"].items():
            assert of_label["reached"] == of_label["objects"] >= few["reached"][label]["reached"]
            assert of_label["voxels"] == np.count_nonzero(
                labels(report / "methods" / SLIDING / f"{case}.nii.gz") == int(label)
            )
        alone, sliding = (record(report, case)[key] for key in ("nmsw_coarse_model", SLIDING))
        assert alone["patches"] == 0 < few["patches"] < sliding["patches"] == most["patches"]
        assert 0 < alone["macs"] < few["macs"] < sliding["macs"]
        assert sliding["macs"] == pytest.approx(most["macs"], rel=0.01)  # interpolations count, too
    check_sliding_windows(folder, report, FINE)
    # Nothing is done again, and what is there is not mixed with what other flags give.
    before = (report / "cases" / "a.json").stat().st_mtime_ns
    compared(report, *of_set(folder), "-k", "25%", "all", "-timed_cases", "0")
    assert (report / "cases" / "a.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds another comparison, which differs in --explore:"):
        compared(report, *of_set(folder), "-k", "25%", "all", "-timed_cases", "0", "--explore", "1")


def test_two_models_with_reference_labels_and_openvino(folder, tmp_path):
    (tmp_path / "labels").mkdir()
    for seed, case in enumerate(("a", "b")):
        of_image = sitk.ReadImage(str(folder / "images" / f"{case}_0000.nii.gz"))
        reference = sitk.GetImageFromArray(np.random.default_rng(seed).integers(0, 5, (14, 15, 16)).astype(np.uint8))
        reference.CopyInformation(of_image)
        sitk.WriteImage(reference, str(tmp_path / "labels" / f"{case}.nii.gz"))
    models = ["--global_model", str(folder / "coarse"), "--local_model", str(folder / "whole")]
    flags = [*models, "-i", str(folder / "images"), "--labels", str(tmp_path / "labels"), "-k", "20%"]
    table = compared(tmp_path / "report", *flags, "--backend", "openvino", "-timed_cases", "1")
    check_sliding_windows(folder, tmp_path / "report", {"whole": COARSE})
    assert (table["Dice"] < 0.6).all()
    pytorch, openvino = (table.loc[f"nmsw_greedy_benefit_20percent{suffix}"] for suffix in ("", "_openvino"))
    assert (pytorch["macs"] == openvino["macs"]).all()
    assert np.allclose(pytorch["Dice"], openvino["Dice"], atol=0.05), abs(pytorch["Dice"] - openvino["Dice"]).max()
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert all(of["cost"]["total_seconds"]["median"] > 0 for of in results["methods"].values())
    assert "found: " in results["answer"][2]
    report = (tmp_path / "report" / "index.html").read_text()
    assert "coarse model alone" in report
    assert "global branch alone" not in report
    assert "score map" not in report.split("<script")[0]


def test_an_orientation_and_a_calibration(folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    array = np.random.default_rng(3).normal(100, 30, (24, 14, 15)).astype(np.float32)
    image = sitk.GetImageFromArray(array)
    image.SetDirection((0, 0, 1, -1, 0, 0, 0, -1, 0))
    sitk.WriteImage(image, str(images / "turned_0000.nii.gz"))
    reference = sitk.GetImageFromArray(np.random.default_rng(4).integers(0, 5, array.shape).astype(np.uint8))
    reference.CopyInformation(image)
    (tmp_path / "labels").mkdir()
    sitk.WriteImage(reference, str(tmp_path / "labels" / "turned.nii.gz"))
    models = [*of_set(folder)[2:], "-i", str(images), "--orientation", "RAS"]
    calibration = tmp_path / "calibration.json"
    predict([*models, "--calibrate", str(tmp_path / "labels"), "-o", str(calibration), "-k", "2", *QUIET])
    flags = [*models, "--labels", str(tmp_path / "labels"), "--calibration", str(calibration), "-timed_cases", "0"]
    table = compared(tmp_path / "report", *flags, "-k", "2", "auto")
    assert (table["Dice"] < 0.6).all()
    assert "fitted to 1 images of these names" in (tmp_path / "report" / "report.md").read_text()
    of_viewer = json.loads((tmp_path / "report" / "cases" / "turned.json").read_text())
    assert len(of_viewer["windows"]) == of_viewer["methods"]["nmsw_greedy_benefit_auto"]["patches"]
    # Turned into RAS, the axis of 24 voxels is another one. Windows and pictures are of the turned image.
    (data,) = json.loads(
        (tmp_path / "report" / "index.html").read_text().split('id="case-data">')[1].split("</script>")[0]
    )
    shape = [len(data["slices"]), data["height"], data["width"]]
    assert sorted(shape) == [14, 15, 24]
    assert shape != [24, 14, 15]
    edges = np.array(of_viewer["windows"])
    assert (edges.max((0, 1)) <= np.array(shape) + 8).all()
    assert edges[..., shape.index(24)].max() > 16


def test_labels_that_do_not_fit(folder, tmp_path):
    (tmp_path / "labels").mkdir()
    for case, largest, shape in (("a", 9, (14, 15, 16)), ("b", 4, (14, 15, 17))):
        array = np.full(shape, largest, np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "labels" / f"{case}.nii.gz"))
    flags = [*of_set(folder), "--labels", str(tmp_path / "labels"), "-k", "1", "-timed_cases", "0"]
    with pytest.raises(UserError, match=r"a.nii.gz has a label that is none .* 0 to 4; .*b.nii.gz") as refused:
        compared(tmp_path / "report", *flags)
    assert "fold" not in str(refused.value)
    assert not list((tmp_path / "report" / "methods" / SLIDING).iterdir())


def test_what_does_not_go_together(folder, tmp_path, capfd):
    out = ["-o", str(tmp_path / "report"), "-device", "cpu"]
    given = of_set(folder)
    for flags, message in (
        ([*given, "-d", "4"], "-d names trained models"),
        ([*given, "-d", ""], "-d names trained models"),
        (["-d", "4", "-i", str(folder / "images")], "-i is for stock models"),
        (["-d", "4", "--labels", str(folder)], "--labels is for stock models"),
        ([], "-d is missing"),
        (given[2:], "-i is missing"),
        (given[:4], "go together"),
        ([*given, "--labels", str(folder / "images")], "has no a.nii.gz, the labels of the image"),
        ([*given, "-k", "auto"], "-k auto needs"),
        ([*given, "-f", "3"], "there is no checkpoint"),
        ([*given[:-1], str(folder / "coarse")], "twice"),
    ):
        assert message in refused_by(main, [*flags, *out], capfd)
    assert not (tmp_path / "report").exists()
