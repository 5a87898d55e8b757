"""RePrHook: when to drop and restore in a Detectron2 trainer, what to log, and the RePr part of a checkpoint."""

import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MapDataset, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fvcore.common.checkpoint import Checkpointer
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from repr_det.detectron.config import calibration_batches, scale_to_world, validate_repr_config
from repr_det.detectron.fine_tuning import fine_tuning_warning
from repr_det.method.blocks import readers
from repr_det.method.criteria import CRITERIA
from repr_det.method.errors import UserError
from repr_det.method.holding import Transition
from repr_det.method.layers import find_filter_layers
from repr_det.method.optimizers import scale_rates
from repr_det.method.passes import TrainingPasses, preserved_random_state
from repr_det.method.scheme import RePrScheme
from repr_det.method.selection import drop_total
from repr_det.runs.files import EVENTS_FILE, OVERLAPS_FILE, truncate_log
from repr_det.runs.resume import ExactResume
from repr_det.runs.safe_pickle import load_checkpoint

_LATER_HOOKS = (
    hooks.PreciseBN,
    ExactResume,
    hooks.PeriodicCheckpointer,
    hooks.BestCheckpointer,
    hooks.EvalHook,
    hooks.PeriodicWriter,
)

logger = logging.getLogger("repr_det.hook")


