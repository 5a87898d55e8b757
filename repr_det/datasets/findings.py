"""Findings about a data set: errors and warnings of one line that name its file."""

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from repr_det.method.errors import UserError

MANY = 0.1  # share of entries from which on an oddity looks like a mistake of the whole file
MAX_USELESS = 0.001  # share of faulty objects that passes with a warning: COCO's own train2017 has 2 in 860,001
ONE_IN = 100  # in a data set of at least this many objects, one faulty object passes too

logger = logging.getLogger(__name__)


class Findings:
    """Reports on one annotation file.

    Args:
        json_file: the file that every line names.
        name: the data set's name, if it has one.
    """

    def __init__(self, json_file: Path, name: str | None = None) -> None:
        self.json_file = json_file
        self.prefix = f"data set {name}: " if name else ""

    def fail(self, problem: str) -> NoReturn:
        raise UserError(f"{self.prefix}{self.json_file}: {problem}")

    def warn(self, problem: str) -> None:
        logger.warning("%s%s: %s", self.prefix, self.json_file, problem)

    def say(self, gap: str | None, doubt: str | None) -> None:
        """Refuses a file for a gap, and warns of a doubt."""
        if gap:
            self.fail(gap)
        if doubt:
            self.warn(doubt)

    def leave_aside(self, count: int, total: int, first: str, what: str) -> None:
        """Warns of a few entries that Detectron2 does not use, and refuses more than a few."""
        if count > allowed(total):
            self.fail(first + (f" ({count} such {what})" if count > 1 else ""))
        if count:
            self.warn(f"{first}; {count} such {what} of {total} are left aside")


def allowed(total: int) -> float:
    """The number of faulty objects among ``total`` that are no reason to refuse a file."""
    return max(MAX_USELESS * total, int(total >= ONE_IN))


def listed(names: Iterable, limit: int = 8) -> str:
    """Names the first few, for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") or "nothing"


def shown(value: object) -> str:
    """A value as a message shows it, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_float(value: object) -> float:
    """The number as a float, NaN if it is none."""
    try:
        return float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return math.inf
