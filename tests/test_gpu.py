"""What only a GPU can show; all skipped without one (``pytest -m gpu`` runs these and the GPU cases of test_amp.py)."""

import copy

import pytest
import torch
from conftest import GPU, assert_same_weights
from repr_det.method.slim import SlimNetwork
from test_processes import TRANSITIONS, events, run
from test_slim import drop, resnet, step

from repr_det import Trainer
from repr_det.method.layers import find_filter_layers
from repr_det.method.orthogonality import inter_filter_orthogonality, least_overlap_filters

pytestmark = GPU


def test_new_filters_are_orthogonal_and_those_of_the_cpu():
    """512 x 512 x 3 x 3: the largest 3x3 layer of R50; seeds come from a CPU generator, as in RePrScheme."""
    weight = torch.randn(512, 512, 3, 3, generator=torch.Generator().manual_seed(0))
    kept, dropped = weight[:358], weight[358:]
    new = least_overlap_filters(kept.cuda(), dropped.cuda(), torch.Generator().manual_seed(1))
    assert new.is_cuda
    rows = torch.nn.functional.normalize(torch.cat([weight.flatten(1).cuda(), new.flatten(1)]).double())
    cosines = rows[512:] @ rows.T
    cosines[:, 512:] -= torch.eye(len(new), device="cuda", dtype=torch.float64)
    assert cosines.abs().max() <= 1e-5
    on_cpu = least_overlap_filters(kept, dropped, torch.Generator().manual_seed(1))
    assert (new.cpu() - on_cpu).abs().max() < 1e-4


def test_metric_is_that_of_the_cpu():
    weight = torch.randn(256, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        inter_filter_orthogonality(weight.cuda()).cpu(), inter_filter_orthogonality(weight), atol=1e-5
    )


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN"])
def test_slim_sub_network_is_the_masked_one(norm):
    masked = resnet(50, norm)
    layers, masks = drop(masked, ["*conv*"])
    slim = copy.deepcopy(masked).cuda()
    masked.cuda()
    masks = {name: mask.cuda() for name, mask in masks.items()}
    mine = find_filter_layers(slim, list(masks))
    x = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64).cuda()
    wanted = step(masked, x, layers, masks)
    with SlimNetwork(slim, mine, masks):
        found = step(slim, x, mine, masks)
    for a, b in zip([*found, *slim.parameters()], [*wanted, *masked.parameters()], strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("criterion", ["ortho", "taylor"])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN"])
def test_a_cycle_on_the_gpu_and_its_resumption(tiny_cfg, norm, criterion):
    opts = [*TRANSITIONS, "MODEL.DEVICE", "cuda", "MODEL.RESNETS.NORM", norm, "REPR.CRITERION", criterion]
    opts += ["SOLVER.BASE_LR", "0.0001"]
    trainer = Trainer(tiny_cfg(*opts))
    trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    again = Trainer(tiny_cfg(*opts))
    with open(f"{again.cfg.OUTPUT_DIR}/last_checkpoint", "w") as file:
        file.write("model_0000001.pth")  # in the sub-network phase
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    again.train()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("norm", ["SyncBN", "FrozenBN"])
def test_nccl_ranks_agree(tiny_data, tmp_path, norm):
    opts = [*TRANSITIONS, "MODEL.DEVICE", "cuda", "MODEL.RESNETS.NORM", norm, "SOLVER.BASE_LR", "0.0001"]
    assert run(tmp_path, tiny_data, 2, opts) == 0
    ranks = [torch.load(tmp_path / f"rank{rank}.pth", weights_only=True, map_location="cpu") for rank in (0, 1)]
    assert_same_weights(*ranks)
    assert [e["event"] for e in events(tmp_path)] == ["drop", "restore"]
