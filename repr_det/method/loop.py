"""RePr in one object for any PyTorch loop."""

import dataclasses
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repr_det.method.criteria import drop_total
from repr_det.method.errors import UserError
from repr_det.method.holding import Transition
from repr_det.method.layers import find_filter_layers, what_attention_means
from repr_det.method.options import RePrOptions, check_count, check_type
from repr_det.method.participants import trains
from repr_det.method.passes import TrainingPasses, passes_over
from repr_det.method.schedule import DECAYED, RePrSchedule
from repr_det.method.scheme import RePrScheme
from repr_det.network.state import undisturbed, unwrapped
from repr_det.network.steps import around_step, scale_rates, with_inner

logger = logging.getLogger("repr_det.loop")

_MISSED = 20  # steps of an optimizer without step(): more than it makes in an iteration
_CALLS = 40  # of step(), at least half of which must come with a step of the optimizer: GradScaler skips fewer
_LITTLE = 0.05  # of the trainable weights


class RePr:
    """RePr for a training loop of one's own: call ``step()`` after every ``optimizer.step()``.

    Args:
        model: what is called in training, wrapped in DistributedDataParallel or DataParallel or not.
        optimizer: one, or a list, that holds the parameters of the convs that participate.
        total_steps: optimizer steps of the whole training.
        schedule: None derives it from the options.
        first_lr_step: when the learning rate first decays, if it does.
        loader, loss: training batches and ``loss(batch)``, for criteria that look at data and for FrozenBN.
        passes: the same, for batches of another kind (``passes.TrainingPasses``).
        sample: a batch (or tuple of arguments) that shows at once what participates; else the first training pass does.
        averages: modules with averages of the weights (EMA, SWA), or what holds one. A restore sets them to the model.
        first_step: steps before RePr came in; drops and restores before it are left out.
        seed: all randomness comes from it and the cycle.
        options: of ``options.RePrOptions``: layers, exclude, criterion, drop_ratio, ...

    Attributes:
        schedule: the steps of drops and restores, from 0.
        scheme: its ``masks`` say which filters are out.
        steps: optimizer steps so far.

    Raises:
        UserError: an option is wrong, no conv can participate, or the schedule does not fit into ``total_steps``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        total_steps: int,
        *,
        schedule: RePrSchedule | None = None,
        first_lr_step: int | None = None,
        loader: Iterable[Any] | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        passes: TrainingPasses | None = None,
        sample: Any = None,
        averages: Sequence[Any] = (),
        first_step: int = 0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.options = RePrOptions.of(options)
        check_count("total_steps", total_steps)
        check_type("schedule", schedule, RePrSchedule)
        check_type("first_lr_step", first_lr_step, int)
        check_type("seed", seed, int, or_none=False)
        if not isinstance(first_step, int) or not 0 <= first_step <= total_steps:
            raise UserError(f"first_step= must be 0 to total_steps= {total_steps}, got {first_step!r}")
        if (loader is None) != (loss is None) or (loader is not None and passes is not None):
            raise UserError("give loader= and loss= together, or passes=, or none of them")
        model = unwrapped(model)
        self.model = model
        self.total_steps = total_steps
        self.schedule = schedule or schedule_of(self.options, total_steps, first_lr_step)
        self.schedule.check_fits(total_steps)
        if loader is not None and loss is not None:
            passes = passes_over(model, loader, loss, seed)
        self.scheme = RePrScheme(
            find_filter_layers(model, self.options.layers, self.options.exclude),
            optimizer,
            model=model,
            passes=passes,
            averages=averages,
            seed=seed,
            chosen=self.options,
        )
        self.steps = first_step
        self.logger = logger
        self._announced: tuple[str, bool] | None = None  # names of layers, and whether those are all
        self._is_late = self._is_behind = False
        self._behind: Counter[int] = Counter()  # steps of each optimizer since the last call of step()
        self._calls = self._taken = 0  # of step(), and of them with a step of the optimizer
        self._handles = []
        for number, one in enumerate(self.scheme.optimizers):
            self._handles += around_step([one], after=partial(_count, weakref.ref(self), number))
        if self.warmup_iters:
            self._handles += scale_rates(self.scheme.optimizers, self._share_of_rate)
        self._end = {"steps": 0, "dropped": 0, "drops": self.schedule.drop_iters, "finished": False}
        self._at_end = weakref.finalize(self, _warn_at_end, self._end)
        try:
            if loader is not None and passes and self.scheme.needs_batches and not list(passes.batches(1, 0)):
                raise UserError("loader= yields no batch, and transitions look at training batches")
            if sample is not None:
                self._prove_by(sample)
        except BaseException:
            self.close()
            raise

    @property
    def warmup_iters(self) -> int:
        """Steps of learning-rate warm-up after a restore."""
        length = self.options.warmup_iters
        return self.schedule.s2_iters if length == -1 else length

    @property
    def phase(self) -> str:
        """ "full" or "sub": what the next forward pass sees."""
        return "sub" if self.scheme.is_sub else "full"

    def step(self) -> Transition | None:
        """To be called after every step of the optimizer. Collective. UserError as ``RePrScheme``.

        Returns:
            What a drop or restore did, in the steps that have one.
        """
        iteration = self.steps
        self.steps += 1
        self._look_for_steps()
        self.scheme.check()
        self._announce()
        if self._end["finished"]:
            return None
        if iteration == self.total_steps:
            self.logger.warning(
                f"RePr: step {self.steps} is beyond the {self.total_steps} of total_steps=: training is over, or "
                "total_steps= counts epochs"
            )
        if iteration in self.schedule.drop_iters:
            return self._log(iteration, self.scheme.drop())
        if iteration in self.schedule.restore_iters and self.scheme.is_sub:
            return self._log(iteration, self.scheme.restore())
        return None

    def finish(self, filters: str = "new") -> Transition | None:
        """Ends RePr before its schedule does: later steps are plain training of the full network, without a warm-up.

        Args:
            filters: dropped filters come back "new", as in a restore, or "old", as before the drop; else UserError.

        Returns:
            What the restore did; None where no filters were out.
        """
        if filters not in ("new", "old"):
            raise UserError(f"filters= must be new or old, got {filters!r}")
        self._end["finished"] = True
        if not self.scheme.is_sub:
            return None
        return self._log(self.steps - 1, self.scheme.restore(as_they_were=filters == "old"))

    def prove(self, run: Callable[[], Any]) -> None:
        """Finds out what participates by ``run()``, which calls the model as training does. Leaves no trace in it.

        Raises:
            UserError: nothing participates.
        """
        with undisturbed(self.model, own_modes=True), torch.enable_grad():
            run()
        self.scheme.check()
        self._announce()

    def _prove_by(self, sample: Any) -> None:
        arguments = sample if isinstance(sample, tuple) else (sample,)
        try:
            self.prove(lambda: self.model(*arguments))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"sample= is not what the model can be called with: {error!r}") from error

    def expect_no_more(self) -> None:
        """Ends the warnings of filters that are out, and of drops that are due, at the end."""
        self._at_end.detach()

    def close(self) -> None:
        """Lets go of model and optimizer, for another RePr."""
        self._end["finished"] = True
        self.scheme.close()
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Loads under ``torch.load(weights_only=True)``."""
        return {
            "steps": self.steps,
            "schedule": dataclasses.asdict(self.schedule),
            "finished": self._end["finished"],
            "scheme": self.scheme.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state``; load model and optimizer of the same checkpoint first.

        Raises:
            UserError: another schedule, options, layers or model wrote it.
        """
        if (saved := RePrSchedule(**state["schedule"])) != self.schedule:
            raise UserError(
                f"the checkpoint was trained with {saved}, this run has {self.schedule}: take its total_steps and "
                "schedule"
            )
        self.scheme.load_state_dict(state["scheme"])
        self.steps = state["steps"]
        self._end["finished"] = state.get("finished", False)
        self._end["dropped"] = self.scheme.num_dropped

    def __repr__(self) -> str:
        schedule, layers = self.schedule, self.scheme.layers
        filters = sum(layer.num_filters for layer in layers)
        return (
            f"RePr(step {self.steps} of {self.total_steps}, {self.phase} network, {self.scheme.num_dropped} of "
            f"{filters} filters in {len(layers)} convs dropped; drops after {schedule.drop_iters}, restores after "
            f"{schedule.restore_iters})"
        )

    def _announce(self, settled: bool = False) -> None:
        """Says what participates when that is known, and when a transition has ``settled`` it if it is not the same."""
        layers, options, participants = self.scheme.layers, self.options, self.scheme.participants
        names = ", ".join(f"{layer.name} ({layer.num_filters})" for layer in layers)
        now = names, settled or participants.all_have_run
        if not participants.known or now == self._announced or (self._announced and not settled):
            return
        filters = sum(layer.num_filters for layer in layers)
        kinds = ", ".join(sorted({layer.kind for layer in layers}))
        number = f"{'up to ' if self.scheme.criterion.spares else ''}{drop_total(filters, options.drop_ratio)}"
        self.logger.info(
            f"RePr: {len(layers)} convs, {filters} filters participate (norm: {kinds}); every drop takes {number} "
            f"({100 * options.drop_ratio:g} %), at most {100 * options.max_drop_per_layer:g} % of a layer: {names}"
        )
        trained = sum(parameter.numel() for parameter in self.model.parameters() if trains(parameter))
        share = sum(layer.weight.numel() for layer in layers) / max(1, trained)
        if share < _LITTLE and now[1]:
            self.logger.warning(
                f"RePr: there is next to nothing to drop, {100 * share:.1f} % of the trainable weights"
                f"{what_attention_means(self.model)}"
            )
        if not self._announced and self.logger is logger:  # the hook has said it before
            self.logger.info(describe_schedule(self.schedule))
        self._announced = now

    def _log(self, iteration: int, done: Transition) -> Transition:
        self._announce(settled=True)
        self._end["dropped"] = self.scheme.num_dropped
        number = sum(map(len, done.dropped.values()))
        self.logger.info(
            f"RePr {done.event} after iteration {iteration} (cycle {done.cycle + 1}): {number} filters, mean O_f "
            f"{done.overlap_before:.4f} -> {done.overlap_after:.4f}, {done.seconds:.2f} s"
        )
        if number and done.event == "restore":
            self._look_at_rates()
        return done

    def _look_at_rates(self) -> None:
        """Warns once of a restore after the rates have decayed; torch's schedulers note the initial ones."""
        groups = [group for optimizer in self.scheme.optimizers for group in optimizer.param_groups]
        shares = [float(group["lr"]) / float(group["initial_lr"]) for group in groups if group.get("initial_lr")]
        if shares and max(shares) <= DECAYED and not self._is_late:
            self._is_late = True
            self.logger.warning(
                f"RePr: the learning rate is {100 * max(shares):.3g} % of its initial one at this restore: what comes "
                "back is hardly relearned; end the cycles before it decays, which first_lr_step= says"
            )

    def _look_for_steps(self) -> None:
        """Counts calls of step(), and those that come without a step of the optimizer."""
        self._end["steps"] = self.steps
        self._calls += 1
        self._taken += bool(self._behind)
        if self._calls == _CALLS:
            if self._taken <= _CALLS / 2:
                self.logger.warning(
                    f"RePr: {_CALLS - self._taken} of {_CALLS} calls of step() came without a step of the optimizer: "
                    "another one trains, or step() is called more than once a step"
                )
            else:
                self._calls = self._taken = 0
        self._behind.clear()

    def _share_of_rate(self) -> float:
        """The share of the learning rate that the next step has, in warm-up after a restore."""
        restored = [i for i in self.schedule.restore_iters if i < self.steps]
        if self._end["finished"] or not self.scheme.num_returned or not restored:
            return 1.0
        return min(1.0, (self.steps - restored[-1]) / (self.warmup_iters + 1))


def apply_repr(model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int, **options: Any) -> RePr:
    """``RePr`` for a loop that one cannot edit: every step of ``optimizer`` counts by itself.

    Args:
        options: of ``RePr``.

    Returns:
        The object, for checkpoints. Its ``step`` must not be called.
    """
    counted = with_inner(optimizer)
    held = {id(value) for one in counted for value in vars(one).values()}
    outer = [one for one in counted if id(one) not in held]
    if len(outer) > 1:
        raise UserError(f"apply_repr counts the steps of one optimizer, got {len(outer)}: build RePr and call step()")
    repr_training = RePr(model, optimizer, total_steps, **options)
    count = repr_training.step

    def refuse() -> None:
        raise UserError("apply_repr counts the optimizer's steps by itself: do not call step(), or build RePr instead")

    repr_training.step = refuse  # type: ignore[method-assign]
    repr_training._handles += around_step(counted, after=count)
    return repr_training


def schedule_of(options: RePrOptions, total_steps: int, first_lr_step: int | None) -> RePrSchedule:
    if options.s1_iters == 0:
        return RePrSchedule.derive(total_steps, first_lr_step, options.num_cycles, options.start_iter)
    return RePrSchedule(options.s1_iters, options.s2_iters, options.num_cycles, options.start_iter)


def describe_schedule(schedule: RePrSchedule) -> str:
    return (
        f"RePr schedule: S1 {schedule.s1_iters}, S2 {schedule.s2_iters}, {schedule.num_cycles} cycles from iteration "
        f"{schedule.start_iter}; drops after iterations {schedule.drop_iters}, restores after {schedule.restore_iters}"
    )


def _count(watched: weakref.ref[RePr], optimizer: int) -> None:
    one = watched()
    if one is None or one._end["finished"]:
        return
    one._behind[optimizer] += 1
    if one._behind[optimizer] == _MISSED and not one._is_behind:
        one._is_behind = True
        one.logger.warning(
            f"RePr: the optimizer has made {_MISSED} steps without a call of step(), which total_steps= counts"
        )


def _warn_at_end(end: dict[str, Any]) -> None:
    due = sum(iteration >= end["steps"] for iteration in end["drops"])
    if end["steps"] and due and not end["dropped"] and not end["finished"]:
        logger.warning(
            f"RePr: training ended after {end['steps']} steps of the optimizer, before {due} drops that its schedule "
            "has: another optimizer trained, or finish() was not called"
        )
    if end["dropped"]:
        logger.warning(
            f"RePr: training ended in the sub-network phase: {end['dropped']} filters are dropped (zero) in the model; "
            "call finish() before it ends, or resume from a checkpoint"
        )
