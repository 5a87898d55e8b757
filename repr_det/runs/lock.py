"""One run at a time in an OUTPUT_DIR: rank 0 locks a file there."""

import json
import logging
import os
import socket
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from repr_det.method.errors import UserError
from repr_det.runs.files import write_atomically

OWNER_FILE = ".running"
logger = logging.getLogger("repr_det.lock")


def lock_folder(folder: str | Path, agents: Iterable[str] = (), wait: float = 0.0) -> FileLock:
    """Locks a folder until ``release()`` or the end of the process; on a file system without locks it only warns.

    Args:
        agents: of torchrun, that take part in the run.
        wait: seconds.

    Raises:
        UserError: another process has the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".running.lock", thread_local=False)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        owner = _owner(folder)
        known = f" ({owner.get('pid')} on {owner.get('host')})" if owner else ""
        raise UserError(
            f"OUTPUT_DIR {folder} is being trained by another process{known}: end it, or give another folder"
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): start no second run there", folder, error.strerror)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "agents": sorted(set(agents))}
    write_atomically(folder / OWNER_FILE, json.dumps(owner) + "\n")
    return lock


def agents_of(folder: str | Path) -> set[str]:
    """The agents of torchrun that last took part in the run in ``folder``."""
    return set(_owner(Path(folder)).get("agents", ()))


def _owner(folder: Path) -> dict:
    try:
        return dict(json.loads((folder / OWNER_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
