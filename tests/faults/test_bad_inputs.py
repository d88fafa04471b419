"""Flags, settings and documents that cannot work: one line each that says what is wrong, and nothing is written."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_configuration
from untrained import refused_by, write_image, write_model

from nnunet_nmsw.commands.predict import main
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.model.plans import settings_of
from nnunet_nmsw.selection.calibration import threshold_of_folds
from nnunet_nmsw.settings import ALLOWED as ALLOWED_SETTINGS
from nnunet_nmsw.settings import RETIRED

refused = partial(refused_by, main)


FLAGS = {
    "-npp -1": "-npp is -1",
    "-nps -1": "-nps is -1",
    "-npp many": "invalid int",
    "-num_parts 0": "-num_parts is 0",
    "-num_parts 2 -part_id 2": "-part_id is 2",
    "-part_id -1": "-part_id is -1",
    "-k 0": '-k is "0"',
    "-k -3": '-k is "-3"',
    "-k 1.5": '-k is "1.5"',
    "-k 0%": '-k is "0%"',
    "-k 101%": '-k is "101%"',
    "-k nan%": '-k is "nan%"',
    "-k %": '-k is "%"',
    "-k auto": "-k auto needs",
    "-k foo": '-k is "foo"',
    "--max_drop -1": "--max_drop is -1",
    "--max_drop nan": "--max_drop is nan",
    "--max_drop inf": "--max_drop is inf",
    "--max_memory 0": "--max_memory is",
    "--max_memory lots": "--max_memory is",
    "--max_memory 1M": "too small",
    "--max_memory -5G": "max_memory",
    "-device tpu": "invalid choice",
    "-device mps": "no MPS device",
    "-device cuda": "no CUDA device",
    "--bfloat16 -device cuda": "--precision bfloat16 is for",
    "--precision bfloat16 -device cuda": "--precision bfloat16 is for",
    "-f 1": "there is no checkpoint",
    "-f -1": "give folds as numbers",
    "-f x": "give folds as numbers",
    "-f ²": "give folds as numbers",
    "-f 0 9": "there is no checkpoint",
    "-f all": "there is no checkpoint",
    "-chk none.pth": "none.pth",
    "-chk ../fold_0/checkpoint_final.pth": "the name of a file",
    "-d 4": "-d beside -m",
    "-tr nnUNetTrainerNMSW": "-tr beside -m",
    "-c 3d_fullres": "-c beside -m",
    "-p nnUNetPlans": "-p beside -m",
    "--engine spark": "invalid choice",
    "--engine ray -device mps": "on GPUs or processors",
    "--engine ray --cores_per_worker 0": "--cores_per_worker is 0",
    "--cores_per_worker 2": "are for --engine ray",
    "--backend openvino -device cuda": "--backend openvino is for -device cpu",
    "--ray_address x:1": "are for --engine ray",
    "--local_model {model}": "go together",
    "--global_model {model}": "go together",
    "--global_model {model} --local_model {model}": "without -m",
    "-prev_stage_predictions x": "for the cascade",
    "-i missing": "does not exist",
    "-i {model}/plans.json -o out.nii.gz": "the model reads .nii.gz",
    "-i empty": "no cases in",
    "-i dicom": "convert them first, with dcm2niix",
    "-i dicom/slice -o out.nii.gz": "convert it first, with dcm2niix",
    "-i empty stray -o out.nii.gz": "-i empty is a folder",
    "-i stray/a.nii.gz": "give the file to write",
    "-i stray/a.nii.gz -o stray": "give the file to write",
    "-i stray/a.nii.gz -o out.txt": "give the file to write",
    "-i stray/a.nii.gz -o stray/a.nii.gz": "is the image itself",
    "-i stray/a.nii.gz stray/a.nii.gz -o out.nii.gz": "-i names 2 file(s), and the model takes 1 channel(s)",
    "-i stray/a.nii.gz stray/b.nii.gz -o out.nii.gz": "-i stray/b.nii.gz does not exist",
    "-i stray/a.nii.gz -o out.nii.gz -num_parts 2": "-num_parts shares out a folder",
    "-i stray/a.nii.gz -o out.nii.gz --engine ray": "--engine ray shares out a folder",
    "-i stray/a.nii.gz -o {model}/plans.json/out.nii.gz": "is a file",
    "-i stray": "a.nii.gz",
    "-i channels": "the model takes 1 channel",
    "-i gap": "the model takes 1 channel",
    "-i broken_link": "a link to a file that is missing",
    "-o {model}/plans.json": "is a file",
    "-o {model}/plans.json/x": "is a file",
    "-o EMPTY": "-o is empty",
    "-o out.nii.gz": "give a folder for the predictions",
    "--calibrate x": "--calibrate is for a set",
    "--calibration x": "--calibration is for a set",
    "--calibration x --max_drop 0.1": "--max_drop beside --calibration",
    "--calibrate x -num_parts 2": "leave out -num_parts",
    "--calibrate x --engine ray": "leave out --engine ray",
    "--calibrate x --continue_prediction": "leave out --continue_prediction",
    "--calibrate x --save_patches": "leave out --save_patches",
    "--calibrate x -prev_stage_predictions y": "leave out -prev_stage_predictions",
    "--orientation RAS --save_probabilities": "--orientation turns labels back",
    "--explore 3": "--explore is for a set",
    "--explore -1": "--explore is -1",
    "--orientation XYZ": "--orientation is XYZ",
    "-m missing": "not the folder of a trained model",
    "-m {model}/fold_0": "not the folder of a trained model",
    "-m {model}/plans.json": "not the folder of a trained model",
    "--unknown": "unrecognized arguments",
}


@pytest.mark.parametrize("flags", list(FLAGS))
def test_flags_are_refused_in_one_line(images, untrained, tmp_path, monkeypatch, flags, capfd):
    if (flags.endswith("-device cuda") and torch.cuda.is_available()) or (
        flags.endswith("-device mps") and torch.backends.mps.is_available()
    ):
        pytest.skip("this machine has the device")
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "stray", "channels", "gap", "broken_link", "dicom"):
        Path(folder).mkdir()
    write_image(Path("stray/a.nii.gz"))
    for name in ("channels/a_0000", "channels/a_0001", "gap/a_0001"):
        write_image(Path(f"{name}.nii.gz"))
    Path("dicom/slice").write_bytes(bytes(128) + b"DICM")
    Path("broken_link/a_0000.nii.gz").symlink_to("nowhere")
    given = [word.format(model=untrained) for word in flags.split()]
    defaults = {"-i": str(images), "-o": "out", "-m": str(untrained), "-device": "cpu"}
    for flag, value in defaults.items():
        if flag not in given:
            given += [flag, value]
    given = [word.removeprefix("EMPTY") for word in given]
    assert FLAGS[flags] in refused(given, capfd)
    assert not Path("out").exists()


WITHOUT_FOLDER = {
    "-d abc": "no such dataset",
    "-d 4": "no such dataset",
    "-d 99999": "no such dataset",
    "-d -1": "no such dataset",
    "": "no NMSW models under nnUNet_results",
    "-tr nnUNetTrainerNMSW_5epochs": "no NMSW models that match",
}


@pytest.mark.parametrize("flags", list(WITHOUT_FOLDER))
def test_models_that_are_not_there(images, untrained, tmp_path, monkeypatch, flags, capfd):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    results = tmp_path / "nnUNet_results" / "Dataset001_X"
    # Folders that are none of a model, and a model whose plans are broken, end no search.
    (results / "a__b__c__d").mkdir(parents=True)
    (results / "a__b").mkdir()
    broken = results / "nnUNetTrainerNMSW__nnUNetPlans__3d_fullres"
    shutil.copytree(untrained, broken)
    (broken / "plans.json").write_text("[")
    output = str(tmp_path / "out")
    assert WITHOUT_FOLDER[flags] in refused(["-i", str(images), "-o", output, *flags.split(), "-device", "cpu"], capfd)
    if not flags:
        shutil.copytree(untrained, results / "nnUNetTrainerNMSW_5epochs__nnUNetPlans__3d_fullres")
        main(["-i", str(images), "-o", output, "-device", "cpu", "-npp", "0", "-nps", "1"])
        assert (tmp_path / "out" / "good.nii.gz").is_file()


def test_the_folds_there_are_are_used(images, untrained, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(untrained, model)
    (model / "fold_0").rename(model / "fold_7")
    (model / "fold_x").mkdir()
    main(["-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu", "-npp", "0"])
    assert "Using folds 7" in capsys.readouterr().out


def changed(content: Any, path: str, value: Any) -> Any:
    """A copy of a document with another value, or without the key where the value is `DELETED`."""
    result = copy.deepcopy(content)
    *keys, last = path.split(".")
    inner = result
    for key in keys:
        inner = inner[key]
    if value is DELETED:
        del inner[last]
    else:
        inner[last] = value
    return result


DELETED = object()
CONFIGURATION = "configurations.3d_fullres"
TEXTS = {"empty": b"", "cut off": None, "a list": b"[]", "a number": b"7", "not UTF-8": b'{"a": "\xff"}'}
TEXTS["deep"] = b"[" * 9999
DOCUMENTS = {
    "plans.json": [
        ("configurations", DELETED),
        ("configurations", []),
        ("configurations", {}),
        ("transpose_forward", DELETED),
        ("transpose_forward", [0, 1]),
        ("transpose_backward", "xyz"),
        ("transpose_backward", [0, 1, 7]),
        ("image_reader_writer", DELETED),
        ("image_reader_writer", "NoSuchReader"),
        ("image_reader_writer", 3),
        ("foreground_intensity_properties_per_channel", 3),
        (CONFIGURATION, 3),
        (CONFIGURATION, {"inherits_from": "missing"}),
        (CONFIGURATION, {"inherits_from": "3d_fullres"}),
        (f"{CONFIGURATION}.patch_size", DELETED),
        (f"{CONFIGURATION}.patch_size", "large"),
        (f"{CONFIGURATION}.patch_size", [8, 8]),
        (f"{CONFIGURATION}.patch_size", [8, 8, 0]),
        (f"{CONFIGURATION}.patch_size", [8, 8, 7.5]),
        (f"{CONFIGURATION}.patch_size", [8, 8, 7]),
        (f"{CONFIGURATION}.spacing", DELETED),
        (f"{CONFIGURATION}.spacing", [1, 1, 0]),
        (f"{CONFIGURATION}.spacing", [1, 1, -1]),
        (f"{CONFIGURATION}.spacing", None),
        (f"{CONFIGURATION}.normalization_schemes", DELETED),
        (f"{CONFIGURATION}.normalization_schemes", [7]),
        (f"{CONFIGURATION}.architecture", DELETED),
        (f"{CONFIGURATION}.architecture", {}),
        (f"{CONFIGURATION}.architecture.network_class_name", "torch.nn.Missing"),
        (f"{CONFIGURATION}.architecture.network_class_name", 5),
        (f"{CONFIGURATION}.architecture.arch_kwargs", None),
        (f"{CONFIGURATION}.architecture.arch_kwargs.n_stages", "two"),
        (f"{CONFIGURATION}.architecture.arch_kwargs.features_per_stage", [4]),
        (f"{CONFIGURATION}.architecture.arch_kwargs.features_per_stage", [8, 16]),
        (f"{CONFIGURATION}.architecture.arch_kwargs.features_per_stage", ["a", "b"]),
        (f"{CONFIGURATION}.architecture.arch_kwargs.strides", 3),
        (f"{CONFIGURATION}.architecture.arch_kwargs.conv_op", "torch.nn.Conv9d"),
        (f"{CONFIGURATION}.architecture._kw_requires_import", ["missing"]),
        (f"{CONFIGURATION}.nmsw", 3),
        (f"{CONFIGURATION}.nmsw.num_patches", []),
        (f"{CONFIGURATION}.nmsw.unknown", 1),
        (f"{CONFIGURATION}.resampling_fn_probabilities", 3),
    ],
    "dataset.json": [
        ("labels", DELETED),
        ("labels", []),
        ("labels", {"organ": 1}),
        ("labels", {"background": 0, "organ": "one"}),
        ("labels", {"background": 0, "organ": 1}),
        ("file_ending", DELETED),
        ("file_ending", 3),
        ("file_ending", "nii.gz"),
        ("file_ending", ".nii/.gz"),
        ("channel_names", DELETED),
        ("channel_names", {}),
        ("channel_names", 1),
    ],
    "fold_0/validation/automatic_patches.json": [
        ("cases", DELETED),
        ("cases", 30_000_000),
        ("cases", 0),
        ("cases", "many"),
        ("cases", -1),
        ("thresholds", []),
        ("thresholds", DELETED),
        ("thresholds", [{}]),
        ("thresholds", [{"stop_at": "low", "mean_dice": 0.5}]),
        ("thresholds", [{"stop_at": 0.1, "mean_dice": 5}]),
        ("thresholds", [{"stop_at": -0.1, "mean_dice": 0.5}]),
    ],
}


@pytest.mark.parametrize(
    ("document", "key", "value"),
    [(document, key, value) for document, changes in DOCUMENTS.items() for key, value in changes]
    + [(document, None, text) for document in DOCUMENTS for text in TEXTS],
)
def test_broken_documents_are_named(images, untrained, tmp_path, document, key, value, capfd):
    model = tmp_path / "model"
    shutil.copytree(untrained, model)
    file = model / document
    file.parent.mkdir(exist_ok=True)
    if "automatic" in document:
        file.write_text(json.dumps({"cases": 2, "thresholds": [{"stop_at": 0.1, "mean_dice": 0.5, "patches": [1, 2]}]}))
    content = json.loads(file.read_text())
    if key is None:
        text = TEXTS[value]
        file.write_bytes(file.read_bytes()[:-20] if text is None else text)
    else:
        file.write_text(json.dumps(changed(content, key, value)))
    flags = ["-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu", "-npp", "0"]
    message = refused([*flags, *(["-k", "auto"] if "automatic" in document else [])], capfd)
    # Some values only show in the network that is built of them, or in the image that is read.
    assert Path(document).name in message or "in the plans" in message, message
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_calibration_of_what_is_no_number_is_refused(tmp_path, value):
    file = tmp_path / "fold_0" / "validation" / "automatic_patches.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"cases": 1, "thresholds": [{"stop_at": 0.1, "mean_dice": value}]}))
    with pytest.raises(UserError, match=r"automatic_patches.json is no JSON: it holds .*--val"):
        threshold_of_folds(tmp_path, [0], 0.005)


SETTINGS: list[tuple[str, Any]] = [
    (name, value)
    for name in (*ALLOWED_SETTINGS, *RETIRED)
    for value in (
        {"global_architecture": (3, "x", [], {"unknown": 1}, {"arch_kwargs": 1}, {"network_class_name": 5})}.get(
            name, (None, "x", -1, float("nan"), float("inf"), [], {}, 10**9, True)
        )
    )
]
ALLOWED = {
    *((name, None) for name in ("windows_at_once", "seed")),
    *(("seed", 10**9), ("windows_at_once", 10**9), ("num_patches", 10**9), ("fuse_random_windows", True)),
}
"""Strange values of settings that mean something."""


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_settings_are_refused_in_one_line(name, value):
    configuration = make_configuration(**{name: value})
    if (name, value if isinstance(value, int | str | None) else repr(value)) in ALLOWED:
        settings_of(configuration)
        return
    with pytest.raises(UserError) as error:
        settings_of(configuration)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_there_are_many():
    documents = sum(map(len, DOCUMENTS.values())) + len(DOCUMENTS) * len(TEXTS)
    assert len(FLAGS) + len(WITHOUT_FOLDER) + documents >= 140
    assert len(SETTINGS) >= 150


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("cut", "cut off"),
        ("flip", "wrong checksum"),
        ("text", "no checkpoint"),
        ("nan", "no numbers"),
        ("inf", "no numbers"),
        ("layer missing", "Missing key"),
        ("shape", "size mismatch"),
        ("no weights", "network_weights"),
        ("no configuration", "init_args.configuration"),
        ("other configuration", "has no configuration 2d"),
        ("no trainer", "trainer_name"),
        ("unknown trainer", "nnUNetTrainerMissing"),
    ],
)
def test_damaged_checkpoints_are_refused(images, tmp_path, damage, says, capfd):
    model = write_model(tmp_path / "model")
    file = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    name = next(iter(content["network_weights"]))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-2000])
    elif damage == "flip":
        data = bytearray(file.read_bytes())
        weights = content["network_weights"][name].numpy().tobytes()
        data[data.index(weights)] ^= 0x55
        file.write_bytes(data)
    elif damage == "text":
        file.write_bytes(b"half a file")
    else:
        changes = {
            "nan": lambda: content["network_weights"][name].view(-1)[:1].fill_(np.nan),
            "inf": lambda: content["network_weights"][name].view(-1)[:1].fill_(np.inf),
            "layer missing": lambda: content["network_weights"].pop(name),
            "shape": lambda: content["network_weights"].update({name: torch.zeros(3)}),
            "no weights": lambda: content.pop("network_weights"),
            "no configuration": lambda: content.pop("init_args"),
            "other configuration": lambda: content["init_args"].update(configuration="2d"),
            "no trainer": lambda: content.pop("trainer_name"),
            "unknown trainer": lambda: content.update(trainer_name="nnUNetTrainerMissing"),
        }
        changes[damage]()
        torch.save(content, file)
    flags = ["-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu", "-npp", "0"]
    message = refused(flags, capfd)
    assert says in message
    assert str(model) in message
