"""The files of a run, and how they are written whole or not at all."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from repr_det.method.errors import UserError

EVENTS_FILE = "repr_events.jsonl"  # every drop and restore
OVERLAPS_FILE = "repr_overlaps.jsonl"  # O_f of every filter before each drop and after each restore
METRICS_FILE = "metrics.json"
FINAL_CHECKPOINT = "model_final.pth"
_UNFINISHED = ".saving-"
_TRACES = ("last_checkpoint", METRICS_FILE, EVENTS_FILE)


def run_traces(folder: str | Path) -> list[str]:
    """Names of files that show that a run has made a step there."""
    found = (p for p in Path(folder).glob("*") if p.name in _TRACES or p.suffix == ".pth")
    return sorted(p.name for p in found if p.stat().st_size)


def refuse_used(folder: str | Path, advice: str) -> None:
    """Raises UserError if another run has trained in ``folder``; ``advice`` says how to resume."""
    if traces := run_traces(folder):
        raise UserError(
            f"OUTPUT_DIR {folder} holds another run ({', '.join(traces[:3])}): {advice} to continue it, or give "
            "another OUTPUT_DIR"
        )


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a file that takes the place of ``path`` once it is whole and on the disk."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{_UNFINISHED}{path.name}-")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_atomically(path: str | Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text)


def remove_unfinished(folder: str | Path) -> None:
    """Deletes unfinished files of a killed ``replacing``."""
    for leftover in Path(folder).glob(f"{_UNFINISHED}*"):
        if leftover.is_file():  # version 0.2.0 left folders
            leftover.unlink()


def cause_of(error: BaseException | None) -> BaseException | None:
    """The OSError for which torch's writer of files raises a RuntimeError, else the error itself."""
    is_hidden = "inline_container" in str(error) and isinstance(error.__context__, OSError)
    return error.__context__ if is_hidden else error


def advice_for(error: BaseException | None) -> str:
    """Advice for an error of the machine (disk, quota, limits of the process), else ""."""
    error = cause_of(error)
    number = error.errno if isinstance(error, OSError) else None
    worker_failed = isinstance(error, RuntimeError) and "Too many open files" in str(error)
    # EOFError: a worker could not hand an image over.
    if worker_failed or isinstance(error, EOFError) or number in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n) or lower DATALOADER.NUM_WORKERS"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space"
    if number in (errno.EBUSY, errno.ESTALE, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ETIMEDOUT):
        return "see to the file system"
    return ""


def truncate_log(path: str | Path, start_iter: int) -> None:
    """Removes json lines that a crash cut short, and those whose "iteration" is not before ``start_iter``."""
    if not os.path.exists(path):
        return
    with open(path, "r+b") as file:  # in place: others hold it open for appending
        whole = file.read()
        kept = b"".join(line for line in whole.splitlines(keepends=True) if _is_before(line, start_iter))
        if not whole.startswith(kept):
            file.seek(0)
            file.write(kept)
        file.truncate(len(kept))


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Reads an object from every line, but for lines that a crash cut short; [] without file."""
    found = []
    if os.path.isfile(path):
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def last_logged(path: str | Path) -> int:
    """The largest "iteration" in a file of json lines, else -1."""
    return max((line["iteration"] for line in read_json_lines(path)), default=-1)


def _is_before(line: bytes, start_iter: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["iteration"] < start_iter
    except (ValueError, KeyError, TypeError):
        return False
