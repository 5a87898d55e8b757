"""RePr as a hook of a Detectron2 trainer."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from repr_det.detectron import config
from repr_det.detectron.passes import epochs_of, training_passes
from repr_det.method.criteria import get_criterion
from repr_det.method.errors import OptionError, UserError, spelling
from repr_det.method.loop import RePr, describe_schedule, schedule_of, unwrapped
from repr_det.method.options import CONFIG_KEYS, DETECTRON2_LAYERS, RePrOptions, check_resumed, check_type
from repr_det.method.passes import SharedLoaderError
from repr_det.method.schedule import RePrSchedule
from repr_det.method.scheme import RePrScheme
from repr_det.network.state import preserved_random_state
from repr_det.runs.files import EVENTS_FILE, OVERLAPS_FILE, truncate_log
from repr_det.runs.resume import ExactResume

_LATER_HOOKS = (hooks.PreciseBN, ExactResume, hooks.EvalHook, hooks.PeriodicWriter)
SHORT = 16_000  # iterations: COCO's 1x schedule has 90,000
SHORT_EPOCHS = 2.0  # of 12 in that schedule: a small batch makes many iterations of few images
# What ImageNet weights reach.
_TRAINED = ("backbone.bottom_up.", "backbone.stem.", "backbone.res", "roi_heads.res5.")
ADVICE = (
    "Such runs lost AP against the same runs without RePr (docs/method.md): take repr_r50_fpn_redundant.yaml, which "
    "lost less, train the baseline beside it (repr-det compare), or set REPR.ENABLED False"
)
logger = logging.getLogger("repr_det.hook")


class RePrHook(HookBase):
    """Drops and restores, their logs, and their part of a checkpoint.

    ``trainer.register_hooks([RePrHook(cfg)])``, or ``RePrHook(layers=[...], drop_ratio=0.3, ...)``, is all that a
    DefaultTrainer, SimpleTrainer or AMPTrainer needs. Register it before ``resume_or_load``. It moves itself before
    PreciseBN, the checkpointer, evaluation and the writers, which see the network after a transition.

    Args:
        output_dir: where repr_events.jsonl goes; "" writes none.
        seed: of all randomness; below 0 one that the ranks agree on.
        total_steps: iterations of the training; None takes the trainer's.
        first_lr_step: iteration of the first decay of the learning rate; None finds it in the trainer's schedule.
        images_per_batch: over all ranks; None takes the trainer's.
        weights: the trained weights that training starts from, for a warning.
        averages: averages of the weights that follow the model.
        names: option -> how errors spell it; None spells keyword arguments.
        options: of ``RePrOptions``.

    Raises:
        UserError: an option is wrong; in ``before_train`` if only the model shows it.
    """

    @configurable
    def __init__(
        self,
        *,
        output_dir: str = "",
        seed: int = -1,
        total_steps: int | None = None,
        first_lr_step: int | None = None,
        images_per_batch: int | None = None,
        weights: str = "",
        averages: Sequence[Any] = (),
        names: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        check_type("seed", seed, int, or_none=False)
        check_type("total_steps", total_steps, int)
        check_type("first_lr_step", first_lr_step, int)
        check_type("images_per_batch", images_per_batch, int)
        self.output_dir = output_dir
        self.names = names
        self.seed = seed
        self.total_steps = total_steps
        self.first_lr_step = first_lr_step
        self.images_per_batch = images_per_batch
        self.weights = weights
        self.averages = averages
        self.schedule: RePrSchedule | None = None
        with spelling(names):
            self.options = RePrOptions.of({"layers": DETECTRON2_LAYERS, **options})
            get_criterion(self.options.criterion)
            if self.options.s1_iters:
                self.schedule = schedule_of(self.options, 0, None)
        self.repr: RePr | None = None
        self._loaded: dict[str, Any] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments from a Detectron2 config; REPR.ENABLED must be True."""
        if "REPR" not in cfg:
            raise UserError("the config has no node REPR: call add_repr_config(cfg) before it is merged with a file")
        cfg = config.scale_to_world(cfg, comm.get_world_size())
        if not cfg.REPR.ENABLED:
            raise UserError("RePrHook needs REPR.ENABLED True, got False")
        return {
            "output_dir": cfg.OUTPUT_DIR,
            "seed": cfg.SEED,
            "total_steps": cfg.SOLVER.MAX_ITER,
            "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
            "weights": cfg.MODEL.WEIGHTS,
            "names": config.NAMES,
            **vars(config.options_of_config(cfg)),
        }

    @property
    def scheme(self) -> RePrScheme | None:
        """Drops and restores; None before training."""
        return None if self.repr is None else self.repr.scheme

    def before_train(self) -> None:
        """Finds model and optimizer, puts a resumed state back, logs the plan."""
        with spelling(self.names):
            self._begin()

    def _begin(self) -> None:
        trainer = self.trainer
        if any(isinstance(hook, RePrHook) and hook is not self for hook in trainer._hooks):
            raise UserError("RePrHook is registered twice in this trainer: leave one out (Trainer brings its own)")
        self._log_as_detectron2()
        # The hooks between shift by one, so that Detectron2's loop neither skips nor repeats one.
        index, mine = first_later_hook(trainer._hooks), trainer._hooks.index(self)
        if index < mine:
            trainer._hooks.insert(index, trainer._hooks.pop(mine))
        if self.schedule is None:
            self.schedule = self._derived()
            if self._loaded is not None:
                check_resumed(self._loaded["run"], self._fingerprint())
        if self.total_steps is not None and trainer.max_iter <= self.schedule.end_iter < self.total_steps:
            raise OptionError(
                f"this trainer's max_iter is {trainer.max_iter}, but {{total_steps}} is {self.total_steps}: to train "
                "in pieces, stop a run and resume it in another trainer"
            )
        self.schedule.check_fits(trainer.max_iter)
        is_missing = self.repr is None and self._loaded is None and self.schedule.drop_iters[0] < trainer.start_iter
        if self.repr is None:
            self.repr = self._build()
        if self._loaded is not None:
            saved, self._loaded = self._loaded["scheme"], None
            self.repr.scheme.load_state_dict(saved)
        # A hook in front of this one may have saved before this iteration's transition, which is made now.
        scheme, last = self.repr.scheme, trainer.start_iter - 1
        is_due = last in (self.schedule.restore_iters if scheme.is_sub else self.schedule.drop_iters)
        self.repr.steps = trainer.start_iter - is_due
        is_elsewhere = scheme.cycle != self.schedule.cycle(self.repr.steps)
        if is_missing or is_elsewhere or self.repr.phase != self.schedule.phase(self.repr.steps):
            raise UserError(
                f"iteration {trainer.start_iter} is not in cycle {scheme.cycle} of RePr, {self.repr.phase} phase, "
                "where this trainer is: load a checkpoint of that iteration, and register RePrHook before that"
            )
        if comm.is_main_process() and self.output_dir:
            for name in (EVENTS_FILE, OVERLAPS_FILE):  # transitions that a resumed run makes again
                truncate_log(Path(self.output_dir, name), self.repr.steps)
        logger.info(describe_schedule(self.schedule))
        if (left := trainer.max_iter - self.schedule.end_iter) < self.schedule.s1_iters:
            logger.warning(
                "RePr: %d iterations are left after the last restore, fewer than S1 %d", left, self.schedule.s1_iters
            )
        self._prove()
        if is_due:
            self._step(last)

    def after_step(self) -> None:
        """Logs phase and dropped filters; drops or restores by the schedule."""
        storage, scheme = self.trainer.storage, self.repr.scheme
        storage.put_scalar("repr/phase", float(scheme.is_sub), smoothing_hint=False)
        storage.put_scalar("repr/dropped_filters", scheme.num_dropped, smoothing_hint=False)
        self._step(self.trainer.iter)

    def after_train(self) -> None:
        """Warns if filters are dropped."""
        if self.repr is None:
            return
        self.repr.expect_no_more()
        if self.repr.scheme.is_sub:
            logger.warning(
                "Training stopped inside the sub-network phase: %d filters are dropped (zero) in this model until a "
                "resumed run restores them",
                self.repr.scheme.num_dropped,
            )

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint. Detectron2 calls it on rank 0 alone."""
        if self.repr is None:
            return self._loaded or {}
        return {"run": self._fingerprint(), "scheme": self.repr.scheme.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the state for ``before_train``; refuses another schedule or options."""
        self._loaded = state
        if self.schedule is not None:
            with spelling(self.names):
                check_resumed(state["run"], self._fingerprint())

    def _fingerprint(self) -> dict[str, Any]:
        phases = ("start_iter", "s1_iters", "s2_iters", "num_cycles")
        return {CONFIG_KEYS[name]: getattr(self.schedule, name) for name in phases} | self.options.resumed()

    def _build(self) -> RePr:
        trainer, seed = self.trainer, self.seed
        with config.as_user_error("RePrHook needs a trainer with the attributes model and optimizer"):
            model, optimizer = unwrapped(trainer.model), getattr(trainer, "_trainer", trainer).optimizer
        if seed < 0:
            with preserved_random_state():
                seed = comm.shared_random_seed()
        built = RePr(
            model,
            optimizer,
            trainer.max_iter,
            schedule=self.schedule,
            passes=training_passes(model, trainer, self.seed, self.images_per_batch),
            averages=self.averages,
            seed=seed,
            **vars(self.options),
        )
        built.logger = logger
        return built

    def _prove(self) -> None:
        """Shows who participates by a pass over a batch; without one the first step shows it."""
        scheme = self.repr.scheme
        if self.trainer.start_iter > self.schedule.restore_iters[-1]:
            return
        try:
            batch = next(iter(scheme.passes.batches(1, 0)))  # asked for even if the state has shown it
            if not scheme.participants.known:
                self.repr.prove(lambda: scheme.passes.loss(batch))
        except UserError as error:
            if scheme.needs_batches or not isinstance(error, SharedLoaderError):
                raise
        except Exception as error:
            failed = f"no training batch passes through the model before the first step, {error!r:.200}"
            if scheme.needs_batches:
                raise UserError(f"RePr: transitions look at training batches, and {failed}") from error
            logger.warning(f"RePr: {failed}; the step shows what participates")
        if self.trainer.start_iter == 0 and scheme.participants.known:
            epochs = epochs_of(self.trainer, self.images_per_batch)
            if warning := fine_tuning_warning(self.weights, self.trainer.max_iter, epochs, scheme):
                logger.warning(warning)

    def _step(self, iteration: int) -> None:
        with spelling(self.names):
            done = self.repr.step()
        if done is None or not self.output_dir or not comm.is_main_process():
            return
        event = {"iteration": iteration, **dataclasses.asdict(done)}
        del event["overlaps"]
        overlap = {"iteration": iteration, "event": done.event, "cycle": done.cycle, "overlap": done.overlaps}
        Path(self.output_dir).mkdir(parents=True, exist_ok=True)
        for name, line in ((OVERLAPS_FILE, overlap), (EVENTS_FILE, event)):
            with open(Path(self.output_dir, name), "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _log_as_detectron2(self) -> None:
        ours, theirs = logging.getLogger("repr_det"), logging.getLogger("detectron2")
        if theirs.handlers and not ours.handlers:
            for handler in theirs.handlers:
                ours.addHandler(handler)
            ours.setLevel(theirs.level)
            ours.propagate = theirs.propagate

    def _derived(self) -> RePrSchedule:
        """The schedule by the trainer's scheduler of the learning rate."""
        first = self.first_lr_step
        if first is None:
            try:
                scheduler = next(hook.scheduler for hook in self.trainer._hooks if isinstance(hook, hooks.LRScheduler))
                first = next(iter(config.decays(scheduler, self.total_steps or self.trainer.max_iter)), None)
            except Exception:  # a scheduler of one's own can be anything
                if self._loaded is not None:  # torch's could be read when the run began
                    phases = (self._loaded["run"][CONFIG_KEYS[name]] for name in ("s1_iters", "s2_iters"))
                    return RePrSchedule(*phases, self.options.num_cycles, self.options.start_iter)
                logger.info("RePr: no schedule of the learning rate can be read (first_lr_step= says when it decays)")
        return schedule_of(self.options, self.total_steps or self.trainer.max_iter, first)


def saved_state(trainer: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of a RePrHook, of whatever class, in "trainer" of a checkpoint."""
    return next((one for one in trainer.get("hooks", {}).values() if "scheme" in one), None)


def first_later_hook(registered: Sequence[HookBase]) -> int:
    """The place of RePrHook: before the first hook that saves, evaluates or writes."""
    for index, hook in enumerate(registered):
        saves = any(isinstance(value, Checkpointer) for value in vars(hook).values())
        if saves or isinstance(hook, _LATER_HOOKS):
            return index
    return len(registered)


def fine_tuning_warning(weights: str, max_iter: int, epochs: float | None, scheme: RePrScheme) -> str | None:
    """A warning for a run that drops filters of trained ``weights`` ("" for random ones) and has few iterations to
    relearn them, unless only redundant filters go and all return silently."""
    trained = [layer.name for layer in scheme.layers if layer.name.startswith(_TRAINED)]
    is_short = max_iter < SHORT or (epochs is not None and epochs < SHORT_EPOCHS)
    is_silent = scheme.criterion.spares and not set(trained) & set(scheme.not_silent)
    if not weights or not is_short or not trained or is_silent:
        return None
    length = f"{max_iter} iterations" if epochs is None else f"{max_iter} iterations ({epochs:.3g} epochs)"
    return (
        f"RePr: {length} from trained weights ({weights}), and every drop takes up to "
        f"{100 * scheme.options.drop_ratio:g} % of the filters of {len(trained)} trained convs. {ADVICE}"
    )
