"""Detectron2's DefaultTrainer with RePr."""

import logging
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from inspect import getattr_static
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, create_ddp_model, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from repr_det.datasets.image_files import NamingMapper
from repr_det.datasets.registered import agree_on_classes, any_mapped
from repr_det.detectron.config import defined_at_its_end, scale_to_world
from repr_det.detectron.evaluators import build_evaluator, check_evaluators
from repr_det.detectron.hook import RePrHook, first_later_hook, saved_state
from repr_det.detectron.trackers import WandbWriter
from repr_det.method.errors import UserError
from repr_det.network.state import unwrapped
from repr_det.runs.checkpoints import AtomicCheckpointer, is_saved, last_iteration
from repr_det.runs.files import FINAL_CHECKPOINT, refuse_used, remove_unfinished
from repr_det.runs.guard import FiniteGuard, NonFiniteError, describe, non_finite_gradient, non_finite_weight
from repr_det.runs.loader import resumable
from repr_det.runs.resume import ExactResume, apply_settings, check_same_optimizer, settings_of
from repr_det.runs.stopping import StopAtSignal, close_writers

logger = logging.getLogger("repr_det.resume")


class Trainer(DefaultTrainer):
    """DefaultTrainer for configs with or without the node REPR.

    With RePr off it trains bit for bit as stock Detectron2. Several processes work on the CPU too (gloo), and
    SOLVER.REFERENCE_WORLD_SIZE also scales REPR. A killed run resumes exactly; numbers that are not finite stop a run
    before it saves them. OUTPUT_DIR must hold no other run.

    Args:
        cfg: a Detectron2 config, with ``add_repr_config`` applied for RePr.
        wandb_project: of Weights & Biases; "" for none.

    Raises:
        UserError: REPR is wrong.
        NonFiniteError: while training.
    """

    _resumes = False

    def __init__(self, cfg: CfgNode, wandb_project: str = "") -> None:
        # Not DefaultTrainer.__init__, which gives DistributedDataParallel a GPU.
        TrainerBase.__init__(self)
        cfg = scale_to_world(cfg, comm.get_world_size())
        self.cfg = cfg
        self.wandb_project = wandb_project
        if all(getattr_static(self, name) is getattr_static(Trainer, name) for name in ("test", "build_evaluator")):
            check_evaluators(cfg.DATASETS.TEST)
        if any_mapped(names := (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)):
            agree_on_classes(*names)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = resumable(self.build_train_loader(cfg))
        on_cpu = next(model.parameters()).device.type == "cpu"
        device_ids = None if on_cpu else [comm.get_local_rank()]
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        inner = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = inner(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self._settings = settings_of(optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        classes = [MetadataCatalog.get(name).get("thing_classes", []) for name in cfg.DATASETS.TRAIN]
        self.checkpointer.thing_classes = max(classes, key=len, default=[])
        if comm.is_main_process():
            remove_unfinished(cfg.OUTPUT_DIR)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, FiniteGuard, ExactResume, StopAtSignal and RePrHook."""
        cfg, built = self.cfg, [hook for hook in super().build_hooks() if hook is not None]
        repr_hook = self.build_repr_hook(cfg)
        loaders = [self._trainer.data_loader]
        for hook in built:
            if isinstance(hook, hooks.PreciseBN) and not hook._disabled:
                hook._data_loader = resumable(hook._data_loader)
                loaders.append(hook._data_loader)
        model = unwrapped(self.model)
        exact = ExactResume(model, loaders)
        built.insert(_place_before(built, hooks.PeriodicCheckpointer, hooks.EvalHook), exact)
        on_cpu = next(model.parameters()).device.type == "cpu"  # elsewhere the host would wait
        guard = FiniteGuard(on_cpu and not cfg.SOLVER.AMP.ENABLED, repr_hook)
        stop = StopAtSignal(lambda: (guard.check_weights(), exact.collect()))
        built.insert(_place_before(built, hooks.EvalHook), stop)
        built.insert(0, guard)
        if cfg.TEST.AUG.ENABLED:
            again = hooks.EvalHook(0, lambda: self.test_with_TTA(cfg, model))
            built.insert(_place_before(built, hooks.PeriodicWriter), again)
        if repr_hook is not None:  # already here: its checks come before the others write
            built.insert(first_later_hook(built), repr_hook)
        return built

    def build_writers(self) -> list[EventWriter]:
        """Adds that of Weights & Biases to Detectron2's."""
        more = [WandbWriter(self.cfg, project=self.wandb_project)] if self.wandb_project else []
        return [*super().build_writers(), *more]

    def build_repr_hook(self, cfg: CfgNode) -> RePrHook | None:
        """Builds the hook of RePr; None if it is off."""
        return RePrHook(cfg) if "REPR" in cfg and cfg.REPR.ENABLED else None

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads as Detectron2 does. Refuses a run trained beyond SOLVER.MAX_ITER, or whose ranks see other files."""
        self._resumes = resume
        if resume:
            found = comm.all_gather(os.path.basename(self.checkpointer.get_checkpoint_file()))
            if len(set(found)) > 1:
                others = ", ".join(sorted({name or "none" for name in found[1:]}))
                raise UserError(
                    f"OUTPUT_DIR {self.cfg.OUTPUT_DIR} is not one folder that every machine sees: the checkpoint is "
                    f"{found[0]} for rank 0 and {others} for others; copy rank 0's folder to every machine"
                )
        super().resume_or_load(resume)
        if self.start_iter > self.max_iter:
            raise UserError(
                f"SOLVER.MAX_ITER is {self.max_iter}, but the checkpoint in {self.cfg.OUTPUT_DIR} was trained for "
                f"{self.start_iter} iterations: give at least that many, or another OUTPUT_DIR"
            )

    def train(self) -> Any:
        """Trains, once. Raises UserError if this trainer has trained before, or OUTPUT_DIR holds another run."""
        if hasattr(self, "storage"):  # which training makes
            raise UserError("this trainer has trained before: make another one and call resume_or_load(resume=True)")
        if not self._resumes:
            refuse_used(self.cfg.OUTPUT_DIR, "resume_or_load(resume=True)")
        return super().train()

    def run_step(self) -> None:
        """One step; reports a loss that is not finite with its phase and the first layer that shows it."""
        try:
            super().run_step()
        except FloatingPointError as error:
            found = non_finite_weight(self.model) or non_finite_gradient(self.model)
            what = "the loss is not finite" + (f", nor is {found}" if found else "")
            raise NonFiniteError(describe(self, what)) from error

    def before_train(self) -> None:
        """Prepares as Detectron2 does, and writes the final checkpoint that a killed run did not."""
        self.iter = last_iteration(self)  # of a finished run that is resumed
        super().before_train()
        finished = self.start_iter == self.max_iter and comm.is_main_process()
        if finished and os.path.basename(self.checkpointer.get_checkpoint_file()) != FINAL_CHECKPOINT:
            self.checkpointer.save(os.path.splitext(FINAL_CHECKPOINT)[0], iteration=self.iter)

    def after_train(self) -> None:
        """Ends as Detectron2 does. A run that failed in its last iteration is not evaluated."""
        if self.iter < self.max_iter:  # the loop did not end
            self._hooks = [x for x in self._hooks if not isinstance(x, hooks.EvalHook | hooks.BestCheckpointer)]
            if self.iter == self.start_iter or is_saved(self):
                close_writers(self)  # a resumed run writes the row of its checkpoint, with the evaluation missing here
        super().after_train()

    def state_dict(self) -> dict[str, Any]:
        """Adds the settings of the optimizer as they were built. The iteration is right behind the last one too."""
        return super().state_dict() | {"iteration": last_iteration(self), "settings": self._settings}

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads as Detectron2 does. Refuses what is no checkpoint of such a trainer, or of the other arm."""
        enabled = any(isinstance(hook, RePrHook) for hook in self._hooks)
        check_same_arm(state_dict, enabled, self.cfg.OUTPUT_DIR)
        optimizer = self._trainer.optimizer
        check_same_optimizer(optimizer, state_dict["_trainer"]["optimizer"], self.cfg.OUTPUT_DIR)
        if isinstance(self._trainer, AMPTrainer):  # a run without AMP has saved no scale
            state_dict["_trainer"].setdefault("grad_scaler", self._trainer.grad_scaler.state_dict())
        super().load_state_dict(state_dict)
        if changed := apply_settings(optimizer, self.scheduler, self._settings, state_dict.get("settings")):
            start = state_dict["iteration"] + 1
            logger.warning("The config's settings hold from iteration %d on: %s", start, ", ".join(changed))

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Evaluates with test-time augmentation (bbox_TTA, ...), into OUTPUT_DIR/inference_TTA."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [build_evaluator(name, folder, cfg) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": values for name, values in results.items()}

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Builds Detectron2's, and fixes WarmupStepWithFixedGammaLR, which fails after the last iteration."""
        return defined_at_its_end(super().build_lr_scheduler(cfg, optimizer))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        """Detectron2's, whose errors name the image file."""
        return build_detection_train_loader(cfg, mapper=NamingMapper(DatasetMapper(cfg, True)))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        """Detectron2's, whose errors name the image file."""
        return build_detection_test_loader(cfg, dataset_name, mapper=NamingMapper(DatasetMapper(cfg, False)))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Chooses by the data set's evaluator_type; files go to OUTPUT_DIR/inference."""
        return build_evaluator(dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"), cfg)


def check_same_arm(state: Mapping[str, Any], enabled: bool, folder: str) -> None:
    """Raises UserError if ``state``, "trainer" of a checkpoint, is not that of a DefaultTrainer of the same arm."""
    if not {"iteration", "_trainer"} <= state.keys():
        raise UserError(
            f"the checkpoint in {folder} holds weights, not a run of this trainer: give it as MODEL.WEIGHTS, with "
            "another OUTPUT_DIR"
        )
    saved = saved_state(state) is not None
    if saved != enabled:
        raise UserError(
            f"the checkpoint in {folder} was trained with RePr {'on' if saved else 'off'}, this run has it "
            f"{'on' if enabled else 'off'}: resume with the same arm, or give another OUTPUT_DIR"
        )


def _place_before(built: Sequence[HookBase], *kinds: type[HookBase]) -> int:
    return next((i for i, hook in enumerate(built) if isinstance(hook, kinds)), len(built))
