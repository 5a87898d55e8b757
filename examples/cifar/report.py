"""The paper's table beside ours, from the records."""

import dataclasses
import math
import operator
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cifar.network import TEACHER
from cifar.records import REPR_FIELDS, STANDARD, Settings
from repr_det.studies.comparison.statistics import paired_difference

# Table 1 of the paper: CIFAR-10, C3(32), test accuracy in percent.
PAPER = {
    "standard": 72.1, "random": 73.4, "mean_activation": 74.1, "apoz": 74.3, "gradient": 74.3, "taylor": 74.3,
    "hessian": 74.4, "weight_norm": 74.6, "oracle": 76.0, "ortho": 76.4,
}  # fmt: skip
_ALWAYS_TOLD = ("network", "train_images", "epochs", "batch_size", "optimizer", "lr")

Record = dict[str, Any]
Arms = dict[Settings, dict[int, Record]]  # settings with seed 0 -> seed -> record


def table(runs: Sequence[tuple[Settings, Record]]) -> str:
    """A table for each way of training: a line for the standard network and one for each form of RePr. Where there are
    several ways, one more table that puts them below one another."""
    groups = group(runs)
    if not groups:
        return "no finished runs"
    parts = [_title(way, arms) + "\n" + _columns(_lines(way, arms)) for way, arms in groups.items()]
    if len(groups) > 1:
        parts.append("all ways of training\n" + _columns(_overview(groups)))
    return "\n\n".join(parts)


def group(runs: Sequence[tuple[Settings, Record]]) -> dict[Settings, Arms]:
    """Settings of the standard network with seed 0 -> its arms: itself and the forms of RePr."""
    groups: dict[Settings, Arms] = {}
    for settings, record in runs:
        way = dataclasses.replace(settings, row=STANDARD, seed=0, **dict.fromkeys(REPR_FIELDS))
        arm = dataclasses.replace(settings, seed=0)
        groups.setdefault(way, {}).setdefault(arm, {})[settings.seed] = record
    order = list(PAPER)
    return {
        way: dict(sorted(arms.items(), key=lambda item: order.index(item[0].row) if item[0].row in order else 99))
        for way, arms in groups.items()
    }


def arm_name(arm: Settings, arms: Iterable[Settings]) -> str:
    """The row, and the RePr options in which the ``arms`` of RePr differ."""
    if arm.row == STANDARD:
        return arm.row
    differing = _differing(REPR_FIELDS, [other for other in arms if other.row != STANDARD])
    return " ".join([arm.row, *(_told(name, getattr(arm, name)) for name in differing)])


def way_name(way: Settings, ways: Iterable[Settings]) -> str:
    """The settings in which the ``ways`` of training differ, where they are not the default."""
    names = _differing([field.name for field in dataclasses.fields(way) if field.name != "teacher"], list(ways))
    return ", ".join(_told(name, getattr(way, name)) for name in names if name in _unusual(way)) or "plain"


def _lines(way: Settings, arms: Arms) -> list[tuple[str, ...]]:
    differences = ("last 5 % - standard, 95 % CI", "test - standard, 95 % CI")
    lines = [("", "paper", "runs", "test accuracy", "last 5 %", "best epoch", "training", *differences)]
    for arm, found in arms.items():
        diverged = sum(record["diverged"] is not None for record in found.values())
        lines.append(
            (
                arm_name(arm, arms),
                str(PAPER.get(arm.row, "")) if way.network != TEACHER else "",
                f"{len(found)}, {diverged} diverged" if diverged else str(len(found)),
                *(_spread([value(record) for record in found.values()]) for value in (_final, tail, _best, _train)),
                *("" if arm == way else _difference(arms.get(way, {}), found, value) for value in (tail, _final)),
            )
        )
    return lines


def tail(record: Record) -> float:
    """Mean test accuracy over the last 5 % of the epochs: at a constant rate one epoch's jumps by a point or two."""
    last = tail_epochs(record)
    return statistics.mean(a for epoch, a in zip(record["curve_epochs"], record["curve"], strict=True) if epoch in last)


def tail_epochs(record: Record) -> list[int]:
    """Those of the last 5 % of the epochs after which the test accuracy is known."""
    epochs = record["curve_epochs"]
    return [epoch for epoch in epochs if epoch > 0.95 * epochs[-1]]


_final, _best, _train = map(operator.itemgetter, ("final", "best", "train"))


def _overview(groups: dict[Settings, Arms]) -> list[tuple[str, ...]]:
    lines = [("", "standard", "RePr", "test accuracy", "test - standard, 95 % CI")]
    for way, arms in groups.items():
        standard = _spread([record["final"] for record in arms.get(way, {}).values()])
        forms = {arm: found for arm, found in arms.items() if arm != way}
        lines += [
            (
                way_name(way, groups),
                standard,
                arm_name(arm, arms),
                _spread([record["final"] for record in found.values()]),
                _difference(arms.get(way, {}), found),
            )
            for arm, found in forms.items()
        ] or [(way_name(way, groups), standard, "", "", "")]
    return lines


def _title(way: Settings, arms: Arms) -> str:
    told = [*_ALWAYS_TOLD, *(name for name in _unusual(way) if name not in _ALWAYS_TOLD)]
    title = ", ".join(_told(name, getattr(way, name)) for name in told)
    forms = [arm for arm in arms if arm != way]
    if forms:
        differing = _differing(REPR_FIELDS, forms)
        shared = [_told(name, getattr(forms[0], name)) for name in REPR_FIELDS if name not in differing]
        title += f"\nRePr: {', '.join(shared)}"
    return title


def _unusual(way: Settings) -> list[str]:
    """The names of the settings of the standard network that are not the default."""
    return [field.name for field in dataclasses.fields(way) if getattr(way, field.name) != field.default]


def _differing(names: Iterable[str], settings: Sequence[Settings]) -> list[str]:
    return [name for name in names if len({getattr(one, name) for one in settings}) > 1]


def _told(name: str, value: Any) -> str:
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def _difference(
    standard: dict[int, Record], other: dict[int, Record], value: Callable[[Record], float] = _final
) -> str:
    seeds = [seed for seed in other if seed in standard]
    if not seeds:
        return "no standard run"
    found = paired_difference(*([value(arm[seed]) for seed in seeds] for arm in (standard, other)))
    pairs = "one pair" if found.n == 1 else f"{found.n} equal pairs"
    return f"{found.mean:+.2f} ({f'{found.low:+.2f} to {found.high:+.2f}' if math.isfinite(found.low) else pairs})"


def _columns(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )
