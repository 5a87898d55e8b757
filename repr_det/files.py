"""Files that are whole or absent: written beside their place and renamed into it."""

import errno
import json
import os
import tempfile
from pathlib import Path

EVENTS_FILE = "repr_events.jsonl"  # every drop and restore
OVERLAPS_FILE = "repr_overlaps.jsonl"  # O_f of every filter before each drop and after each restore
METRICS_FILE = "metrics.json"
_TRACES = ("last_checkpoint", METRICS_FILE, EVENTS_FILE, "config.yaml")


def run_traces(folder: str | Path) -> list[str]:
    """The names in ``folder`` that say that a run has begun there; [] where it is empty or absent."""
    return sorted(p.name for p in Path(folder).glob("*") if p.name in _TRACES or p.suffix == ".pth")


def write_atomically(path: str | Path, text: str) -> None:
    """Replaces ``path`` by ``text`` (UTF-8); a crash leaves the old file or the new one."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def disk_is_full(error: BaseException | None) -> bool:
    """Whether ``error`` says that nothing more can be written: no space, quota or file size limit reached."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def truncate_log(path: str | Path, start_iter: int) -> None:
    """Cuts a file of one json object a line, in the order of their "iteration", before the first line that is not of an
    iteration before ``start_iter`` or that a crash cut short. Does nothing where there is no such file."""
    if not os.path.exists(path):
        return
    with open(path, "r+b") as file:
        keep = 0
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["iteration"] >= start_iter:
                    break
            except (ValueError, KeyError, TypeError):
                break
            keep += len(line)
        file.truncate(keep)
