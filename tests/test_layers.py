"""Candidates by name in Detectron2's models and others, what a training pass lets participate, and what a filter is."""

import pytest
import torch
import torch.distributed as dist
from conftest import refused
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.distributed import fsdp

from repr_det.method.errors import UserError
from repr_det.method.layers import find_filter_layers, zero_rows_
from repr_det.method.options import DETECTRON2_LAYERS
from repr_det.method.participants import Participants

LEVELS = "['p2','p3','p4','p5','p6']"
FILTERS = 32  # get_norm("GN") has 32 groups
PREDICTORS = {
    "GeneralizedRCNN": {f"proposal_generator.rpn_head.{name}" for name in ("objectness_logits", "anchor_deltas")},
    "RetinaNet": {"head.cls_score", "head.bbox_pred"},
}


@pytest.mark.parametrize(("kind", "norm"), [("GeneralizedRCNN", "BN"), ("GeneralizedRCNN", ""), ("RetinaNet", "BN")])
def test_in_a_detector_what_predicts_stays_out(kind, norm, tiny_cfg):
    opts = ["MODEL.META_ARCHITECTURE", kind, "MODEL.RETINANET.IN_FEATURES", LEVELS, "MODEL.RETINANET.NUM_CLASSES", 2]
    model = build_model(tiny_cfg(*opts, "MODEL.RESNETS.NORM", norm or "''")).train()
    boxes = Boxes(torch.tensor([[10.0, 10, 60, 70], [40, 30, 110, 90]]))
    instances = Instances((96, 128), gt_boxes=boxes, gt_classes=torch.tensor([0, 1]))
    participants = Participants(find_filter_layers(model, ["*"]), model)
    with EventStorage(0):
        model([dict(image=torch.randint(0, 255, (3, 96, 128)).float(), instances=instances) for _ in range(2)])
    found = {layer.name: layer.norm_name for layer in participants.agreed()}
    assert {layer.name for layer in participants.candidates} - found.keys() == PREDICTORS[kind]
    assert all(found[name] == (f"{name}.norm" if norm else None) for name in found if ".res" in name)


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (lambda: nn.BatchNorm2d(8), "batch"),
        (lambda: nn.GroupNorm(2, 8), "group"),
        (lambda: FrozenBatchNorm2d(8), "frozen"),
        (lambda: nn.ReLU(), "none"),
        (lambda: nn.BatchNorm2d(4), "none"),  # that of something else
    ],
)
@pytest.mark.parametrize("conv", [nn.Conv2d, Conv2d])
def test_the_norm_behind_a_conv(norm, kind, conv):
    model = nn.Sequential(conv(3, 8, 3), norm(), nn.ReLU(), conv(8, 4, 1))
    first, last = find_filter_layers(model, ["*"])
    assert (first.name, first.kind, last.name, last.kind) == ("0", kind, "3", "none")
    assert first.norm is (None if kind == "none" else model[1]) and last.norm is None
    assert first.output_module() is (model[0] if kind == "none" else model[1])


def test_norms_that_the_caller_names():
    model = nn.ModuleDict({"before": nn.BatchNorm2d(4), "conv": nn.Conv2d(3, 4, 1), "behind": nn.BatchNorm2d(4)})
    assert find_filter_layers(model, ["conv"])[0].norm is model["behind"]
    for norm in (model["before"], None):
        assert find_filter_layers(model, ["conv"], norms={"conv": norm})[0].norm is norm


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4)])
def test_norms_without_running_statistics(norm):
    assert find_filter_layers(nn.Sequential(nn.Conv2d(3, 4, 1), norm), ["*"])[0].running_statistics() == {}


def test_a_lazy_module_needs_a_pass_first():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d())
    message = refused(find_filter_layers, net, ["*"])
    assert "1 (LazyBatchNorm2d) has no weight before its first forward pass: run one" in message
    net(torch.randn(2, 3, 8, 8))
    assert find_filter_layers(net, ["*"])[0].kind == "batch"


