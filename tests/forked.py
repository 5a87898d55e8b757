"""Commands in processes of their own without their imports: one process imports torch, Detectron2 and repr_det once and
forks a child for each command, with its own arguments, environment and output. A child can be killed, and its exit
status is that of the command."""

import importlib
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

import tiny_backbone  # noqa: F401

import repr_det.commands.console
import repr_det.commands.lazy
import repr_det.commands.train  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["forked"])
_PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


class Command:
    """A running command; see ``_child``."""

    def __init__(self, words: Sequence[object], log: str | Path, **options: object) -> None:
        self.log = Path(log)
        with patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=_PATHS):
            forkserver.ensure_running()  # a no-op from the second time on
        self.process = _CONTEXT.Process(target=_child, args=([str(x) for x in words], str(log)), kwargs=options)
        self.process.start()

    @property
    def text(self) -> str:
        return self.log.read_text()

    def status(self, seconds: float = 300) -> int:
        """The exit status; minus the number of the signal that ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"hangs:\n{self.text[-4000:]}"
        return self.process.exitcode

    def kill(self) -> None:
        if self.process.exitcode is None:
            self.process.kill()
        self.process.join()


def run(words: Sequence[object], log: str | Path, **options: object) -> tuple[int, str]:
    """Exit status and output of a command."""
    command = Command(words, log, **options)
    try:
        return command.status(), command.text
    finally:
        command.kill()


def _child(
    words: list[str],
    log: str,
    environment: dict[str, str] | None = None,
    before: str = "",
    arguments: Sequence[object] = (),
    torchrun: Sequence[object] = (),
) -> None:
    """Runs ``words``, "repr-det" or "module:function" and its arguments, by torchrun if there are words for it.

    ``before`` is a "module:function" that is called first, with ``arguments``: what the test changes there.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.update({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})})
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a process of one's own
    # Detectron2's launch spawns, which would import everything again.
    start_processes = importlib.import_module("torch.multiprocessing.spawn").start_processes
    start_processes.__kwdefaults__ = None
    start_processes.__defaults__ = (*start_processes.__defaults__[:-1], "fork")
    if before:
        _named(before)(*arguments)
    if torchrun:
        _torchrun([str(x) for x in torchrun], words)
    else:
        _main(words)


def _named(name: str) -> Callable:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _main(words: list[str]) -> None:
    sys.argv = words
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the agent has its own handlers, in its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.root.handlers.clear()  # of the agent
    if words[0] == "repr-det":
        _named("repr_det.commands.console:main")()
    else:
        _named(words[0])(*words[1:])


def _torchrun(options: list[str], words: list[str]) -> None:
    """torchrun itself, whose workers are forks of its agent instead of new interpreters."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    config, _, _ = config_from_args(parse_args([*options, words[0]]))
    config.start_method = "fork"
    elastic_launch(config, _main)(words)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.05)
