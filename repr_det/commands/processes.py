"""The processes of a tool: how it ends, how a run is set up in each, how several are launched."""

import argparse
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from filelock import FileLock
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from repr_det.commands.world import Launched, dist_url, nobody_came
from repr_det.detectron.config import without_repr
from repr_det.method.errors import UserError
from repr_det.runs.files import advice_for, write_atomically
from repr_det.runs.lock import job_of, lock_folder
from repr_det.runs.record import CONFIG_FILE
from repr_det.runs.stopping import STATUS, Stopped, answer_signals, end_with_parent

STOCK_CONFIG_FILE = "config_detectron2.yaml"
_FOR_THE_FIRST_TO_SPEAK = 5.0  # seconds
_FOR_THE_LAST_TO_END = 30.0  # seconds that a resumed run waits for the one that it continues, which may be saving
_HELD: list[FileLock] = []
_EARLY = MemoryHandler(1000, flushLevel=logging.CRITICAL + 1)  # what is said before a run has a log of its own
_EARLY.setLevel(logging.WARNING)


def run_tool(main: Callable[[], Any]) -> None:
    """Runs a tool; a UserError or a fault of the machine ends it with one line on stderr and status 2, a signal to stop
    with status 75."""
    launched = Launched.found()
    logging.basicConfig(format="%(levelname)s: %(message)s")  # until a run has logs of its own
    logging.getLogger().addHandler(_EARLY)
    try:
        main()
        return
    except UserError as error:
        what = _last_line(error)
    except (OSError, RuntimeError, EOFError) as error:
        if not (advice := advice_for(error)):
            raise
        text = str(error).split(". ")[0] or "a loader worker could not hand over its images"
        what = f"{text}: {advice}; a run goes on with --resume"
    except Stopped as stopped:
        if launched is None or launched.rank == 0:
            _say(f"stopped by {stopped.asked} with status {STATUS}; the same command with --resume continues")
        raise
    if launched is not None and launched.local_rank > 0:
        # What the first process here says as well is said once: torchrun ends this one when that one has ended.
        time.sleep(_FOR_THE_FIRST_TO_SPEAK)
    _say(f"error: {what}")
    sys.exit(2)


def _say(line: str) -> None:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {line}\n")
    sys.stderr.flush()


def write_configs(cfg: CfgNode, folder: Path) -> None:
    """Writes config.yaml, and the config that stock tools can read."""
    write_atomically(folder / CONFIG_FILE, cfg.dump())
    write_atomically(folder / STOCK_CONFIG_FILE, without_repr(cfg).dump())


def setup_process(args: argparse.Namespace, cfg: CfgNode, config: str) -> None:
    """Lock, threads, logs and seeds of one process of a run.

    As Detectron2's ``default_setup``, but config.yaml is not written: it is the record of a run that trains, see
    ``runs.record``. ``args.resume`` becomes what rank 0 has found, see ``may_continue``.

    Args:
        config: the text of the config, for the log.

    Raises:
        UserError: another process trains in OUTPUT_DIR.
    """
    folder, rank = cfg.OUTPUT_DIR, comm.get_rank()
    _take(args, folder)
    if cfg.MODEL.DEVICE == "cpu" and comm.get_world_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Every process would take all cores for itself, and they would wait for each other most of the time.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.get_local_size()))
    if comm.is_main_process() and folder:
        os.makedirs(folder, exist_ok=True)
    setup_logger(folder, distributed_rank=rank, name="fvcore")
    logger = setup_logger(folder, distributed_rank=rank)
    setup_logger(folder, distributed_rank=rank, name="repr_det", abbrev_name="repr")
    _log_early_warnings(vars(args).pop("early", []))
    logging.getLogger("detectron2.engine.train_loop").addFilter(_one_line_for_user_errors)
    logger.info("Rank of current process: %d. World size: %d", rank, comm.get_world_size())
    logger.info("Environment info:\n%s", collect_env_info())
    logger.info("Command line arguments: %s", args)
    if comm.is_main_process():
        logger.info("Running with full config:\n%s", config)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if precision := cfg.get("FLOAT32_PRECISION"):  # a key that Detectron2 reads and does not define
        torch.set_float32_matmul_precision(precision)
    if not args.eval_only:  # its overhead is large beside the size of validation sets
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def _log_early_warnings(warnings: list[tuple[str, str]]) -> None:
    """Writes into the log what stands on the terminal already."""
    logging.getLogger().removeHandler(_EARLY)
    for handler in logging.getLogger("repr_det").handlers:
        if getattr(handler, "stream", None) is not sys.stdout:
            for name, text in warnings:
                handler.handle(logging.LogRecord(name, logging.WARNING, __file__, 0, text, None, None))


