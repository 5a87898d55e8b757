"""All options of RePr, described once for keyword arguments, config keys, resume, documentation and errors."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repr_det.method.errors import OptionError, UserError

# Convs of FPN backbones, of C4 backbones, and of C4's box head.
DETECTRON2_LAYERS = ("backbone.bottom_up.res*.conv*", "backbone.res*.conv*", "roi_heads.res5.*.conv*")

_WITHOUT_EFFECT = ("norms", "slim", "slim_model", "readers", "apart")  # keywords of version 0.2.0
_OF_SCHEDULE = ("s1_iters", "s2_iters", "num_cycles", "start_iter")  # a resumed run must have the same drops


@dataclass(frozen=True)
class About:
    """The description of an option.

    Attributes:
        key: of a config, below the node REPR.
        least: of an integer.
        share: the interval of a number, "(0, 1)" or "(0, 1]".
        in_config: default of the config key, if not that of the keyword.
    """

    key: str
    meaning: str
    choices: Sequence[str] = ()
    least: int | None = None
    share: str = ""
    in_config: Any = None

    def range(self) -> str:
        """The right values in words; "" where all are."""
        if self.least is not None:
            return f"an integer of at least {self.least}"
        if self.share:
            return f"in {self.share}"
        return f"one of {', '.join(self.choices)}" if self.choices else ""

    def check(self, name: str, value: Any) -> None:
        """Raises OptionError if ``value`` is wrong."""
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.least is not None:
            right = is_number and isinstance(value, int) and value >= self.least
        elif self.share:
            right = is_number and (0 < value < 1 or (value == 1 and self.share == "(0, 1]"))
        else:
            right = not self.choices or value in self.choices
        if not right:
            raise OptionError(f"{{{name}}} must be {self.range()}, got {value!r}")


def _option(default: Any, key: str, meaning: str, **about: Any) -> Any:
    return field(default=default, metadata={"about": About(key, meaning, **about)})


@dataclass(frozen=True)
class RePrOptions:
    """The options of RePr. OptionError if one is out of range."""

    s1_iters: int = _option(
        0,
        "S1_ITERS",
        "Steps of the full network in one cycle. 0, with S2 0 too: derived, S1 : S2 = 2 : 1 in three quarters of the "
        "steps before the learning rate decays.",
        least=0,
    )
    s2_iters: int = _option(0, "S2_ITERS", "Steps of the sub-network in one cycle.", least=0)
    num_cycles: int = _option(3, "NUM_CYCLES", "Cycles of full network and sub-network.", least=1)
    start_iter: int = _option(0, "START_ITER", "Steps of plain training before the first cycle.", least=0)
    drop_ratio: float = _option(0.3, "DROP_RATIO", "Share of all filters that a drop takes.", share="(0, 1)")
    max_drop_per_layer: float = _option(
        0.5, "MAX_DROP_PER_LAYER", "Largest share of one layer that a drop takes, rounded up.", share="(0, 1]"
    )
    criterion: str | Callable[..., Any] = _option(  # noqa: RUF009
        "ortho", "CRITERION", "Score by which filters are ranked: a name, or in Python a function of a layer."
    )
    criterion_batches: int = _option(8, "CRITERION_BATCHES", "Training batches that a criterion may look at.", least=1)
    layers: Sequence[str] = _option(
        ("*",),
        "LAYERS.INCLUDE",
        "Patterns (fnmatch) on names of Conv2d modules. Frozen convs, and convs in which dropping a filter does not "
        "silence it, stay out.",
        in_config=list(DETECTRON2_LAYERS),
    )
    exclude: Sequence[str] = _option((), "LAYERS.EXCLUDE", "Patterns of convs that stay out.", in_config=[])
    scale: str = _option(
        "kept",
        "REINIT.SCALE",
        "Norm of a new filter: the mean of the filters that stayed, its own before the drop, or 1.",
        choices=("kept", "old", "unit"),
    )
    frozen_norm: str = _option(
        "recalibrate",
        "REINIT.FROZEN_NORM",
        "Statistics of FrozenBN behind a new filter: such that its channel has its old mean and deviation, or kept.",
        choices=("recalibrate", "keep"),
    )
    calibration_batches: int = _option(
        0, "REINIT.CALIBRATION_BATCHES", "Training batches for that. 0: enough for 8 images; in a loop 4.", least=0
    )
    returns: str = _option(
        "as_published",
        "REINIT.RETURN",
        "A returning filter acts at once (gamma 1), or starts silent and learns. The second is not in the paper.",
        choices=("as_published", "function_preserving"),
    )
    warmup_iters: int = _option(
        0, "REINIT.WARMUP_ITERS", "Steps of learning-rate warm-up after a restore (not in the paper). -1: S2.", least=-1
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            about_option(name).check(name, value)
        if (self.s1_iters == 0) != (self.s2_iters == 0):
            raise OptionError(
                f"{{s1_iters}} is {self.s1_iters}, {{s2_iters}} {self.s2_iters}: set both, or leave both 0"
            )
        if self.max_drop_per_layer < self.drop_ratio:
            least = f"at least {{drop_ratio}} {self.drop_ratio}"
            raise OptionError(f"{{max_drop_per_layer}} must be {least}, got {self.max_drop_per_layer}")

    @classmethod
    def of(cls, given: dict[str, Any]) -> "RePrOptions":
        """Makes the options of keyword arguments; OptionError for another name."""
        known = {}
        for name, value in given.items():
            if name in _WITHOUT_EFFECT:
                warnings.warn(f"RePr: {name}= has no effect since version 0.3.0", DeprecationWarning, stacklevel=3)
            elif name not in option_names():
                raise OptionError(f"RePr has no option {name!r}: take one of {', '.join(option_names())}")
            else:
                known[name] = value
        return cls(**known)

    def resumed(self) -> dict[str, Any]:
        """Config key -> value that a resumed run must have too."""
        names = [name for name in option_names() if name not in _OF_SCHEDULE]
        return {CONFIG_KEYS[name]: _storable(getattr(self, name)) for name in names}


def check_count(name: str, value: Any) -> None:
    """Raises OptionError unless ``value`` is an integer of at least 1."""
    About("", "", least=1).check(name, value)


def check_type(name: str, value: Any, kind: type, or_none: bool = True) -> None:
    """Raises UserError unless the value of the keyword ``name`` is of that type."""
    if not isinstance(value, kind) and not (or_none and value is None):
        raise UserError(f"{name}= must be of type {kind.__name__}, got {value!r}")


def about_option(name: str) -> About:
    return RePrOptions.__dataclass_fields__[name].metadata["about"]


def option_names() -> tuple[str, ...]:
    return tuple(RePrOptions.__dataclass_fields__)


def _storable(value: Any) -> Any:
    """Makes a value fit for ``torch.load(weights_only=True)``: a function becomes its name."""
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)  # NumPy's numbers are of subclasses
    if isinstance(value, Sequence):
        return [_storable(one) for one in value]
    named = getattr(value, "score", value)  # of a criteria.Criterion
    named = named if hasattr(named, "__qualname__") else type(named)
    return f"{named.__module__}.{named.__qualname__}"


CONFIG_KEYS = {name: f"REPR.{about_option(name).key}" for name in option_names()}


def check_resumed(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raises OptionError if options, by config key, are not those that were saved."""
    for name, key in CONFIG_KEYS.items():
        if key in saved and key in mine and saved[key] != mine[key]:
            raise OptionError(
                f"the checkpoint was trained with {{{name}}} {saved[key]}, this run has {mine[key]}: resume with the "
                "same, or start again elsewhere"
            )
