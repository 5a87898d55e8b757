"""The processes of a tool: how it ends, how a run is set up in each, how several are launched."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from repr_det.detectron.config import without_repr
from repr_det.method.errors import UserError
from repr_det.runs.files import disk_is_full, write_atomically

STOCK_CONFIG_FILE = "config_detectron2.yaml"


def run_tool(main: Callable[[], Any]) -> None:
    """Runs a tool; a UserError or a full disk ends it with one line on stderr and status 2."""
    try:
        main()
        return
    except UserError as error:
        what = _last_line(error)
    except OSError as error:
        if not disk_is_full(error):
            raise
        what = f"{error}: free space; a run goes on with --resume"
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {what}\n")
    sys.exit(2)


def setup(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Detectron2's default_setup (log files, config.yaml, seeds), and the config that stock tools can read."""
    setup_process(args, cfg, str(cfg.MODEL.DEVICE), cfg.OUTPUT_DIR)
    if comm.is_main_process() and cfg.OUTPUT_DIR:
        write_atomically(Path(cfg.OUTPUT_DIR) / STOCK_CONFIG_FILE, without_repr(cfg).dump())


def setup_process(args: argparse.Namespace, cfg: Any, device: str, folder: str) -> None:
    """Threads, logs and seeds of one process of a run, for a yaml config or a LazyConfig."""
    if device == "cpu" and comm.get_world_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Every process would take all cores for itself, and they would wait for each other most of the time.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.get_local_size()))
    default_setup(cfg, args)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_one_line_for_user_errors)
    setup_logger(folder, distributed_rank=comm.get_rank(), name="repr_det", abbrev_name="repr")


def launch_processes(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, device: str) -> None:
    """Runs ``main(args)`` in the processes that ``args`` asks for."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # several CPU processes talk by gloo, also on a machine with GPUs
    try:
        processes = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
        launch(_run_and_leave_the_group, *processes, args=(main, args))
    except ProcessRaisedException as error:
        if not re.search(r"\nrepr_det\.[\w.]+Error: .*$", str(error).rstrip()):
            raise
        raise UserError(_last_line(error)) from None
    except ProcessExitedException as error:
        raise UserError(f"{error}, so the run stops; what is saved is untouched: continue with --resume") from None


def _run_and_leave_the_group(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Detectron2's processes exit as members of their group, and gloo's threads then abort some of them (SIGABRT). One
    that fails does not leave: its peers may still wait for it."""
    main(args)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _last_line(error: Exception) -> str:
    """The message; of an error from another process, whose message is a traceback, the one that ends it."""
    return re.sub(r"^repr_det\.[\w.]+Error: ", "", str(error).rstrip().rpartition("\n")[2])


def _one_line_for_user_errors(record: logging.LogRecord) -> bool:
    """Detectron2 logs a traceback for whatever ends a run; what a user can act on is one line, printed by run_tool."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, UserError) or disk_is_full(error))
