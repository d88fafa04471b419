"""`nmsw_compare` on two folds of a tiny dataset, and its page in a real browser."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from commands import DATASET, environment, run
from nnunetv2.evaluation.evaluate_predictions import load_summary_json

from nnunet_nmsw.commands.compare import main
from nnunet_nmsw.selection.calibration import CALIBRATION_KEY

pytestmark = pytest.mark.integration

PLANS = "nnUNetPlans_small"
TRAINER, BASELINE = "nnUNetTrainerNMSW_tiny", "nnUNetTrainer_tiny"
FLAGS = f"-d 998 -p {PLANS} -tr {TRAINER} -k 3 10% all auto -device cpu --disable_tta -nps 1"
COMPARE = f"{FLAGS} -f 0 1 -tr_baseline {BASELINE} -timed_cases 1 -rounds 1 -cases_shown 2 --backend openvino"


@pytest.fixture(scope="module")
def folds(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folds 0 and 1 of an NMSW and of a stock model."""
    folder = tmp_path_factory.mktemp("folds")
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        shutil.copytree(workspace / name, folder / name)
    for fold in (0, 1):
        for trainer in (TRAINER, BASELINE):
            run(f"nnUNetv2_train 998 3d_fullres {fold} -p {PLANS} -tr {trainer} -device cpu", folder)
    return folder


