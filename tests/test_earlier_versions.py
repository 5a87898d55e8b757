"""Runs of earlier versions are resumed: their states in tests/data lie in the sub-network phase."""

import io
import lzma
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import At, assert_same_weights, end_of
from torch import nn

from repr_det import RePr, RePrSchedule

HERE = Path(__file__).parent


def assert_new_directions(weight: torch.Tensor, mask: torch.Tensor, old: torch.Tensor) -> None:
    """Restored filters are orthogonal to each other, to the kept ones and to their old values, where there is room."""
    rows = F.normalize(torch.cat([weight[mask], weight[~mask], old]).double().flatten(1))
    cosines = (rows[: int(mask.sum())] @ rows.T).abs()
    cosines.fill_diagonal_(0)
    if mask.any() and len(rows) <= rows.shape[1]:
        assert cosines.max() < 1e-5


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d])
def test_a_loop_of_version_0_2_0_is_resumed(norm):
    with lzma.open(HERE / "data" / "loop_of_version_0_2_0.pt.xz") as file:
        saved = torch.load(io.BytesIO(file.read()), weights_only=True)[norm.__name__]
    draw = torch.Generator().manual_seed(1)
    batches = [(torch.randn(6, 3, 8, 8, generator=draw), torch.randint(3, (6,), generator=draw)) for _ in range(12)]
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 10, 3), norm(10), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 3)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    keys = {"loader": batches[:4], "loss": lambda batch: F.cross_entropy(model(batch[0]), batch[1])}
    one = RePr(model, optimizer, 12, schedule=RePrSchedule(3, 4, 1), **keys)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    one.load_state_dict(saved["repr"])
    state = saved["repr"]["scheme"]
    assert (one.steps, one.phase, one.scheme.cycle, one.scheme.seed) == (5, "sub", 0, 5)
    assert_same_weights(one.scheme.masks, state["masks"])
    for images, classes in batches[5:7]:
        optimizer.zero_grad()
        F.cross_entropy(model(images), classes).backward()
        optimizer.step()
        one.step()
    assert (one.steps, one.phase, one.scheme.cycle) == (7, "full", 1)
    for name, old in state["old"].items():
        mask, affine = state["masks"][name], model[int(name) + 1]
        assert_new_directions(model.get_submodule(name).weight.detach(), mask, old["weight"])
        if norm is not nn.BatchNorm2d:
            assert torch.equal(affine.weight[mask], old["norm.weight"])
            assert torch.equal(affine.bias[mask], old["norm.bias"])
            out = model[: int(name) + 2](torch.cat([x for x, _ in batches[:4]])).detach()[:, mask]
            moments = torch.stack([out.mean((0, 2, 3)), out.std((0, 2, 3), correction=0)])
            torch.testing.assert_close(moments, old["moments"].to(moments), rtol=1e-3, atol=1e-4)


def test_a_run_of_version_0_1_0_is_resumed(tiny_cfg, tmp_path):
    folder = tmp_path / "run"
    with tarfile.open(HERE / "data" / "run_of_version_0_1_0.tar.xz") as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # not in 3.11.2
    opts = (
        "MODEL.BACKBONE.NAME build_resnet_fpn_backbone MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.RES2_OUT_CHANNELS 4 "
        "MODEL.RESNETS.WIDTH_PER_GROUP 2 MODEL.RESNETS.STEM_OUT_CHANNELS 4 MODEL.FPN.OUT_CHANNELS 8 "
        "MODEL.ROI_BOX_HEAD.FC_DIM 8 SOLVER.MAX_ITER 8 "
        "REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 3 REPR.NUM_CYCLES 1 SOLVER.CHECKPOINT_PERIOD 4"
    )
    start = torch.load(folder / "model_0000003.pth", weights_only=True)
    state = start["trainer"]["hooks"]["RePrHook"]["scheme"]
    assert any(mask.any() for mask in state["masks"].values())

    def look():
        for name, old in state["old"].items():
            weight, mask = returned.trainer.model.get_submodule(name).weight.detach(), state["masks"][name]
            assert_new_directions(weight, mask, old["weight"])
            assert weight[mask].flatten(1).any(1).all(), name

    returned = At(5, look)
    found = end_of(tiny_cfg(*opts.split(), "OUTPUT_DIR", folder), returned, resume=True)
    for name, value in found.items():
        assert torch.isfinite(value).all(), name
    assert not any(torch.equal(found[f"{name}.weight"], start["model"][f"{name}.weight"]) for name in state["masks"])