def may_continue(args: argparse.Namespace, folder: str) -> bool:
    """``--resume``, or that the job which a launcher starts again has begun the run in ``folder``.

    Rank 0 decides; the others may, whatever they see, and get its decision in ``setup_process``.
    """
    launched = Launched.found()
    return args.resume or (launched is not None and (launched.rank > 0 or job_of(folder) == launched.job))


def _take(args: argparse.Namespace, folder: str) -> None:
    """Rank 0 locks the folder; every rank learns whether it could, and whether the run is resumed."""
    if args.eval_only or not folder:
        return
    trouble = ""
    if comm.is_main_process():
        launched = Launched.found()
        job = "" if launched is None else launched.job
        try:
            _HELD.append(lock_folder(folder, job, _FOR_THE_LAST_TO_END if args.resume else 0.0))
        except UserError as error:
            trouble = str(error)
    trouble, args.resume = comm.all_gather((trouble, args.resume))[0]
    if trouble:
        raise UserError(trouble)


def launch_processes(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, device: str) -> None:
    """Runs ``main(args)`` in this process if a launcher started it, else in the processes that ``args`` asks for."""
    args.early = [(record.name, record.getMessage()) for record in _EARLY.buffer]
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # several CPU processes talk by gloo, also on a machine with GPUs
    launched = Launched.found() if args.num_machines == 1 else None
    if launched is None and args.num_gpus * args.num_machines > 1:
        _launch(main, args)
        return
    if launched is not None:
        end_with_parent()
        if launched.size > 1:
            launched.join(device, args.rendezvous_timeout)
    _run(main, args)


def _launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Detectron2's launch; a signal reaches its processes, and what ends one of them ends all with one line."""
    asked = ""

    def pass_on(number: int, _: object) -> None:
        nonlocal asked
        asked = signal.Signals(number).name
        processes = multiprocessing.active_children()
        if not processes:
            raise Stopped(asked)
        for process in processes:
            os.kill(process.pid, number)

    url, timeout = dist_url(args), timedelta(seconds=args.rendezvous_timeout)
    try:
        with answer_signals(pass_on):
            launch(_run, args.num_gpus, args.num_machines, args.machine_rank, url, (main, args), timeout)
    except ProcessRaisedException as error:
        text = str(error).rstrip()
        if "init_process_group" in text:
            raise nobody_came(url, text.rpartition("\n")[2]) from None
        if not re.search(r"\nrepr_det\.[\w.]+Error: .*$", text):
            raise
        raise UserError(_last_line(error)) from None
    except ProcessExitedException as error:
        if asked or error.exit_code == STATUS:
            raise Stopped(asked or "a signal to one of its processes") from None
        raise UserError(f"{error}, so the run stops; what is saved is untouched: continue with --resume") from None


def _run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Detectron2's processes exit as members of their group, and gloo's threads then abort some of them (SIGABRT). One
    that fails does not leave: its peers may still wait for it."""
    try:
        with answer_signals():
            main(args)
    except Stopped as stopped:
        if dist.is_initialized() and not stopped.together:
            logging.shutdown()
            os._exit(STATUS)  # in the middle of whatever its peers do
        _leave_the_group()
        raise
    finally:
        while _HELD:
            _HELD.pop().release()
    _leave_the_group()


def _leave_the_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _last_line(error: Exception) -> str:
    """The message; of an error from another process, whose message is a traceback, the one that ends it."""
    return re.sub(r"^repr_det\.[\w.]+Error: ", "", str(error).rstrip().rpartition("\n")[2])


def _one_line_for_user_errors(record: logging.LogRecord) -> bool:
    """Detectron2 logs a traceback for whatever ends a run; what a user can act on is one line, printed by run_tool."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, UserError) or advice_for(error))
