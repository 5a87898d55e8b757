"""A backbone for tests: a ResNet of one block a stage and a few channels with FPN, registered under its name."""

from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

WIDTHS = (8, 12, 16, 24)  # of res2 to res5, none twice: a block that strides needs its shortcut
FEATURES = ["res2", "res3", "res4", "res5"]


def tiny_resnet(channels=3, norm="BN", **_):
    stages, width = [], WIDTHS[0]
    for number, out in enumerate(WIDTHS):
        stride = 1 if number == 0 else 2
        stages.append(ResNet.make_stage(BasicBlock, 1, in_channels=width, out_channels=out, stride=stride, norm=norm))
        width = out
    return ResNet(BasicStem(channels, WIDTHS[0], norm), stages, out_features=FEATURES)


@BACKBONE_REGISTRY.register()
def build_tiny_fpn_backbone(cfg, input_shape):
    bottom_up = tiny_resnet(input_shape.channels, cfg.MODEL.RESNETS.NORM)
    bottom_up.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    return FPN(bottom_up, FEATURES, cfg.MODEL.FPN.OUT_CHANNELS, top_block=LastLevelMaxPool())
