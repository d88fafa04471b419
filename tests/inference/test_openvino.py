"""Branches computed by OpenVINO: PyTorch's logits, of every backbone, from the cache and without it."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from architectures import BACKBONES, build, plans_with, unet
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from old_model import CASES, FLAGS, FOLDER, read
from tiny import DATASET_JSON, build_network, initialized, make_plans

from nnunet_nmsw.commands.predict import main
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference import openvino_models
from nnunet_nmsw.inference.openvino_branches import OpenVINO, OpenVINOBranch, StockNetwork
from nnunet_nmsw.inference.openvino_models import DIGEST, MODEL, WEIGHTS, Converted, cache_folder
from nnunet_nmsw.inference.predictor import NMSWPredictor

pytest.importorskip("openvino")
SHAPES = ((1, 1, 16, 16, 16), (3, 1, 16, 8, 24), (1, 1, 32, 16, 8))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of converted branches, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_folder()


def branch_of(network, cache):
    return OpenVINOBranch(network, False, cache)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_gives_pytorchs_logits(name, cache, capsys):
    architecture, patch, _ = BACKBONES[name]
    setting = unet("PlainConvUNet") if name in ("SwinUNETR", "Primus") else None
    plans = plans_with(architecture, patch, downsampling_factor=[2, 2, 2], global_architecture=setting)
    network = build(plans).eval()
    branch = branch_of(network.local_branch, cache)
    patches = torch.randn(2, 1, patch, patch, patch)
    with torch.no_grad():
        torch.testing.assert_close(branch(patches), network.local_branch(patches), atol=1e-4, rtol=1e-3)
    assert "does not take" not in capsys.readouterr().out


def test_volumes_of_any_size_take_one_conversion(cache):
    network = build_network().eval()
    branch = branch_of(network.global_branch, cache)
    for shape in SHAPES:
        volume = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(branch(volume), network.global_branch(volume), atol=1e-4, rtol=1e-3)
    assert [folder.name.endswith("_free") for folder in cache.iterdir()] == [True]


def test_the_cache_is_used_and_a_broken_one_is_made_again(cache, monkeypatch):
    network, volume = build_network().eval().global_branch, torch.randn(SHAPES[0])
    expected = branch_of(network, cache)(volume)
    (folder,) = cache.iterdir()
    conversions = []
    convert = openvino_models.converted

    def counted(*args):
        conversions.append(args)
        return convert(*args)

    monkeypatch.setattr(openvino_models, "converted", counted)
    assert torch.equal(branch_of(network, cache)(volume), expected)
    assert not conversions
    for number, broken in enumerate((WEIGHTS, MODEL, DIGEST), 1):
        size = (folder / broken).stat().st_size
        os.truncate(folder / broken, size // 2)
        assert torch.equal(branch_of(network, cache)(volume), expected)
        assert len(conversions) == number
        assert (folder / broken).stat().st_size == size


def test_other_weights_are_another_branch(cache):
    network = build_network().eval().global_branch
    other = copy.deepcopy(network)
    with torch.no_grad():
        next(iter(other.parameters())).add_(1)
    names = {Converted(of, cache).name for of in (network, other, copy.deepcopy(network))}
    assert len(names) == 2


def test_a_branch_that_does_not_convert_is_pytorchs(cache, capsys):
    class Sorting(torch.nn.Module):
        def forward(self, x):
            return x @ torch.linalg.qr(x[0, 0, 0])[0]

    branch, volume = branch_of(Sorting(), cache), torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(branch(volume), Sorting()(volume))
    assert torch.equal(branch(volume), Sorting()(volume))
    assert capsys.readouterr().out.count("PyTorch computes it") == 1


@pytest.mark.parametrize(("folds", "context"), [(1, 2), (2, 0)])
def test_a_prediction_is_pytorchs(folds, context, cache):
    predictions = []
    for backend in ("pytorch", "openvino"):
        predictor = NMSWPredictor(num_patches=3, device=torch.device("cpu"), allow_tqdm=False, backend=backend)
        initialized(predictor, build_network(context_channels=context), folds)
        volume = torch.randn(1, 20, 16, 12, generator=torch.Generator().manual_seed(0))
        predictions.append(predictor.predict_case_logits({"data": volume}))
    logits = [prediction.logits_CDHW.float().numpy() for prediction in predictions]
    np.testing.assert_allclose(*logits, atol=2e-3)
    starts = [[windows.starts.tolist() for windows in prediction.windows] for prediction in predictions]
    assert starts[0] == starts[1]


def test_a_stock_ensemble_predicts_what_pytorchs_does(cache):
    network = build_network().local_branch
    weights = [{name: weight * factor for name, weight in network.state_dict().items()} for factor in (1, 1.5)]
    volume = torch.randn(1, 20, 16, 12, generator=torch.Generator().manual_seed(0))
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
    plans = PlansManager(make_plans())
    arguments = (plans, plans.get_configuration("3d_fullres"), weights, DATASET_JSON, "nnUNetTrainer", (0, 1, 2))
    predictor.manual_initialization(network, *arguments)
    expected = predictor.predict_logits_from_preprocessed_data(volume)
    predictor.network = StockNetwork(network, OpenVINO(cache=cache))
    for _ in range(2):
        found = predictor.predict_logits_from_preprocessed_data(volume)
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert all((folder / MODEL).is_file() for folder in cache.iterdir())  # otherwise PyTorch has computed it
    assert len(list(cache.iterdir())) == 2


def test_what_cannot_be_is_said_in_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"backend.*cpu"):
        NMSWPredictor(backend="openvino", device=torch.device("meta"))
    with pytest.raises(UserError, match=r"precision.*float32, bfloat16"):
        NMSWPredictor(precision="int4", device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"pytorch.*openvino"):
        NMSWPredictor(backend="tensorflow", device=torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install 'nnunet-nmsw\[openvino\]'"):
        NMSWPredictor(backend="openvino", device=torch.device("cpu"))


def test_the_command_predicts_what_pytorch_does(cache, tmp_path):
    for backend in ("pytorch", "openvino"):
        flags = [*FLAGS, "-k", "10%", "--disable_tta", "--backend", backend]
        main(["-i", str(FOLDER / "images"), "-o", str(tmp_path / backend), *flags])
    assert list(cache.iterdir())
    for case in CASES:
        expected, found = (read(tmp_path / backend / f"{case}.nii.gz") for backend in ("pytorch", "openvino"))
        assert (expected != 0).any()
        assert (found != expected).sum() <= 5


def test_usage_is_not_reported():
    code = "from nnunet_nmsw.inference.openvino_models import import_openvino; import_openvino(); import sys; "
    code += "print(sys.modules['openvino_telemetry'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "None"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_cache_that_cannot_be_read_is_none(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    _reads_nothing(tmp_path / "closed" / "branch")


def test_what_is_no_cache_is_none(tmp_path):
    (tmp_path / "file").touch()
    _reads_nothing(tmp_path / "file" / "branch")
    _reads_nothing(tmp_path / "missing")


def _reads_nothing(folder):
    assert openvino_models.read(folder) is None
    assert not openvino_models.is_known_as_fixed(folder)


def test_the_last_sizes_of_a_branch_are_kept(tmp_path):
    folders = [tmp_path / f"branch_{number}x1" for number in range(openvino_models.MOST_SIZES + 3)]
    for age, folder in enumerate(folders):
        folder.mkdir()
        os.utime(folder, (age, age))
    openvino_models.remove_oldest(tmp_path.glob("branch_*x*"))
    assert sorted(tmp_path.iterdir()) == sorted(folders[3:])
