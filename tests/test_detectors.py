"""The same hook in Faster R-CNN C4 and FPN, RetinaNet and Mask R-CNN, by configs of Detectron2's model zoo: drops and
restores happen, a dropped channel puts out nothing while the sub-network trains, and losses stay finite."""

import json
import math

import pytest
import torch
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from repr_det import RePrHook, Trainer, find_filter_layers
from repr_det.datasets import register_coco_format
from repr_det.studies.comparison.records import read_events

# Sub-network at iterations 1 and 2.
SMALL_R50 = """
REPR.ENABLED True REPR.S1_ITERS 1 REPR.S2_ITERS 2 REPR.NUM_CYCLES 1 SOLVER.MAX_ITER 5 REPR.CRITERION_BATCHES 2
MODEL.RESNETS.STEM_OUT_CHANNELS 16 MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.RESNETS.WIDTH_PER_GROUP 8
MODEL.RESNETS.DEPTH 50 SOLVER.IMS_PER_BATCH 1 DATASETS.TEST () SOLVER.BASE_LR 0.001
""".split()
RESNET = '"backbone.bottom_up.res*.conv*"'
FPN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
# Config of the zoo, keys, the norms of some layers, and how many convs take part: of res2 to res4 3 + 4 + 6 blocks.
DETECTORS = {
    "C4": (
        "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
        "MODEL.ANCHOR_GENERATOR.SIZES [[8,16,32,64]] MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 6 REPR.CRITERION apoz",
        {"backbone.res4.0.conv1": "batch", "roi_heads.res5.2.conv3": "batch"},
        13 * 3 + 3 * 3,
    ),
    "FPN with its own convs": (
        FPN,
        f'REPR.LAYERS.INCLUDE [{RESNET},"backbone.fpn_*"]',
        {"backbone.fpn_lateral3": "none", "backbone.fpn_output5": "none", "backbone.bottom_up.res5.2.conv1": "batch"},
        16 * 3 + 8,
    ),
    "FPN with GN": (
        FPN,
        'MODEL.FPN.NORM GN MODEL.FPN.OUT_CHANNELS 32 REPR.LAYERS.INCLUDE ["backbone.fpn_*"]',
        {"backbone.fpn_lateral3": "group", "backbone.fpn_output5": "group"},
        8,
    ),
    "RetinaNet with its head": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "MODEL.RETINANET.NUM_CLASSES 2 MODEL.RETINANET.NUM_CONVS 2 REPR.CRITERION apoz MODEL.ANCHOR_GENERATOR.SIZES "
        f'[[8],[16],[32],[48],[64]] REPR.LAYERS.INCLUDE [{RESNET},"head.*_subnet.*"]',
        {"head.cls_subnet.0": "none", "head.bbox_subnet.2": "none", "backbone.bottom_up.res3.0.conv3": "batch"},
        16 * 3 + 2 * 2,
    ),
    "Mask R-CNN with its head": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        "MODEL.ROI_MASK_HEAD.NUM_CONV 2 MODEL.ROI_MASK_HEAD.CONV_DIM 16 DATASETS.TRAIN ('tiny_masks',) "
        f'REPR.CRITERION random REPR.LAYERS.INCLUDE [{RESNET},"roi_heads.mask_head.mask_fcn*"]',
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


def _rows(tensor):
    return tensor.detach().reshape(len(tensor), -1)


class Watch(HookBase):
    """Records, per iteration, the loss and the channels whose parameters and whose output are zero."""

    def __init__(self, layers):
        self.layers, self.losses, self.zero_rows, self.zero_outputs = layers, [], [], []
        self.outputs: dict[str, torch.Tensor] = {}
        for layer in layers:
            layer.output_module().register_forward_hook(lambda _, __, out, name=layer.name: self._see(name, out))

    def _see(self, name, out):
        largest = out.detach().abs().amax((0, 2, 3)) if len(out) else out.new_zeros(out.shape[1])
        self.outputs[name] = torch.maximum(self.outputs.get(name, largest), largest)

    def before_step(self):
        self.outputs = {}
        parts = {x.name: torch.cat([_rows(t) for t in x.tensors().values()], 1) for x in self.layers}
        self.zero_rows.append({name: ~part.any(1) for name, part in parts.items()})

    def after_step(self):
        self.zero_outputs.append({name: value == 0 for name, value in self.outputs.items()})
        self.losses.append(self.trainer.storage.latest()["total_loss"][0])


@pytest.mark.parametrize("detector", DETECTORS)
def test_drops_and_restores(tiny_cfg, tmp_path, tiny_masks, detector):
    config, opts, expected, number = DETECTORS[detector]
    backbone = ["MODEL.BACKBONE.NAME", model_zoo.get_config(config).MODEL.BACKBONE.NAME]
    cfg = tiny_cfg(*backbone, *SMALL_R50, *opts.split(), config=model_zoo.get_config_file(config))
    seed_all_rng(3)
    trainer = Trainer(cfg)
    watch = Watch(find_filter_layers(trainer.model, cfg.REPR.LAYERS.INCLUDE))
    trainer._hooks.insert(0, watch)  # before RePrHook, whose own passes would be seen too
    watch.trainer = trainer
    trainer.train()
    layers = next(hook for hook in trainer._hooks if isinstance(hook, RePrHook)).scheme.layers
    kinds = {layer.name: layer.kind for layer in layers}
    assert len(layers) == number and list(kinds) == [layer.name for layer in watch.layers]
    assert {name: kinds[name] for name in expected} == expected

    drop, restore = read_events(tmp_path / "run")
    assert [(e["event"], e["iteration"]) for e in (drop, restore)] == [("drop", 0), ("restore", 2)]
    dropped = drop["dropped"]
    assert restore["dropped"] == dropped
    assert sum(map(len, dropped.values())) == math.floor(0.3 * sum(x.num_filters for x in layers))
    assert len(watch.losses) == 5 and all(map(math.isfinite, watch.losses))
    for iteration, (rows, zero) in enumerate(zip(watch.zero_rows, watch.zero_outputs, strict=True)):
        for layer in layers:
            gone = dropped.get(layer.name, []) if iteration in (1, 2) else []
            assert rows[layer.name].nonzero().flatten().tolist() == gone, (iteration, layer.name)
            assert zero[layer.name][gone].all(), (iteration, layer.name)
    for layer in layers:
        assert torch.isfinite(layer.weight).all() and layer.weight.flatten(1).any(1).all()
