"""Compiled branches against the same network without compilation, on a CPU."""

import copy

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import DATASET_JSON, build_network, make_plans
from torch._dynamo.utils import counters
from training import ENCODING, training_step

from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.volume.windows import downsample


def step(network: NMSWNetwork, shape: tuple[int, int, int]) -> list[torch.Tensor]:
    """Loss and gradients of a training step."""
    torch.manual_seed(1)
    network.train()
    network.zero_grad()
    loss = training_step(network, shape).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in network.parameters())]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.compatibility("compile", "both branches compiled (aot_eager): the same outputs and gradients")
@pytest.mark.parametrize("windows_at_once", [None, 3])
def test_compiled_branches_give_the_same_results(windows_at_once):
    """With PyTorch's compiler up to, and without, the backend that needs a C++ compiler."""
    torch._dynamo.reset()
    plain = build_network(windows_at_once=windows_at_once)
    compiled = copy.deepcopy(plain)
    before = graphs()
    compiled.compile_branches("aot_eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for shape in [(16, 20, 24), (18, 33, 20)]:
        torch.testing.assert_close(step(compiled, shape), step(plain, shape))
        plain.load_state_dict(compiled.state_dict())
    in_training = graphs()
    assert in_training > before
    torch.testing.assert_close(step(compiled, (20, 24, 17)), step(plain, (20, 24, 17)))
    assert graphs() == in_training  # another shape needs no other version

    for network in (plain, compiled):
        network.eval()
    patch, low = (
        torch.randn(1, 1, 8, 8, 8),
        downsample(torch.randn(1, 1, 18, 20, 25), plain.settings.downsampling_factor),
    )
    with torch.inference_mode():
        torch.testing.assert_close(compiled(patch), plain(patch))
        torch.testing.assert_close(compiled.coarse(low, ENCODING)[:2], plain.coarse(low, ENCODING)[:2])
    assert graphs() > in_training


def test_deep_supervision_can_be_switched_off_after_compilation():
    torch._dynamo.reset()
    network = build_network(deep_supervision=True)
    network.compile_branches("aot_eager")
    patch = torch.randn(1, 1, 8, 8, 8)
    assert isinstance(network(patch), list | tuple)
    network.decoder.deep_supervision = False
    assert isinstance(network(patch), torch.Tensor)


@pytest.mark.compatibility("compile", "nnUNet_compile=1 at prediction compiles the branches, not the whole")
def test_the_predictor_compiles_the_branches_where_nnunet_compiles_the_network(monkeypatch):
    torch._dynamo.reset()
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compile_module(module, backend="aot_eager"))
    network, plans = build_network().eval(), PlansManager(make_plans())
    configuration = plans.get_configuration("3d_fullres")
    volume, predictions = torch.randn(1, 12, 12, 8), []
    for compiled in (False, True):
        monkeypatch.setenv("nnUNet_compile", str(compiled))
        predictor = NMSWPredictor(num_patches=2, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        parameters = [network.state_dict()]
        predictor.manual_initialization(
            network, plans, configuration, parameters, DATASET_JSON, "nnUNetTrainerNMSW", None
        )
        assert predictor.network is network  # and not nnU-Net's compilation of it as a whole
        before = graphs()
        predictions.append(predictor.predict_logits_from_preprocessed_data(volume))
        assert (graphs() > before) is compiled
    torch.testing.assert_close(*predictions)
