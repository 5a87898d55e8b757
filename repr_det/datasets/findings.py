"""Errors and warnings about data, and what a name or a file shows of their cause."""

import logging
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from repr_det.method.errors import UserError

_BEGINNINGS = {
    b"version https://git-lfs": "is a Git LFS pointer: fetch the data with 'git lfs pull'",
    b"\x1f\x8b": "is compressed by gzip: unpack it with 'gunzip'",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"\xef\xbb\xbf": "begins with a byte order mark, which Detectron2 cannot read: save it without",
    b"\xff\xfe": "is UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text: save it as UTF-8",
    b"<": "is an HTML or XML page: fetch the file itself",
}

logger = logging.getLogger(__name__)


class Findings:
    def __init__(self, json_file: Path, name: str | None = None) -> None:
        self.json_file = json_file
        self.prefix = f"data set {name}: " if name else ""

    def fail(self, problem: str) -> NoReturn:
        raise UserError(f"{self.prefix}{self.json_file}: {problem}")

    def warn(self, problem: str) -> None:
        logger.warning("%s%s: %s", self.prefix, self.json_file, problem)

    def report(self, faults: list[str], doubts: list[str]) -> None:
        if faults:
            self.fail(faults[0])
        for doubt in doubts:
            self.warn(doubt)


def listed(names: Iterable, limit: int = 8) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") or "nothing"


def reason(error: Exception, path: str | os.PathLike) -> str:
    """Says why a file cannot be read, by its first bytes or the error's own text."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError:
        head = b""
    kinds = [f"it {kind}" for beginning, kind in _BEGINNINGS.items() if head.startswith(beginning)]
    return kinds[0] if kinds else " ".join(str(error).split()) or type(error).__name__


def folded(name: str) -> str:
    """The name without case, blanks and Unicode form (NFC or NFD)."""
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())