class RePrHook(HookBase):
    """Applies RePr to the convs that REPR.LAYERS names, on the schedule of REPR.

    ``trainer.register_hooks([RePrHook(cfg)])`` is all that a DefaultTrainer, SimpleTrainer or AMPTrainer needs: in
    ``before_train`` the hook finds model and optimizer and moves itself before PreciseBN, the checkpointer, evaluation
    and the writers, so that these see the network after a transition. Drops and restores happen in ``after_step``. It
    may be registered before or after ``resume_or_load``: what was loaded before it came is read from the checkpoint.

    Args:
        cfg: a Detectron2 config with the node REPR; REPR.ENABLED must be True.

    Raises:
        UserError: REPR is wrong, here where the config alone shows it, in ``before_train`` where it takes the model.
    """

    def __init__(self, cfg: CfgNode) -> None:
        cfg = scale_to_world(cfg, comm.get_world_size())
        if not cfg.REPR.ENABLED:
            raise UserError("RePrHook needs REPR.ENABLED True, got False")
        self.cfg = cfg
        self.schedule = validate_repr_config(cfg)
        length = cfg.REPR.REINIT.WARMUP_ITERS
        self.warm_up_iters = self.schedule.s2_iters if length == -1 else length
        self.scheme: RePrScheme | None = None
        self._loaded: dict[str, Any] | None = None

    def before_train(self) -> None:
        """Finds model and optimizer, puts a resumed state back, checks schedule against phase, logs the plan."""
        trainer = self.trainer
        if any(isinstance(hook, RePrHook) and hook is not self for hook in trainer._hooks):
            raise UserError(
                "RePrHook is registered twice in this trainer: leave one out (repr_det's Trainer brings its own)"
            )
        self._move_into_place()
        self.schedule.check_fits(trainer.max_iter)
        if self.scheme is None:
            if self._loaded is None and trainer.start_iter > 0:
                self._find_state()
            self.scheme = self._build_scheme()
            self._try_passes()
            if self.warm_up_iters:
                scale_rates(self.scheme.optimizer, self._share_of_rate)
        if self._loaded is not None:
            self.scheme.load_state_dict(self._loaded["scheme"])
            self._loaded = None
        # A hook in front of this one may have saved before the transition of the same iteration: it is made now.
        last = trainer.start_iter - 1
        owed = (last in self.schedule.drop_iters and not self.scheme.is_sub) or (
            last in self.schedule.restore_iters and self.scheme.is_sub
        )
        self._check_state(trainer.start_iter - owed)
        if comm.is_main_process():  # transitions that this run, resumed from an earlier checkpoint, will make again
            for name in (EVENTS_FILE, OVERLAPS_FILE):
                truncate_log(self._path(name), trainer.start_iter - owed)
        self._log_plan()
        if trainer.start_iter == 0 and (warning := fine_tuning_warning(self.cfg, self.scheme)):
            logger.warning(warning)
        if owed:
            self._record(last, self.scheme.restore() if self.scheme.is_sub else self.scheme.drop())

    def _find_state(self) -> None:
        """Reads from the checkpoint that the run continues what was loaded before this hook was registered."""
        trainer, start = self.trainer, self.trainer.start_iter
        for checkpointer in filter(None, map(_checkpointer_of, (trainer, *trainer._hooks))):
            path = checkpointer.get_checkpoint_file()
            if not path or not os.path.isfile(path):
                continue
            saved = load_checkpoint(path)
            state = saved.get("trainer", {}).get("hooks", {}).get(type(self).__qualname__)
            if state is not None and saved.get("iteration") == start - 1:
                self.load_state_dict(state)
                logger.info("RePr's state comes from %s", path)
                return
        if self.schedule.drop_iters[0] < start:
            raise UserError(
                f"REPR: iteration {start} comes after the first drop (iteration {self.schedule.drop_iters[0]}), and no "
                "state of RePrHook was found: it was trained by another schedule or without RePr, or RePrHook was "
                "registered after the checkpoint was loaded; register it before, or start anew in another OUTPUT_DIR"
            )

    def _check_state(self, iteration: int) -> None:
        """The scheme is where the schedule says that it is before ``iteration``."""
        expected = self.schedule.phase(iteration)
        cycles = sum(i < iteration for i in self.schedule.restore_iters)
        if (expected == "sub") != self.scheme.is_sub or self.scheme.cycle != cycles:
            held = "a sub-network" if self.scheme.is_sub else "the full network"
            raise UserError(
                f"REPR: iteration {iteration} belongs to the {expected} phase of this schedule after {cycles} cycles, "
                f"but the checkpoint holds {held} after {self.scheme.cycle}: another schedule wrote it, or a run "
                "without RePr; resume with that one, or start anew in another OUTPUT_DIR"
            )

    def _try_passes(self) -> None:
        """Draws a batch where a transition to come looks at data, so that what is wrong with it shows now."""
        if not self.scheme.needs_batches or self.schedule.restore_iters[-1] < self.trainer.start_iter:
            return
        what = (
            f"REPR.CRITERION {self.cfg.REPR.CRITERION}" if self.scheme.criterion.needs_data else "FrozenBN calibration"
        )
        try:
            found = list(self.scheme.passes.batches(1, 0))
        except UserError:
            raise
        except Exception as error:  # whatever a data set and its mapper raise
            found, reason = [], f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        else:
            reason = ""
        if not found:
            raise UserError(
                f"REPR: {what} looks at training batches, and none can be drawn{reason}: give DATASETS.TRAIN, or a "
                "data loader that can be iterated again"
            )

    def after_step(self) -> None:
        """Logs phase and dropped filters; drops or restores where the schedule says so."""
        iteration = self.trainer.iter
        self.scheme.check()
        # The phase of an iteration is the network that its forward pass saw, so it is logged before a transition.
        storage = self.trainer.storage
        storage.put_scalar("repr/phase", float(self.scheme.is_sub), smoothing_hint=False)
        storage.put_scalar("repr/dropped_filters", self.scheme.num_dropped, smoothing_hint=False)
        if iteration in self.schedule.drop_iters:
            self._record(iteration, self.scheme.drop())
        elif iteration in self.schedule.restore_iters:
            self._record(iteration, self.scheme.restore())

    def after_train(self) -> None:
        """Warns where training ends with filters dropped."""
        if self.scheme is not None and self.scheme.is_sub:
            logger.warning(
                "Training stopped inside the sub-network phase: %d filters are dropped (zero) in this model until a "
                "resumed run restores them after iteration %d",
                self.scheme.num_dropped,
                next(i for i in self.schedule.restore_iters if i >= self.trainer.iter - 1),
            )

    def state_dict(self) -> dict[str, Any]:
        """Schedule and scheme state; no collective calls, for Detectron2 calls it on rank 0 alone."""
        if self.scheme is None:
            return self._loaded or {}
        return {"run": self._fingerprint(), "scheme": self.scheme.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the state until ``before_train`` has the model; refuses that of another schedule or selection."""
        mine = self._fingerprint()
        for key, value in state["run"].items():
            if mine.get(key) != value:
                raise UserError(
                    f"REPR: the checkpoint was trained with {key} {value}, this run has {mine.get(key)}: resume with "
                    "the config of the run that wrote it, or start anew in another OUTPUT_DIR"
                )
        self._loaded = state

    def _share_of_rate(self) -> float:
        """Of the learning rate, while it warms up anew after a restore."""
        if not self.scheme.num_returned:
            return 1.0
        last = max(i for i in self.schedule.restore_iters if i < self.trainer.iter)
        return min(1.0, (self.trainer.iter - last) / (self.warm_up_iters + 1))

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same when a run is resumed, by config key."""
        node = self.cfg.REPR
        return {
            "REPR.START_ITER": self.schedule.start_iter,
            "REPR.S1_ITERS": self.schedule.s1_iters,
            "REPR.S2_ITERS": self.schedule.s2_iters,
            "REPR.NUM_CYCLES": self.schedule.num_cycles,
            "REPR.DROP_RATIO": node.DROP_RATIO,
            "REPR.MAX_DROP_PER_LAYER": node.MAX_DROP_PER_LAYER,
            "REPR.CRITERION": node.CRITERION,
            "REPR.REINIT.SCALE": node.REINIT.SCALE,
            "REPR.REINIT.FROZEN_NORM": node.REINIT.FROZEN_NORM,
            "REPR.REINIT.RETURN": node.REINIT.RETURN,
            "REPR.REINIT.WARMUP_ITERS": node.REINIT.WARMUP_ITERS,
        }

    def _move_into_place(self) -> None:
        registered = self.trainer._hooks
        index = first_later_hook(registered)
        mine = next(i for i, hook in enumerate(registered) if hook is self)
        # Everything between shifts by one, so that Detectron2's own loop over the hooks neither skips nor repeats one.
        if index < mine:
            registered.insert(index, registered.pop(mine))

    def _build_scheme(self) -> RePrScheme:
        trainer, node = self.trainer, self.cfg.REPR
        inner = getattr(trainer, "_trainer", trainer)
        model = trainer.model
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        seed = self.cfg.SEED if self.cfg.SEED >= 0 else comm.shared_random_seed()
        return RePrScheme(
            find_filter_layers(model, node.LAYERS.INCLUDE, node.LAYERS.EXCLUDE),
            inner.optimizer,
            criterion=node.CRITERION,
            drop_ratio=node.DROP_RATIO,
            max_drop_per_layer=node.MAX_DROP_PER_LAYER,
            scale=node.REINIT.SCALE,
            frozen_norm=node.REINIT.FROZEN_NORM,
            returns=node.REINIT.RETURN,
            readers=readers(model),
            criterion_batches=node.CRITERION_BATCHES,
            calibration_batches=calibration_batches(self.cfg),
            seed=seed,
            passes=training_passes(self.cfg, model, trainer),
            slim_model=model,
            slim=node.SLIM,
            apart=lambda: EventStorage(0),
        )

    def _log_plan(self) -> None:
        layers = self.scheme.layers
        filters = sum(layer.num_filters for layer in layers)
        kinds = sorted({layer.kind for layer in layers})
        logger.info(
            "RePr: %d convs, %d filters take part (norm: %s); every drop takes %s%d (%g %%), at most %g %% of a layer",
            len(layers),
            filters,
            ", ".join(kinds),
            "up to " if CRITERIA[self.cfg.REPR.CRITERION].spares else "",
            drop_total(filters, self.cfg.REPR.DROP_RATIO),
            100 * self.cfg.REPR.DROP_RATIO,
            100 * self.cfg.REPR.MAX_DROP_PER_LAYER,
        )
        logger.info("RePr layers: %s", ", ".join(f"{x.name} ({x.num_filters})" for x in layers))
        schedule = self.schedule
        logger.info(
            "RePr schedule: S1 %d, S2 %d, %d cycles from iteration %d; drops after iterations %s, restores after %s",
            schedule.s1_iters,
            schedule.s2_iters,
            schedule.num_cycles,
            schedule.start_iter,
            schedule.drop_iters,
            schedule.restore_iters,
        )
        left = self.trainer.max_iter - schedule.end_iter
        if left < schedule.s1_iters:
            logger.warning(
                "RePr: %d iterations are left after the last restore, fewer than S1 %d", left, schedule.s1_iters
            )

    def _record(self, iteration: int, transition: Transition) -> None:
        logger.info(
            "RePr %s after iteration %d (cycle %d): %d filters, mean O_f %.4f -> %.4f, %.2f s",
            transition.event,
            iteration,
            transition.cycle + 1,
            sum(map(len, transition.dropped.values())),
            transition.overlap_before,
            transition.overlap_after,
            transition.seconds,
        )
        if comm.is_main_process():
            line = {"iteration": iteration, **dataclasses.asdict(transition)}
            overlap = {"overlap": line.pop("overlaps")}
            if line["slim"] is None:
                del line["slim"]
            self._append(OVERLAPS_FILE, {key: line[key] for key in ("iteration", "event", "cycle")} | overlap)
            self._append(EVENTS_FILE, line)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with open(self._path(name), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _path(self, name: str) -> str:
        os.makedirs(self.cfg.OUTPUT_DIR, exist_ok=True)
        return os.path.join(self.cfg.OUTPUT_DIR, name)


def first_later_hook(registered: Sequence[HookBase]) -> int:
    """The place of RePrHook: before the first hook that must see the network after a transition, as everything does
    that saves, evaluates, writes or keeps a checkpointer; the number of hooks where there is none."""
    later = (i for i, x in enumerate(registered) if isinstance(x, _LATER_HOOKS) or _checkpointer_of(x) is not None)
    return next(later, len(registered))


def _checkpointer_of(holder: Any) -> Checkpointer | None:
    return next((value for value in vars(holder).values() if isinstance(value, Checkpointer)), None)


def training_passes(cfg: CfgNode, model: nn.Module, trainer: Any) -> TrainingPasses:
    """Extra passes over the training data, from a loader of their own whose order depends on SEED and cycle only.

    The data set and its mapper are those of the trainer's own loader where that is Detectron2's, so that a large
    annotation file is not read again; otherwise ``trainer.build_train_loader`` makes it, and where there is no such
    method the trainer's loader is iterated anew, from its beginning.
    """
    inner = getattr(trainer, "_trainer", trainer)
    build = getattr(trainer, "build_train_loader", None)

    def batches(number: int, cycle: int) -> Iterable[list[dict]]:
        seed = max(cfg.SEED, 0) * 1_000_003 + cycle * 1009
        dataset = _map_dataset(getattr(inner, "data_loader", None))
        with preserved_random_state():
            seed_all_rng(seed + comm.get_rank())
            if dataset is not None:
                loader = build_detection_train_loader(
                    dataset=dataset,
                    mapper=None,
                    sampler=TrainingSampler(len(dataset), seed=seed),
                    total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
                    aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
                )
            elif build is not None:
                own = cfg.clone()
                own.defrost()
                own.DATALOADER.NUM_WORKERS = 0
                loader = build(own)
            elif iter(inner.data_loader) is inner.data_loader:
                raise UserError(
                    "REPR: transitions look at training batches, and this trainer's data loader is an iterator, which "
                    "training would miss them from: give one that can be iterated again, such as a DataLoader or a list"
                )
            else:
                loader = inner.data_loader
            return list(itertools.islice(loader, number))

    def loss(batch: list[dict]) -> Tensor:
        # Detectron2's models log scalars and images as they run; those of extra passes are not the training's.
        try:
            with EventStorage(0):
                return sum(model(batch).values())
        except FloatingPointError as error:  # Detectron2's, of boxes that are not finite
            raise UserError(
                f"REPR: on the training batches that a transition looks at: {' '.join(str(error).split())} Lower the "
                "learning rate or clip gradients, and go on from a checkpoint before that"
            ) from error

    return TrainingPasses(
        model=model,
        batches=batches,
        loss=loss,
        join=lambda many: list(itertools.chain.from_iterable(many)),
    )


def _map_dataset(loader: Any) -> MapDataset | None:
    """The map-style data set inside a loader that ``build_detection_train_loader`` made, or None."""
    while loader is not None and not isinstance(loader, MapDataset):
        loader = getattr(loader, "dataset", None)
    return loader
