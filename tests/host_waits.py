"""Counts how often the host waits for a device: by torch's warnings on a real one."""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Line or warning -> number of waits inside, complete at the end."""
    found: Counter[str] = Counter()
    simulated = sys.modules.get("simulated_cuda.device")
    if simulated is not None:
        before = simulated.waits.copy()
        yield found
        found.update(simulated.waits - before)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(str(warning.message) for warning in caught if "synchroniz" in str(warning.message))
