"""One run at a time in an OUTPUT_DIR: rank 0 locks a file there for as long as it lives."""

import json
import logging
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from repr_det.method.errors import UserError
from repr_det.runs.files import write_atomically

OWNER_FILE = ".running"
logger = logging.getLogger("repr_det.lock")


class RunLock:
    """The lock of one folder, which ends with the process. On a file system without locks there is only a warning.

    Args:
        folder: OUTPUT_DIR; made if it is not there.
        job: name of the elastic job that the process belongs to, see ``job_of``; "" for none.
    """

    def __init__(self, folder: str | Path, job: str = "") -> None:
        self.folder, self.job = Path(folder), job
        self._lock = FileLock(self.folder / ".running.lock", thread_local=False)

    def acquire(self, wait: float = 0.0) -> None:
        """Locks the folder; raises UserError if another process has it and keeps it for ``wait`` seconds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=wait)
        except Timeout:
            owner = _owner(self.folder)
            known = f" ({owner.get('pid')} on {owner.get('host')})" if owner else ""
            raise UserError(
                f"OUTPUT_DIR {self.folder} is being trained by another process{known}: end it, or give another folder"
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no second run there", self.folder, error.strerror)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": self.job}
        write_atomically(self.folder / OWNER_FILE, json.dumps(owner) + "\n")

    def release(self) -> None:
        self._lock.release()


def job_of(folder: str | Path) -> str:
    """Returns the elastic job that last trained in ``folder``, "" if there is none."""
    return str(_owner(Path(folder)).get("job", ""))


def _owner(folder: Path) -> dict:
    try:
        return dict(json.loads((folder / OWNER_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
