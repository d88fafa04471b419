import pytest
import torch
from tiny import make_plans, make_trainer

from nnunet_nmsw.model.weights import lay_out_

CHANNELS_LAST = torch.channels_last_3d


@pytest.fixture
def network() -> torch.nn.Module:
    network = torch.nn.Module()
    for axes in range(6):
        network.register_parameter(f"of_{axes}_axes", torch.nn.Parameter(torch.randn([2] * axes)))
    return network


def test_weights_keep_their_values_and_stay_the_same_parameters(network):
    before = {name: (parameter, parameter.clone()) for name, parameter in network.named_parameters()}
    lay_out_(network, torch.device("cpu"))
    for name, parameter in network.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert network.of_5_axes.is_contiguous(memory_format=CHANNELS_LAST)


def test_weights_of_a_gpu_stay_as_they_are(network):
    lay_out_(network, torch.device("cuda"))
    assert not network.of_5_axes.is_contiguous(memory_format=CHANNELS_LAST)


def test_gradients_are_those_of_the_other_layout():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(3, 8, 3, padding=1), torch.nn.ConvTranspose3d(8, 4, 2, stride=2))
    network.double()
    volume = torch.randn(2, 3, 6, 5, 4, dtype=torch.float64)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        network(volume).square().mean().backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    before = gradients()
    lay_out_(network, torch.device("cpu"))
    torch.testing.assert_close(gradients(), before)


@pytest.mark.usefixtures("folders")
def test_a_training_on_a_processor_has_the_layout_of_its_device():
    trainer = make_trainer(make_plans())
    trainer.initialize()
    weights = [parameter for parameter in trainer.nmsw_network.parameters() if parameter.ndim == 5]
    assert weights
    assert all(weight.is_contiguous(memory_format=CHANNELS_LAST) for weight in weights)
