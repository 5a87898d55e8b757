"""The same hook in Faster R-CNN C4 and FPN, RetinaNet and Mask R-CNN, by configs of Detectron2's model zoo: drops and
restores happen, a dropped channel puts out nothing while the sub-network trains, and losses stay finite."""

import json
import math

import pytest
import torch
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from repr_det import RePrHook, Trainer, find_filter_layers
from repr_det.datasets import register_coco_format
from repr_det.studies.comparison.records import read_events

# Sub-network at iterations 1 and 2.
SCHEDULE = "REPR.ENABLED True REPR.S1_ITERS 1 REPR.S2_ITERS 2 REPR.NUM_CYCLES 1 SOLVER.MAX_ITER 5".split()
SMALL_R50 = "MODEL.RESNETS.STEM_OUT_CHANNELS 16 MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.RESNETS.WIDTH_PER_GROUP 8 "
SMALL_R50 = (SMALL_R50 + "SOLVER.IMS_PER_BATCH 1 DATASETS.TEST () SOLVER.BASE_LR 0.001").split()
RESNET = ["backbone.bottom_up.res*.conv*"]
DETECTORS = {
    "C4": (
        "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
        [
            *"MODEL.ANCHOR_GENERATOR.SIZES [[8,16,32,64]] MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 6".split(),
            *["REPR.CRITERION", "apoz"],
        ],
        {"backbone.res4.0.conv1": "batch", "roi_heads.res5.2.conv3": "batch"},
        13 * 3 + 3 * 3,  # res2 to res4 have 3 + 4 + 6 blocks, the head has 3
    ),
    "FPN with its own convs": (
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        ["REPR.LAYERS.INCLUDE", str([*RESNET, "backbone.fpn_*"])],
        {"backbone.fpn_lateral3": "none", "backbone.fpn_output5": "none", "backbone.bottom_up.res5.2.conv1": "batch"},
        16 * 3 + 8,
    ),
    "FPN with GN": (
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        ["MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "32", "REPR.LAYERS.INCLUDE", "['backbone.fpn_*']"],
        {"backbone.fpn_lateral3": "group", "backbone.fpn_output5": "group"},
        8,
    ),
    "RetinaNet with its head": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        [
            *"MODEL.RETINANET.NUM_CLASSES 2 MODEL.RETINANET.NUM_CONVS 2 REPR.CRITERION apoz".split(),
            *["MODEL.ANCHOR_GENERATOR.SIZES", "[[8],[16],[32],[48],[64]]"],
            *["REPR.LAYERS.INCLUDE", str([*RESNET, "head.*_subnet.*"])],
        ],
        {"head.cls_subnet.0": "none", "head.bbox_subnet.2": "none", "backbone.bottom_up.res3.0.conv3": "batch"},
        16 * 3 + 2 * 2,
    ),
    "Mask R-CNN with its head": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        [
            *"MODEL.ROI_MASK_HEAD.NUM_CONV 2 MODEL.ROI_MASK_HEAD.CONV_DIM 16 DATASETS.TRAIN ('tiny_masks',)".split(),
            *["REPR.LAYERS.INCLUDE", str([*RESNET, "roi_heads.mask_head.mask_fcn*"]), "REPR.CRITERION", "redundant"],
        ],
        {"roi_heads.mask_head.mask_fcn1": "none", "backbone.bottom_up.res2.0.conv2": "batch"},
        16 * 3 + 2,
    ),
}


@pytest.fixture(scope="session")
def tiny_masks(tiny_data):
    """The tiny data set with a polygon (the box without its corners) for every box, as tiny_masks."""
    if "tiny_masks" not in DatasetCatalog.list():
        content = json.loads((tiny_data / "tiny.json").read_text())
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [
                [x + w / 4, y, x + 3 * w / 4, y, x + w, y + h / 2, x + 3 * w / 4, y + h, x + w / 4, y + h, x, y + h / 2]
            ]
        (tiny_data / "masks.json").write_text(json.dumps(content))
        register_coco_format("tiny_masks", str(tiny_data / "masks.json"), str(tiny_data / "images"))
    return "tiny_masks"


