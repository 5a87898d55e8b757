"""A process that does not outlive the one that started it."""

import ctypes
import signal
import sys


def end_with_parent() -> None:
    """SIGTERM when the parent dies. Linux alone; elsewhere a child outlives a parent that is killed by SIGKILL, and the
    lock on OUTPUT_DIR tells the next one."""
    if _PRCTL is not None:
        _PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


_PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
