"""docs/zoo.md: what RePr applies to in the models of Detectron2's zoo, one cycle in small versions; other libraries.

The models of the zoo are built on the meta device. The small ones have the same modules with fewer channels, blocks and
proposals, random weights and BN, and see two synthetic images.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
import torchvision
from conftest import ROOT, refused
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling import MViT, SwinTransformer, ViT, build_model
from detectron2.modeling.backbone import FPN, SimpleFeaturePyramid
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from traced_nets import Net

from repr_det import RePr, RePrSchedule, find_filter_layers
from repr_det.method.options import DETECTRON2_LAYERS
from repr_det.network.tracing import HookOfOne

TABLE = (ROOT / "docs" / "zoo.md").read_text()
SMALL = """
MODEL.RESNETS.NORM BN MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16
MODEL.FPN.OUT_CHANNELS 8 MODEL.RPN.PRE_NMS_TOPK_TRAIN 40 MODEL.RPN.POST_NMS_TOPK_TRAIN 20
MODEL.RPN.CONV_DIMS [-1] MODEL.RPN.BATCH_SIZE_PER_IMAGE 16 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8
MODEL.ROI_BOX_HEAD.FC_DIM 16 MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 3 MODEL.ROI_MASK_HEAD.NUM_CONV 1
MODEL.ROI_MASK_HEAD.CONV_DIM 8 MODEL.RETINANET.NUM_CONVS 1 MODEL.SEM_SEG_HEAD.CONVS_DIM 32
MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.WIDTH_PER_GROUP 4 MODEL.DEVICE cpu MODEL.WEIGHTS ''
""".split()

ZOO = [
    "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_regnetx_4gf_dds_fpn_1x.py",
    "COCO-InstanceSegmentation/mask_rcnn_regnety_4gf_dds_fpn_1x.py",
]


def on_meta(config: str) -> nn.Module:
    with torch.device("meta"):
        cfg = model_zoo.get_config(config)
        if config.endswith(".py"):
            return instantiate(cfg.model)
        cfg.MODEL.DEVICE = "meta"
        return build_model(cfg)


def small(config: str, keys: str) -> nn.Module:
    torch.manual_seed(0)
    cfg = model_zoo.get_config(config)
    cfg.merge_from_list([*SMALL, *keys.split()])
    return build_model(cfg).train()


def images() -> list[dict]:
    draw = torch.Generator().manual_seed(1)
    instances = Instances((64, 64), gt_classes=torch.tensor([0, 0]))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 24.0, 60.0, 60.0]]))
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 4:44, 4:40] = masks[1, 24:60, 20:60] = True
    instances.gt_masks = BitMasks(masks)
    truth = dict(height=64, width=64, instances=instances, sem_seg=torch.zeros(64, 64).long())
    return [dict(truth, image=torch.randint(256, (3, 64, 64), generator=draw).float()) for _ in range(2)]


@pytest.mark.parametrize("config", ZOO)
def test_what_takes_part(config):
    (row,) = [line for line in TABLE.splitlines() if line.startswith("|") and config in line]
    _, takes_part, _, include = [cell.strip() for cell in row.strip("|").split("|")]
    layers = find_filter_layers(on_meta(config), DETECTRON2_LAYERS if include == "default" else [include.strip("`")])
    grouped = sum(layer.conv.groups > 1 for layer in layers)
    of_groups = f" ({grouped} grouped)" if grouped else ""
    assert takes_part == f"{len(layers)} convs{of_groups}, {sum(x.num_filters for x in layers):,} filters"
    assert {layer.kind for layer in layers} == {"frozen"}


# Keys, layers besides those of the row, and what norms these have.
CYCLES = {
    ZOO[0]: ("MODEL.RESNETS.NUM_GROUPS 4 MODEL.RESNETS.WIDTH_PER_GROUP 2", ["backbone.fpn_*"], "none"),
    ZOO[2]: ("MODEL.ROI_MASK_HEAD.NUM_CONV 2", ["roi_heads.mask_head.mask_fcn*"], "none"),
    ZOO[3]: ("MODEL.RETINANET.NUM_CONVS 2", ["head.*_subnet.*"], "none"),
    ZOO[4]: ("", [], "batch"),
    "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml": ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 6", [], "batch"),
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml": (
        "MODEL.FPN.NORM GN MODEL.FPN.OUT_CHANNELS 32", ["backbone.fpn_*"], "group"
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", CYCLES)
def test_one_cycle(config):
    """All layers take part; a dropped filter puts out 0, and has weights again in the end; losses stay finite."""
    keys, more, kind = CYCLES[config]
    include = [*DETECTRON2_LAYERS, *more]
    model, batch = small(config, keys), images()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    named = find_filter_layers(model, include)
    assert {layer.kind for layer in named} == {"batch", kind}
    outputs = defaultdict(list)
    for layer in named:

        def see(_module, _inputs, output, name=layer.name):
            outputs[name].append(output.detach().clone())  # a block adds its shortcut in place

        layer.output_module().register_forward_hook(HookOfOne(see))
    repr_training = RePr(model, optimizer, 4, layers=include, schedule=RePrSchedule(1, 2, 1))
    for step in range(4):
        outputs.clear()
        with EventStorage(0):
            losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        assert all(math.isfinite(loss) for loss in losses.values())
        if step in (1, 2):
            for layer, mask in repr_training.scheme.masks.items():
                assert not any(output[:, mask].any() for output in outputs[layer]), layer
        repr_training.step()
        layers = repr_training.scheme.layers
        assert [(x.name, x.norm) for x in layers] == [(x.name, x.norm) for x in named]
        out = sum(int((layer.weight.flatten(1) == 0).all(1).sum()) for layer in layers)
        assert out == (math.floor(0.3 * sum(x.num_filters for x in layers)) if step in (0, 1) else 0)


DETECTION = {"batch_idx": torch.tensor([0.0, 1.0]), "cls": torch.zeros(2, 1), "bboxes": torch.full((2, 4), 0.5)}
LABELS = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.3]])}] * 2


def of_torchvision(name: str, **options) -> tuple[nn.Module, Callable]:
    build = getattr(torchvision.models.detection, name)
    model = build(weights=None, weights_backbone=None, num_classes=4, **options)
    boxes = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 44.0]]), "labels": torch.tensor([1])}
    return model, lambda: model(list(torch.rand(2, 3, 64, 64)), [boxes, boxes])


def of_timm(name: str, size: int = 64, **options) -> tuple[nn.Module, Callable]:
    model = pytest.importorskip("timm", reason="timm is not installed").create_model(name, **options)
    return model, lambda: model(torch.rand(2, 3, size, size))


def of_transformers(name: str, **options) -> tuple[nn.Module, Callable]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    return model, lambda: model(pixel_values=torch.rand(2, 3, 64, 64), labels=LABELS).loss


def of_ultralytics(name: str) -> tuple[nn.Module, Callable]:
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel

    model = (RTDETRDetectionModel if "rtdetr" in name else DetectionModel)(f"{name}.yaml", verbose=False)
    model.args, model.nc = get_cfg(), 80
    return model, lambda: model({"img": torch.rand(2, 3, 64, 64), **DETECTION})


RESNET = "backbone.body.layer*.conv*"
FEW = dict(num_queries=20)
DETR = dict(use_pretrained_backbone=False)
OTHERS = {
    ("torchvision `fasterrcnn_resnet50_fpn`", RESNET): (of_torchvision, dict(min_size=64)),
    ("torchvision `retinanet_resnet50_fpn`", RESNET): (of_torchvision, dict(min_size=64)),
    ("torchvision `ssdlite320_mobilenet_v3_large`", "backbone.features.*"): (of_torchvision, {}),
    ("timm `resnet18`", "*"): (of_timm, {}),
    ("timm `efficientnet_b0`", "*"): (of_timm, {}),
    ("timm `convnext_atto`", "*"): (of_timm, {}),
    ("transformers `RTDetr`", "*backbone*"): (of_transformers, FEW),
    ("transformers `DFine`", "*backbone*"): (of_transformers, FEW),
    ("transformers `Detr`", "*"): (of_transformers, DETR),
    ("transformers `DeformableDetr`", "*backbone*"): (of_transformers, DETR),
    ("Ultralytics `yolov8n`", "*"): (of_ultralytics, {}),
    ("Ultralytics `yolo11n`", "*"): (of_ultralytics, {}),
    ("Ultralytics `rtdetr-l`", "*"): (of_ultralytics, {}),
}


@pytest.mark.parametrize(("name", "layers"), OTHERS)
def test_what_takes_part_in_models_of_other_libraries(name, layers, caplog):
    caplog.set_level("INFO", "repr_det")
    build, options = OTHERS[name, layers]
    model, run = build(name.split("`")[1], **options)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    repr_training = RePr(model, optimizer, 50, layers=[layers], frozen_norm="keep")
    repr_training.prove(run)
    scheme = repr_training.scheme
    filters = sum(layer.num_filters for layer in scheme.layers)
    takes_part = f"{len(scheme.layers)} of {len(scheme.participants.candidates)} convs, {filters:,} filters"
    pattern = r"all filters stay of ([^(]+) \(.*(?:comes (\w+)|(predicts)).*\)$"
    out = re.findall(pattern, "\n".join(caplog.messages), re.M)
    reasons = "; ".join(f"{len(names.split(', '))}: {operation or predicts}" for names, operation, predicts in out)
    assert f"| {name} | `{layers}` | {takes_part} | {reasons} |".replace("|  |", "| |") in TABLE.splitlines()


def frozen_detr() -> tuple[nn.Module, Callable]:
    model, run = of_transformers("Detr", use_pretrained_backbone=False)
    model.model.freeze_backbone()
    return model, run


def of_detectron2(backbone: nn.Module) -> tuple[nn.Module, Callable]:
    model = Net(lambda net, x: list(net.backbone(x).values()), backbone=backbone)
    return model, lambda: model(torch.randn(2, 3, 64, 64))


VIT = dict(img_size=64, embed_dim=16, depth=1, num_heads=2, out_feature="last_feat")
SWIN = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1])
MVIT = dict(embed_dim=16, depth=4, num_heads=1, last_block_indexes=(0, 1, 2, 3), out_features=("scale2",))
NEXT_TO_NOTHING = {
    "ViTDet": (
        lambda: of_detectron2(SimpleFeaturePyramid(ViT(**VIT), "last_feat", 16, (2.0, 1.0), square_pad=64)),
        "Attention",
    ),
    "Swin": (lambda: of_detectron2(FPN(SwinTransformer(**SWIN), ["p1", "p2"], 16)), "WindowAttention"),
    "MViT": (lambda: of_detectron2(MViT(**MVIT)), "MultiScaleAttention"),
    "DETR with a frozen backbone": (frozen_detr, "DetrSelfAttention"),
    "RF-DETR": (lambda: of_transformers("RfDetr", num_queries=4), "RfDetrDinov2"),
    "timm's ViTs": (lambda: of_timm("vit_tiny_patch16_224", size=224, depth=1), "Attention"),
}


@pytest.mark.parametrize("name", NEXT_TO_NOTHING)
def test_transformers_are_refused_with_a_reason(name):
    build, attention = NEXT_TO_NOTHING[name]
    model, run = build()
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)

    for layers in (DETECTRON2_LAYERS, ["*"])[: 1 if name == "Swin" else 2]:
        message = refused(lambda layers=layers: RePr(model, optimizer, 50, layers=layers).prove(run))
        assert f"This model has attention ({attention}" in message
    if name != "Swin":
        return
    one = RePr(model, optimizer, 50, layers=["*"])
    one.prove(run)
    assert {layer.name.rstrip("0123456789") for layer in one.scheme.layers} == {"backbone.fpn_lateral"}