class Watch(HookBase):
    """Records, per iteration, the loss and the channels whose parameters and whose output are zero."""

    def __init__(self, names):
        self.names = names
        self.outputs: dict[str, torch.Tensor] = {}
        self.losses, self.zero_rows, self.zero_outputs = [], [], []

    def before_train(self):
        model = self.trainer.model
        self.layers = find_filter_layers(model, self.names)
        assert [x.name for x in self.layers] == self.names
        for layer in self.layers:
            layer.output_module().register_forward_hook(lambda _, __, out, name=layer.name: self._see(name, out))

    def _see(self, name, out):
        largest = out.detach().abs().amax((0, 2, 3)) if len(out) else out.new_zeros(out.shape[1])
        before = self.outputs.get(name, torch.zeros_like(largest))
        self.outputs[name] = torch.maximum(before, largest)

    def before_step(self):
        self.outputs = {}
        self.rows = {
            x.name: torch.stack([(t.reshape(len(t), -1) == 0).all(1) for t in x.tensors().values()]).all(0)
            for x in self.layers
        }

    def after_step(self):
        self.zero_rows.append(self.rows)
        self.zero_outputs.append({name: value == 0 for name, value in self.outputs.items()})
        self.losses.append(self.trainer.storage.latest()["total_loss"][0])


def trainer_of(kind, cfg):
    if kind is not SimpleTrainer:
        return kind(cfg)
    model = build_model(cfg).train()
    loader, optimizer = DefaultTrainer.build_train_loader(cfg), DefaultTrainer.build_optimizer(cfg, model)
    trainer = SimpleTrainer(model, loader, optimizer)
    trainer.register_hooks([RePrHook(cfg)])
    trainer.max_iter = cfg.SOLVER.MAX_ITER
    return trainer


@pytest.mark.parametrize(
    ("detector", "kind"), [*((name, Trainer) for name in DETECTORS), ("RetinaNet with its head", SimpleTrainer)]
)
def test_drops_and_restores(tiny_cfg, tmp_path, tiny_masks, detector, kind):
    config, opts, expected, number = DETECTORS[detector]
    zoo = model_zoo.get_config(config)
    cfg = tiny_cfg(
        *["MODEL.BACKBONE.NAME", zoo.MODEL.BACKBONE.NAME, "MODEL.RESNETS.DEPTH", 50, *SMALL_R50, *SCHEDULE, *opts],
        *["REPR.CRITERION_BATCHES", 2],
        config=model_zoo.get_config_file(config),
    )
    seed_all_rng(3)
    trainer = trainer_of(kind, cfg)
    candidates = find_filter_layers(trainer.model, cfg.REPR.LAYERS.INCLUDE)
    watch = Watch([x.name for x in candidates])
    trainer._hooks.insert(0, watch)  # before RePrHook, whose own passes would be seen too
    watch.trainer = trainer
    trainer.train(0, cfg.SOLVER.MAX_ITER) if kind is SimpleTrainer else trainer.train()
    layers = next(hook for hook in trainer._hooks if isinstance(hook, RePrHook)).scheme.layers
    kinds = {layer.name: layer.kind for layer in layers}
    assert len(layers) == number and list(kinds) == watch.names
    assert {name: kinds[name] for name in expected} == expected

    events = read_events(tmp_path / "run")
    assert [(e["event"], e["iteration"]) for e in events] == [("drop", 0), ("restore", 2)]
    dropped = events[0]["dropped"]
    assert events[1]["dropped"] == dropped
    assert sum(map(len, dropped.values())) == math.floor(0.3 * sum(x.num_filters for x in layers))
    assert len(watch.losses) == 5 and all(map(math.isfinite, watch.losses))
    for iteration, (rows, zero) in enumerate(zip(watch.zero_rows, watch.zero_outputs, strict=True)):
        for layer in layers:
            gone = dropped.get(layer.name, []) if iteration in (1, 2) else []
            assert rows[layer.name].nonzero().flatten().tolist() == gone, (iteration, layer.name)
            assert zero[layer.name][gone].all(), (iteration, layer.name)
    for layer in layers:
        assert torch.isfinite(layer.weight).all() and layer.weight.flatten(1).any(1).all()
