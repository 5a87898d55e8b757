"""A backbone for tests: a ResNet of one block a stage and a few channels with FPN, registered under its name."""

from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

WIDTHS = (8, 12, 16, 24)  # of res2 to res5, none twice: a block that strides needs its shortcut


@BACKBONE_REGISTRY.register()
def build_tiny_fpn_backbone(cfg, input_shape):
    norm, stages, width = cfg.MODEL.RESNETS.NORM, [], WIDTHS[0]
    for number, out in enumerate(WIDTHS):
        stride = 1 if number == 0 else 2
        blocks = ResNet.make_stage(BasicBlock, 1, in_channels=width, out_channels=out, stride=stride, norm=norm)
        stages.append(blocks)
        width = out
    features = [f"res{number}" for number in (2, 3, 4, 5)]
    bottom_up = ResNet(BasicStem(input_shape.channels, WIDTHS[0], norm), stages, out_features=features)
    bottom_up.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    return FPN(bottom_up, features, cfg.MODEL.FPN.OUT_CHANNELS, top_block=LastLevelMaxPool())
