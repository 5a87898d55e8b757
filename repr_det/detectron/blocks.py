"""Makes Detectron2's residual blocks, convs and norms known to the method; importing this module does it."""

from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

from repr_det.method.blocks import CONV_FORWARDS, NORM_FORWARDS, register_block

register_block(BasicBlock, ("conv1", "conv2"))
register_block(BottleneckBlock, ("conv1", "conv2", "conv3"))
CONV_FORWARDS.append(Conv2d.forward)
NORM_FORWARDS += [FrozenBatchNorm2d.forward, NaiveSyncBatchNorm.forward]
