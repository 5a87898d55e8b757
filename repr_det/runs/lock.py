"""One run at a time in an OUTPUT_DIR: rank 0 locks a file there for as long as it lives."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from repr_det.method.errors import UserError

LOCK_FILE = ".running"
_AGAIN_SECONDS = 0.2

logger = logging.getLogger("repr_det.lock")


class RunLock:
    """The lock of one folder.

    It is a POSIX record lock: the system takes it back when the process dies, however it dies, and children (loader
    workers) do not inherit it. It would also end when the process opens and closes the file again, so that it never
    reads it. On a file system without locks there is a warning and no lock.

    Attributes:
        mark: what it has written into the file, different for every process and start.

    Args:
        folder: OUTPUT_DIR; made if it is not there.
        job: name of the elastic job that the process belongs to, see ``job_of``; "" for none.
    """

    def __init__(self, folder: str | Path, job: str = "") -> None:
        self.folder, self.job, self.mark = Path(folder), job, ""
        self._file: IO[str] | None = None

    def acquire(self, wait: float = 0.0) -> None:
        """Locks the folder, or waits so many seconds for a run that is about to end.

        Raises:
            UserError: another process has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - open for as long as it is locked
        deadline = time.monotonic() + wait
        while (error := _try(file)) is not None:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning("%s cannot be locked (%s): start no second run there", self.folder, error.strerror)
                break
            if time.monotonic() >= deadline:
                file.close()
                raise UserError(
                    f"OUTPUT_DIR {self.folder} is being trained by another process{_owner(self.folder)}: wait for it, "
                    "end it, or give another OUTPUT_DIR"
                )
            time.sleep(_AGAIN_SECONDS)
        self.mark = json.dumps(
            {"host": socket.gethostname(), "pid": os.getpid(), "job": self.job, "started": time.time()}
        )
        file.truncate(0)
        file.write(self.mark + "\n")
        file.flush()
        os.fsync(file.fileno())  # other machines wait for it
        self._file = file

    def release(self) -> None:
        """The file stays: whoever waits for it has it open."""
        if self._file is not None:
            self._file.close()
            self._file = None


def job_of(folder: str | Path) -> str:
    """The elastic job that last trained in ``folder``, "" where there is none."""
    return str(_content(Path(folder)).get("job", ""))


def finds(folder: str | Path, mark: str, wait: float) -> bool:
    """Whether another process's ``mark`` is, or comes within so many seconds, in the lock file of ``folder``."""
    deadline = time.monotonic() + wait
    while json.dumps(_content(Path(folder))) != mark:
        if time.monotonic() >= deadline:
            return False
        time.sleep(_AGAIN_SECONDS)
    return True


def _try(file: IO[str]) -> OSError | None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None


def _owner(folder: Path) -> str:
    owner = _content(folder)
    return f" ({owner['pid']} on {owner['host']})" if {"pid", "host"} <= owner.keys() else ""


def _content(folder: Path) -> dict:
    try:
        found = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
