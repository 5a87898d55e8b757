"""Faster R-CNN R50-FPN, 1x, with RePr: configs/repr_r50_fpn.yaml as a LazyConfig, for tools/lazyconfig_train_net.py."""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from repr_det import RePrHook

model = get_config("common/models/mask_rcnn_fpn.py").model
for key in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(key)
model.backbone.bottom_up.freeze_at = 2

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.use_instance_mask = False

optimizer = get_config("common/optim.py").SGD
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x

train = get_config("common/train.py").train
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/lazy_repr_r50_fpn"

# Arguments of RePrHook (docs/configs.md); what is not here keeps its default. s1_iters and s2_iters stay 0: derived
# from the first learning-rate step at 60000, S1 10000, S2 5000, 3 cycles.
repr = L(RePrHook)(
    s1_iters=0,
    s2_iters=0,
)
