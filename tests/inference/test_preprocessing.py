import threading
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.data_iterators import PreprocessAdapter
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import DATASET_JSON, initialized, make_plans

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.preprocessing import is_stock, preprocessed_cases
from nnunet_nmsw.inference.resampling import InferenceConfiguration


@pytest.fixture
def images(tmp_path):
    random, files = np.random.default_rng(0), []
    for case in range(4):
        array = random.normal(size=(12, 14 + case, 16)).astype(np.float32)
        array[:, :2] = 0  # to be cropped
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((0.8, 0.8, 1.5 + 2 * case))  # the last ones are anisotropic
        files.append([str(tmp_path / f"case{case}_0000.nii.gz")])
        sitk.WriteImage(image, files[-1][0])
    return files


@pytest.fixture
def predictor(tiny_network):
    made = NMSWPredictor("all", use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    return initialized(made, tiny_network)


@pytest.mark.parametrize("with_previous_stage", [False, True])
@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_cases_are_nnunets_in_their_order(predictor, images, num_threads, with_previous_stage):
    previous = None
    if with_previous_stage:
        previous = [file.replace("_0000", "_previous") for (file,) in images]
        for (file,), labels in zip(images, previous, strict=True):
            image = sitk.ReadImage(file)
            sitk.WriteImage(sitk.Cast(image > 0.5, sitk.sitkUInt8), labels)
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    expected = PreprocessAdapter(
        images, previous, DefaultPreprocessor(False), list("abcd"), plans, DATASET_JSON, configuration
    )
    cases = list(preprocessed_cases(predictor, images, previous, list("abcd"), num_threads))
    assert [case["ofile"] for case in cases] == list("abcd")
    for case, of_nnunet in zip(cases, expected, strict=True):
        assert case["data"].dtype == torch.float32
        torch.testing.assert_close(case["data"], of_nnunet["data"].float(), atol=1e-4, rtol=0)
        for name in ("spacing", "bbox_used_for_cropping", "shape_after_cropping_and_before_resampling"):
            assert case["data_properties"][name] == of_nnunet["data_properties"][name]


def test_no_more_cases_are_held_than_threads(predictor, images, monkeypatch):
    started = []
    gate = threading.Event()

    class Counting(DefaultPreprocessor):
        def run_case(self, image_files, *args):
            started.append(image_files)
            if len(started) > 2:
                gate.set()
            return super().run_case(image_files, *args)

    configuration = predictor.configuration_manager
    monkeypatch.setattr(type(configuration), "preprocessor_class", property(lambda self: Counting))
    cases = preprocessed_cases(predictor, images, None, None, 2)
    next(cases)
    assert not gate.wait(0.5)  # two at the first request; the third only at the second
    next(cases)
    assert gate.wait(10)
    cases.close()


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize("max_memory", [None, 8 << 30])
def test_an_image_that_cannot_be_read_is_reported_and_the_others_are_predicted(
    predictor, images, tmp_path, capsys, max_memory, reader
):
    predictor.max_memory = max_memory
    predictor.plans_manager.plans["image_reader_writer"] = reader
    Path(images[1][0]).write_bytes(b"what was left on the disk when it was full")
    outputs = [str(tmp_path / name) for name in "abcd"]
    with pytest.raises(UserError, match=r"cannot read .*case1_0000"):
        predictor.predict_from_files(images, outputs, num_processes_preprocessing=2)
    assert sorted(file.name for file in tmp_path.glob("?.nii.gz")) == ["a.nii.gz", "c.nii.gz", "d.nii.gz"]
    assert "case1_0000" in capsys.readouterr().out


def test_other_ways_to_resample_and_other_preprocessors_are_left_alone():
    plans = make_plans()
    plans["configurations"]["3d_fullres"]["resampling_fn_data"] = "resample_torch_fornnunet"
    plans["configurations"]["3d_fullres"]["resampling_fn_data_kwargs"] = {"is_seg": False, "force_separate_z": False}
    configuration = PlansManager(plans).get_configuration("3d_fullres")
    faster = InferenceConfiguration(configuration, torch.device("cpu"), with_segmentation=True)
    assert faster.resampling_fn_data.func.__name__ == "resample_torch_fornnunet"
    assert faster.resampling_fn_seg.func is configuration.resampling_fn_seg.func

    class Other(DefaultPreprocessor):
        def run_case_npy(self, *args):
            return super().run_case_npy(*args)

    assert is_stock(DefaultPreprocessor(False))
    assert not is_stock(Other(False))