@pytest.fixture(scope="module")
def report(folds: Path) -> Path:
    """A comparison that was killed in the middle, went on in parts, and was merged."""
    output = folds / "report"
    executable = shutil.which("nmsw_compare", path=os.path.dirname(sys.executable))
    killed = subprocess.Popen(
        [executable, *COMPARE.split(), "-o", str(output)],
        env=environment(folds),
        cwd=folds,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not list((output / "cases").glob("*.json")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = {file: file.stat().st_mtime_ns for file in (output / "cases").glob("*.json")}
    assert before
    parts = [run(f"nmsw_compare {COMPARE} -o {output} -num_parts 2 -part_id {part}", folds) for part in (0, 1)]
    assert "0 cases are left" in parts[1].stdout
    assert not (output / "index.html").exists()
    merged = run(f"nmsw_compare {COMPARE} -o {output}", folds)
    assert "Report:" in merged.stdout
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert not list(output.rglob(".nmsw_unfinished*"))
    return output


def labels(file: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    return array


def validation_cases(folds: Path) -> list[str]:
    splits = json.loads((folds / "nnUNet_preprocessed" / DATASET / "splits_final.json").read_text())
    return [*splits[0]["val"], *splits[1]["val"]]


def test_every_method_on_every_validation_case(folds, report):
    table = pd.read_csv(report / "metrics.csv")
    assert sorted(table["case"].unique()) == sorted(validation_cases(folds))
    methods = set(table["method"])
    for key in (
        "baseline_sliding_window_step_0.5",
        "baseline_sliding_window_step_1.0",
        "nmsw_sliding_window_step_0.75",
        "nmsw_greedy_benefit_10percent",
        "nmsw_greedy_benefit_all",
        "nmsw_greedy_benefit_auto",
        "nmsw_greedy_coverage_3",
        "nmsw_global_branch",
        "nmsw_random_3",
        "nmsw_entropy_3",
        "nmsw_objects",
        "nmsw_oracle_all",
        "nmsw_greedy_benefit_3_openvino",
    ):
        assert key in methods
        summary = load_summary_json(str(report / "methods" / key / "summary.json"))
        assert len(summary["metric_per_case"]) == len(validation_cases(folds))
    patches = table[table["case"] == validation_cases(folds)[0]].groupby("method")["patches"].first()
    assert patches["nmsw_greedy_benefit_3"] == 3
    assert patches["nmsw_greedy_benefit_3_openvino"] == 3
    assert patches["nmsw_global_branch"] == 0
    assert patches["nmsw_greedy_benefit_all"] == patches["nmsw_sliding_window_step_0.5"]


def test_predictions_are_those_of_the_commands(folds, report):
    name = validation_cases(folds)[0]
    images = folds / "one_case"
    images.mkdir()
    shutil.copy(folds / "nnUNet_raw" / DATASET / "imagesTr" / f"{name}_0000.nii.gz", images)
    flags = f"-i {images} -f 0 -device cpu --disable_tta -npp 1 -nps 1"
    common = f"{flags} -d 998 -c 3d_fullres -p {PLANS}"
    # The threshold of auto is that of the fold that did not see the case in its validation.
    calibrated = folds / "calibrated"
    shutil.copytree(folds / "nnUNet_results" / DATASET / f"{TRAINER}__{PLANS}__3d_fullres", calibrated)
    checkpoints = [calibrated / f"fold_{fold}" / "checkpoint_final.pth" for fold in (0, 1)]
    own, other = (torch.load(file, weights_only=False) for file in checkpoints)
    torch.save({**own, CALIBRATION_KEY: other[CALIBRATION_KEY]}, checkpoints[0])
    for command, key in (
        (f"nmsw_predict {flags} -m {calibrated} -k auto --backend pytorch", "nmsw_greedy_benefit_auto"),
        (f"nmsw_predict {common} -tr {TRAINER} -k 10% --backend pytorch", "nmsw_greedy_benefit_10percent"),
        (f"nmsw_predict {common} -tr {TRAINER} -k 10%", "nmsw_greedy_benefit_10percent_openvino"),
        (f"nnUNetv2_predict {common} -tr {BASELINE}", "baseline_sliding_window_step_0.5"),
        (f"nnUNetv2_predict {common} -tr {TRAINER} -step_size 0.75", "nmsw_sliding_window_step_0.75"),
    ):
        output = folds / f"predicted_{key}"
        run(f"{command} -o {output}", folds)
        file = f"{name}.nii.gz"
        differ = labels(output / file) != labels(report / "methods" / key / file)
        # The comparison keeps logits of NMSW as nnU-Net does, in half precision, the command decides without: close
        # calls may differ, of which a network of few steps has many.
        assert differ.sum() <= (2e-3 * differ.size if "greedy_benefit" in key else 0), key


def test_numbers_of_the_report(report):
    results = json.loads((report / "results.json").read_text())
    primary = results["methods"]["nmsw_greedy_benefit_10percent"]
    sliding_window = results["methods"]["nmsw_sliding_window_step_0.5"]
    assert 0 < primary["macs"] < sliding_window["macs"]
    assert primary["cost"]["network_seconds"]["median"] > 0
    assert primary["cost"]["total_seconds"]["median"] > primary["cost"]["network_seconds"]["median"]
    assert primary["cost"]["host_peak_bytes"] > 1e8
    assert results["methods"]["baseline_sliding_window_step_0.5"]["cost"]["total_ratio"]["median"] == 1
    assert results["methods"]["nmsw_oracle_3"]["cost"] is None
    for name in ("dice_by_patches", "dice_by_seconds", "by_class", "by_case"):
        for ending in ("svg", "png"):
            assert (report / "plots" / f"{name}.{ending}").stat().st_size > 1000
    text = (report / "report.md").read_text()
    assert results["answer"][0] in text
    assert "| NMSW, K = 10% |" in text


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture
def browser(report, tmp_path):
    """The report in headless Chromium, its network log kept."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    if not BROWSER or not DRIVER:
        pytest.skip("needs Chromium and its driver, Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    background = ["networking", "component-update", "sync"]
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    for flag in background:
        options.add_argument(f"--disable-background-{flag}" if flag == "networking" else f"--disable-{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get((report / "index.html").as_uri())
        WebDriverWait(driver, 30).until(lambda d: d.execute_script("return document.body.dataset.ready") == "true")
        yield driver
    finally:
        driver.quit()


def test_the_page_loads_alone_and_without_an_error(browser):
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    page = browser.current_url
    requested = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent" and m["params"]["documentURL"] == page
    ]
    assert {url for url in requested if not url.startswith("data:")} == {page}
    assert browser.execute_script("return [...document.images].every(image => image.naturalWidth > 100)")


def test_tables_sort(browser):
    rows = "return [...document.querySelector('table').tBodies[0].rows].map(row => Number(row.cells[1].dataset.value))"
    unsorted = browser.execute_script(rows)
    head = browser.find_elements("css selector", "thead button")[1]
    head.click()
    assert browser.execute_script(rows) == sorted(unsorted, reverse=True)
    head.click()
    assert browser.execute_script(rows) == sorted(unsorted)


def test_slices_scroll(browser):
    from selenium.webdriver.common.keys import Keys

    canvases = browser.find_elements("css selector", ".case canvas")
    assert len(canvases) == 2 * 3
    pixels = "return arguments[0].toDataURL()"
    before = [browser.execute_script(pixels, canvas) for canvas in canvases[:3]]
    slider = browser.find_element("css selector", ".case input[type=range]")
    slider.send_keys(Keys.ARROW_LEFT)
    after = [browser.execute_script(pixels, canvas) for canvas in canvases[:3]]
    assert all(a != b for a, b in zip(before, after, strict=True))
    position = browser.find_element("css selector", ".case output")
    shown = position.text
    browser.execute_script(
        "arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -1, cancelable: true}))", canvases[0]
    )
    assert position.text != shown
    slider.send_keys(Keys.HOME)
    assert position.text == "z 0"


def test_the_page_fits_a_phone(browser):
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("-f 0 3", f"fold 3 of {TRAINER} is not trained"),
        (f"-f 0 -tr_baseline {BASELINE} -p_baseline nnUNetPlans", "is not the folder of a trained model"),
        ("-f all", "its validation cases were trained on"),
        ("-f 0 -d 123", "no such dataset"),
        ("-f 0 -k none", "-k is"),
        ("-f 0 -tolerance 0", "-tolerance is"),
        ("-f 0 -num_parts 2 -part_id 2", "-part_id is 2"),
        ("-f 0 -o report", "holds another comparison"),
        ("-f 0 -o nnUNet_raw", "holds no comparison"),
        ("-f 0 -p nnUNetPlans_nowhere", "is not the folder of a trained model"),
        (f"-f 0 -tr {BASELINE}", "was not trained with an NMSW trainer"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(folds, report, flags, says, monkeypatch):
    check_refused(folds, f"{FLAGS} {flags}", says, monkeypatch)


def check_refused(folds: Path, flags: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's function in this process: one line that says what is wrong, and no file touched."""
    monkeypatch.chdir(folds)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(folds / variable))
    before = {file: file.stat().st_mtime_ns for file in folds.rglob("*")}
    with pytest.raises(SystemExit) as error:
        main([*(() if "-o " in flags else ("-o", "out")), *flags.split()])
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert {file: file.stat().st_mtime_ns for file in folds.rglob("*")} == before


@contextlib.contextmanager
def changed(file: Path, content: bytes | None) -> Iterator[None]:
    """Give a file other content, or hide it, for a while."""
    kept = file.with_name(file.name + ".kept")
    file.rename(kept)
    if content is not None:
        file.write_bytes(content)
    try:
        yield
    finally:
        kept.replace(file)


def test_a_missing_image_is_named(folds, monkeypatch):
    name = validation_cases(folds)[0]
    with changed(folds / "nnUNet_raw" / DATASET / "imagesTr" / f"{name}_0000.nii.gz", None):
        check_refused(folds, f"{FLAGS} -f 0", f"images of validation case {name}", monkeypatch)


def test_a_missing_channel_is_named(folds, monkeypatch):
    file = folds / "nnUNet_raw" / DATASET / "dataset.json"
    two_channels = {**json.loads(file.read_text()), "channel_names": {"0": "CT", "1": "PET"}}
    with changed(file, json.dumps(two_channels).encode()):
        check_refused(folds, f"{FLAGS} -f 0", "has 1 of 2 channels", monkeypatch)


def test_a_case_in_two_folds(folds, monkeypatch):
    file = folds / "nnUNet_preprocessed" / DATASET / "splits_final.json"
    splits = json.loads(file.read_text())
    splits[1]["val"] = splits[0]["val"]
    summary = next((folds / "nnUNet_results" / DATASET).glob(f"{TRAINER}*/fold_1/validation/summary.json"))
    with changed(file, json.dumps(splits).encode()), changed(summary, None):
        check_refused(folds, f"{FLAGS} -f 0 1 -tr_baseline none", "more than one of the folds", monkeypatch)


def test_models_with_different_labels(folds, monkeypatch):
    file = folds / "nnUNet_results" / DATASET / f"{BASELINE}__{PLANS}__3d_fullres" / "dataset.json"
    with changed(file, file.read_bytes().replace(b'"lesion"', b'"cyst"')):
        flags = f"{FLAGS} -f 0 -tr_baseline {BASELINE}"
        check_refused(folds, flags, "the two models differ in their labels", monkeypatch)


def test_splits_that_changed_after_training(folds, monkeypatch):
    file = folds / "nnUNet_preprocessed" / DATASET / "splits_final.json"
    splits = json.loads(file.read_text())
    with changed(file, json.dumps([splits[1], splits[0], *splits[2:]]).encode()):
        check_refused(folds, f"{FLAGS} -f 0", "has changed since fold 0", monkeypatch)


def test_a_checkpoint_that_changed(folds, report, monkeypatch):
    file = folds / "nnUNet_results" / DATASET / f"{TRAINER}__{PLANS}__3d_fullres" / "fold_1" / "checkpoint_final.pth"
    checkpoint, other = torch.load(file, weights_only=False), io.BytesIO()
    checkpoint["network_weights"]["fusion_parameters"] += 0.01
    torch.save(checkpoint, other)
    with changed(file, other.getvalue()):
        check_refused(folds, f"{COMPARE} -o report", "which differs in nmsw, fold 1", monkeypatch)
