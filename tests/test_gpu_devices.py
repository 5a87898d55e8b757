"""Several devices: a model that is not on the current one, layers on two, DataParallel."""

import pytest
import torch
from conftest import GPU
from gpu_nets import BATCHES, Net, loss_of, trained
from torch import nn

from repr_det.method.passes import passes_over
from repr_det.network.state import random_state, set_random_state, undisturbed

pytestmark = [*GPU, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
DEVICES = [torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)]


def drawn() -> list[list[float]]:
    return [torch.rand(5, device=device).tolist() for device in DEVICES]


def test_extra_passes_and_a_resume_put_back_the_random_states_of_all_devices():
    net = nn.Sequential(Net(), nn.Dropout(0.5)).to("cuda:1")
    passes = passes_over(net, BATCHES, lambda batch: loss_of(net, batch))
    torch.manual_seed(5)
    state = random_state()
    expected = drawn()
    assert expected[1] == expected[2] != expected[0]  # every device has a generator of its own, by the same seed
    for disturb in (
        lambda: loss_of(net, BATCHES[0]),
        lambda: list(passes.batches(2, 0)),
        lambda: [torch.rand(3, device=device) for device in DEVICES],
    ):
        set_random_state(state)
        with undisturbed(net):
            disturb()
        assert drawn() == expected
    torch.manual_seed(7)
    set_random_state(state)  # as a resume does
    assert drawn() == expected


@pytest.mark.parametrize(
    ("norm", "criterion"), [("BN", "random"), ("BN", "redundant"), ("FrozenBN", "apoz"), ("GN", "ortho")]
)
def test_a_model_that_is_not_on_the_current_device(norm, criterion):
    assert torch.cuda.current_device() == 0
    net = Net(norm).to("cuda:1")
    trained(net, criterion=criterion, returns="function_preserving" if criterion == "ortho" else "as_published")
    assert {parameter.device for parameter in net.parameters()} == {DEVICES[2]}


class Split(Net):
    """Goes on on another device behind the first block."""

    def __init__(self, norm: str) -> None:
        super().__init__(norm)
        for module in (self.conv1, self.norm1):
            module.to("cuda:0")
        for module in (self.block, self.conv2, self.norm2, self.conv3, self.norm3, self.head):
            module.to("cuda:1")
        self.norm1.register_forward_hook(lambda module, inputs, output: output.to("cuda:1"))

    def forward(self, images):
        return super().forward(images).to("cuda:0")


@pytest.mark.parametrize("criterion", ["ortho", "redundant", "apoz"])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_layers_on_two_devices(norm, criterion):
    scheme = trained(Split(norm), criterion=criterion, averages=[Net(norm).to("cuda:1")]).training.scheme
    assert {str(layer.weight.device) for layer in scheme.layers} == {"cuda:0", "cuda:1"}


def test_data_parallel_in_both_phases():
    net = Net().to("cuda:0")
    scheme = trained(nn.DataParallel(net, [0, 1])).training.scheme
    assert len(scheme.layers) == len([module for module in net.modules() if isinstance(module, nn.Conv2d)])