@pytest.mark.parametrize("how", [name for name in ("fully_shard", "FullyShardedDataParallel") if hasattr(fsdp, name)])
def test_sharded_models_are_refused_by_name(how, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        if how == "fully_shard":
            fsdp.fully_shard(net)
        else:
            net = fsdp.FullyShardedDataParallel(net, device_id=torch.device("cpu"))
        assert "are sharded over processes (FSDP)" in refused(find_filter_layers, net, ["*"])
    finally:
        dist.destroy_process_group()


def test_a_module_under_two_names_is_one_layer_and_groups_are_of_one():
    conv = nn.Conv2d(4, 8, 3, groups=4)
    (layer,) = find_filter_layers(nn.ModuleDict({"a": conv, "b": conv}), ["*"])
    assert (layer.name, layer.num_filters, layer.weight.shape) == ("a", 8, (8, 1, 3, 3))


def test_no_match_names_what_is_there():
    model = nn.ModuleDict({f"conv{i}": nn.Conv2d(3, 4, 1) for i in range(20)})
    message = refused(find_filter_layers, model, ["backbone.*"])
    assert message.startswith("layers= ['backbone.*'] matches no trainable Conv2d")
    assert "conv0, conv1" in message and "and 8 more" in message
    message = refused(find_filter_layers, model, ["conv*"], ["conv*"])
    assert "layers= ['conv*'] less exclude= ['conv*'] matches no" in message
    assert "the closest trainable ones: none" in refused(find_filter_layers, nn.Linear(3, 3), ["*"])
    assert "matches no trainable Conv2d" in refused(find_filter_layers, model, [])
    model["conv0"].requires_grad_(False)
    message = refused(find_filter_layers, model, ["conv0"])
    assert "(1 that match are frozen); the closest trainable ones: conv1" in message


def test_patterns_beside_one_that_matches_and_such_as_are_no_list_of_strings(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1).requires_grad_(False), nn.ReLU())
    assert [layer.name for layer in find_filter_layers(model, [*DETECTRON2_LAYERS, "0", "[0-9]"], ["1"])] == ["0"]
    assert not caplog.records
    find_filter_layers(model, ["nothing", "0"], ["2"])
    for pattern, record in zip(("nothing", "2"), caplog.records, strict=True):
        assert record.getMessage() == f"RePr: pattern '{pattern}' matches no conv, such as ['0', '1']"
    for key, patterns in (("layers", "*"), ("layers", [1]), ("exclude", "*"), ("exclude", [None])):
        with pytest.raises(UserError, match=f"^{key}= must be a list of patterns"):
            find_filter_layers(model, **{"include": ["*"], key.replace("layers", "include"): patterns})


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("norm", "bias"), [("BN", False), ("naiveSyncBN", True), ("FrozenBN", False), ("GN", True), ("", True), ("", False)]
)
def test_a_filter_whose_tensors_are_zero_gives_exactly_zero(norm, bias, train):
    torch.manual_seed(0)
    model = nn.Sequential(Conv2d(3, FILTERS, 3, bias=bias, norm=get_norm(norm, FILTERS))).train(train)
    (layer,) = find_filter_layers(model, ["0"])
    with torch.no_grad():
        for tensor in [*layer.tensors().values(), *layer.running_statistics().values()]:
            tensor.uniform_(0.5, 2)
    assert layer.norm is layer.conv.norm and layer.output_module() is layer.conv
    expected = {"weight", *(["bias"] if bias else []), *(["norm.weight", "norm.bias"] if norm else [])}
    assert set(layer.tensors()) == expected
    rows = torch.tensor([0, 7, 31])
    with torch.no_grad():
        layer.weight[7], layer.weight[31] = float("nan"), float("inf")
    before = {name: tensor.detach().clone().index_fill(0, rows, 0) for name, tensor in layer.tensors().items()}
    zero_rows_(layer.tensors().values(), rows)
    output = model(torch.randn(2, 3, 6, 6))
    assert output.abs().amax((0, 2, 3)).count_nonzero() == FILTERS - 3 and not output[:, rows].any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.tensors().items())
