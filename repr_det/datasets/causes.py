"""Causes by name: what a file is that cannot be read, and which file was meant by a name that is not there."""

import ntpath
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

_BEGINNINGS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the data: fetch them with 'git lfs pull'",
    b"\x1f\x8b": "is compressed by gzip, which Detectron2 does not unpack: unpack it with 'gunzip'",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"BZh": "is compressed by bzip2: unpack it",
    b"\xfd7zXZ": "is compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it",
    b"\xef\xbb\xbf": "begins with a byte order mark, which Detectron2 cannot read: save it without",
    b"\xff\xfe": "is UTF-16 text, which Detectron2 cannot read: save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text, which Detectron2 cannot read: save it as UTF-8",
    b"<": "is an HTML or XML page, perhaps of a download that failed: fetch the file itself",
}


def kind_of(path: str | os.PathLike) -> str | None:
    """Says what a file is by its first bytes, and what to do about it; None if it is nothing known, or unreadable."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError:
        return None
    return next((kind for beginning, kind in _BEGINNINGS.items() if head.startswith(beginning)), None)


def other_spelling(name: str, names: Sequence[str]) -> str | None:
    """The one of ``names`` that is ``name`` in another spelling, and what differs; None if there is none."""
    for what, fold in (
        ("in another Unicode form (NFC or NFD)", lambda text: unicodedata.normalize("NFC", text)),
        ("in upper or lower case", lambda text: unicodedata.normalize("NFC", text).casefold()),
        ("with other blanks", lambda text: "".join(unicodedata.normalize("NFKC", text).casefold().split())),
    ):
        for other in names:
            if other != name and fold(other) == fold(name):
                return f"{other!a} is there, the same name {what}: spell both alike"
    return None


def meant_file(root: Path, name: str) -> str | None:
    """Names the file below ``root`` that was meant by ``name``, which is not there, and what is wrong with the name."""
    if "\0" in name:
        return None
    for what, candidate in (
        ("with / for \\", name.replace("\\", "/")),
        ("file_name must be relative to the image folder", ntpath.basename(name)),
    ):
        if candidate and candidate != name and (root / candidate).is_file():
            return f"{candidate!r} is there: {what}"
    folder = root
    for part in Path(name).parts:
        if (folder / part).exists():
            folder /= part
            continue
        return other_spelling(part, os.listdir(folder)) if folder.is_dir() else None
    return None
