"""Trainer: Detectron2's DefaultTrainer with RePr, COCO evaluation, and several processes on the CPU too."""

import logging
import os
import weakref

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from repr_det.config import scale_to_world
from repr_det.errors import UserError
from repr_det.hook import RePrHook

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """DefaultTrainer for configs with or without the node REPR.

    With REPR.ENABLED False (or no such node) it trains bit for bit as stock Detectron2 does. Several processes work on
    the CPU as well (gloo), and SOLVER.REFERENCE_WORLD_SIZE scales the schedule of REPR along with that of SOLVER.

    Args:
        cfg: a Detectron2 config, with ``add_repr_config`` applied for RePr.

    Raises:
        UserError: REPR is wrong.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # Not DefaultTrainer.__init__: it wraps the model by create_ddp_model, which CPU modules cannot take.
        TrainerBase.__init__(self)
        cfg = scale_to_world(cfg, comm.get_world_size())
        self.cfg = cfg
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = _distributed(model)
        inner = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = inner(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks and RePrHook, which moves itself to its place when training starts."""
        hooks = super().build_hooks()
        if "REPR" in self.cfg and self.cfg.REPR.ENABLED:
            hooks.append(RePrHook(self.cfg))
        return hooks

    def load_state_dict(self, state_dict: dict) -> None:
        saved = "RePrHook" in state_dict.get("hooks", {})
        enabled = any(isinstance(hook, RePrHook) for hook in self._hooks)
        if saved != enabled:
            raise UserError(
                f"the checkpoint in {self.cfg.OUTPUT_DIR} was trained with RePr {'on' if saved else 'off'}, this run "
                f"has it {'on' if enabled else 'off'}: resume with the same arm, or give another OUTPUT_DIR"
            )
        super().load_state_dict(state_dict)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO box AP (and mask AP for models with masks), written to OUTPUT_DIR/inference."""
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))


def _distributed(model: nn.Module) -> nn.Module:
    if comm.get_world_size() > 1 and next(model.parameters()).device.type == "cpu":
        return DistributedDataParallel(model, broadcast_buffers=False)
    return create_ddp_model(model, broadcast_buffers=False)
