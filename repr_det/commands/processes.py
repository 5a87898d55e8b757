"""The processes of a run, by Detectron2's launch or torchrun: how they meet, begin and end."""

import argparse
import contextlib
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
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
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from repr_det.commands.arguments import refuse_below
from repr_det.detectron.config import without_repr
from repr_det.method.errors import UserError
from repr_det.runs.files import advice_for, cause_of, refuse_used, write_atomically
from repr_det.runs.lock import agents_of, lock_folder
from repr_det.runs.record import CONFIG_FILE
from repr_det.runs.stopping import NOTICE, STATUS, Stopped, answer_signals, end_with_parent

Main = Callable[[argparse.Namespace], Any]
STOCK_CONFIG_FILE = "config_detectron2.yaml"
_KEY = "repr_det/meeting"
_FOR_THE_FIRST_TO_SPEAK = 5.0  # seconds
_FOR_THE_LAST_TO_END = 30.0  # seconds; it may be saving
_USER_ERROR = re.compile(r"^repr_det\.[\w.]+Error: ")  # how a traceback ends
_AT_THE_END = contextlib.ExitStack()
_EARLY = MemoryHandler(1000, flushLevel=logging.CRITICAL + 1)  # before a run has a log
_EARLY.setLevel(logging.WARNING)


def torchrun_agent() -> str:
    """The torchrun that started this process, the same after a restart; "" without."""
    return f"{socket.gethostname()} {os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else ""


def _of_torchrun(key: str, otherwise: int) -> int:
    return int(os.environ[key]) if torchrun_agent() else otherwise


def join_torchrun(device: str, seconds: float) -> None:
    """Makes the group of torchrun's processes; UserError if some do not come within ``seconds``."""
    on_gpu, timeout = torch.device(device).type == "cuda", timedelta(seconds=seconds)
    if on_gpu:
        torch.cuda.set_device(_of_torchrun("LOCAL_RANK", 0))
    try:
        # Keep the board until all have met: rank 0's may be the server.
        board, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store, backend = _store_of_this_start(board, rank, timeout), "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:  # torch's own are RuntimeErrors
        raise _nobody_came(f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error)) from error
    comm.create_local_process_group(_of_torchrun("LOCAL_WORLD_SIZE", 1))
    comm.synchronize()


def _store_of_this_start(board: dist.Store, rank: int, timeout: timedelta) -> dist.Store:
    """Rank 0 opens a new store and announces it on ``board``. torchrun's agents share ``board`` over all restarts: it
    also holds addresses of dead processes."""
    host, deadline = os.environ["MASTER_ADDR"], time.monotonic() + timeout.total_seconds()
    if rank == 0:
        name = uuid.uuid4().hex
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        store.set(name, "here")
        board.set(_KEY, f"{store.port} {name}")
        return store
    while True:
        port, name = board.get(_KEY).decode().split()
        try:
            store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=5))
            store.get(name)
            store.set_timeout(timeout)
            return store
        except RuntimeError:  # of a rank 0 that is gone
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _nobody_came(address: str, reason: str) -> UserError:
    return UserError(
        f"the processes of this run did not meet at {address} ({reason.splitlines()[0]}): start all with the same "
        "address, of a free port and a host that each can reach"
    )


def check_processes(args: argparse.Namespace) -> tuple[int, int]:
    """Returns the numbers of processes here and of machines; UserError if an option is wrong."""
    if torchrun_agent():
        size, here = _of_torchrun("WORLD_SIZE", 1), _of_torchrun("LOCAL_WORLD_SIZE", 1)
        if (args.num_gpus, args.num_machines, args.machine_rank) != (1, 1, 0):
            raise UserError("torchrun takes --nproc_per_node and --nnodes: leave out --num-gpus and --num-machines")
        if size % here:
            raise UserError(f"{here} of {size} processes are here: start as many on every machine")
        return here, size // here
    if args.num_machines == 1:
        refuse_srun()
    refuse_below(args, num_gpus=1, num_machines=1)
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(f"--machine-rank must be in 0 ... {args.num_machines - 1}, got {args.machine_rank}")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError(f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT, HOST being machine 0")
    return args.num_gpus, args.num_machines


def refuse_srun() -> None:
    """Raises UserError in one of several tasks of srun."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if int(tasks) > 1:
        raise UserError(f"srun starts {tasks} runs here: for one, srun torchrun --nnodes ... --nproc_per_node ...")


def refuse_launchers(tool: str) -> None:
    """Raises UserError if a tool that starts runs was started several times."""
    if torchrun_agent():
        raise UserError(f"{tool} starts its runs itself: call it without torchrun")
    refuse_srun()


def run_tool(main: Callable[[], Any]) -> None:
    """Runs a tool: status 2 and one line for a UserError or a fault of the machine, 75 for a signal."""
    if _of_torchrun("RANK", 0) == 0:
        logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger().addHandler(_EARLY)
    try:
        with _advising():
            main()
        return
    except UserError as error:
        what = _USER_ERROR.sub("", str(error).rstrip().rpartition("\n")[2])  # of a loader's worker: a traceback
    except Stopped as stopped:
        if _of_torchrun("RANK", 0) == 0:
            _say(f"stopped by {stopped.asked} with status {STATUS}; the same command with --resume continues")
        raise
    if _of_torchrun("LOCAL_RANK", 0) > 0:
        # When the first has said it, torchrun ends this one.
        time.sleep(_FOR_THE_FIRST_TO_SPEAK)
    _say(f"error: {what}")
    sys.exit(2)


@contextlib.contextmanager
def _advising() -> Iterator[None]:
    """Makes a fault of the machine a UserError that says what to do."""
    try:
        yield
    except (OSError, RuntimeError, EOFError) as error:
        if not (advice := advice_for(error)):
            raise
        text = str(cause_of(error)).split(". ")[0] or "a loader worker could not hand over its images"
        raise UserError(f"{text}: {advice}; a run goes on with --resume") from error


def _say(line: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


def write_configs(cfg: CfgNode, folder: Path) -> None:
    """Writes config.yaml, and one for stock tools."""
    write_atomically(folder / CONFIG_FILE, cfg.dump())
    write_atomically(folder / STOCK_CONFIG_FILE, without_repr(cfg).dump())


def setup_process(args: argparse.Namespace, cfg: CfgNode, config: str) -> None:
    """Detectron2's ``default_setup`` with a lock and threads; ``runs.record`` writes config.yaml. ``args.resume``
    becomes that of rank 0. UserError if another process trains in OUTPUT_DIR."""
    folder, rank = cfg.OUTPUT_DIR, comm.get_rank()
    if not args.eval_only:
        _take(args, folder)
    on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
    if on_cpu and comm.get_world_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Every process would take all cores, and they would wait for each other.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.get_local_size()))
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
    if precision := cfg.get("FLOAT32_PRECISION"):  # Detectron2 reads it, and does not define it
        torch.set_float32_matmul_precision(precision)
    if not args.eval_only:  # too slow for small validation sets
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def _log_early_warnings(warnings: list[tuple[str, str]]) -> None:
    """Writes warnings that are on the terminal into the log."""
    logging.getLogger().removeHandler(_EARLY)
    for handler in logging.getLogger("repr_det").handlers:
        if getattr(handler, "stream", None) is not sys.stdout:
            for name, text in warnings:
                handler.handle(logging.LogRecord(name, logging.WARNING, __file__, 0, text, None, None))


def _one_line_for_user_errors(record: logging.LogRecord) -> bool:
    """Drops Detectron2's traceback of an error that run_tool reports in one line."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, UserError) or advice_for(error))


def may_continue(args: argparse.Namespace) -> bool:
    """Tells whether --resume is given, or torchrun may have started a run again, which ``setup_process`` finds out."""
    return args.resume or (torchrun_agent() != "" and not args.eval_only)


def _take(args: argparse.Namespace, folder: str) -> None:
    """Rank 0 locks the folder and tells all ranks whether it could, and whether the run resumes. It does with --resume,
    or if any of its agents of torchrun was in the run before: rank 0 may belong to one that has joined since."""
    agents, trouble = [agent for agent in comm.all_gather(torchrun_agent()) if agent], ""
    if comm.is_main_process():
        try:
            args.resume = args.resume or not agents_of(folder).isdisjoint(agents)
            if not args.resume:
                refuse_used(folder, "add --resume")
            lock = lock_folder(folder, agents, _FOR_THE_LAST_TO_END if args.resume else 0.0)
            _AT_THE_END.callback(lock.release)
        except UserError as error:
            trouble = str(error)
    trouble, args.resume = comm.all_gather((trouble, args.resume))[0]
    if trouble:
        raise UserError(trouble)


def launch_processes(main: Main, args: argparse.Namespace, device: str) -> None:
    """Runs ``main(args)`` in this process of torchrun, or in those that ``args`` asks for."""
    args.early = [(record.name, record.getMessage()) for record in _EARLY.buffer]
    if torch.device(device).type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # several CPU processes talk by gloo
    if args.num_gpus * args.num_machines > 1:
        _launch(main, args)
        return
    if torchrun_agent():
        end_with_parent()
    if _of_torchrun("WORLD_SIZE", 1) > 1:
        join_torchrun(device, args.rendezvous_timeout)
    _run(main, args)


def _launch(main: Main, args: argparse.Namespace) -> None:
    """Detectron2's launch; signals reach all processes, and an error of one ends all with one line."""
    timeout = timedelta(seconds=args.rendezvous_timeout)
    try:
        with answer_signals(_pass_on):
            launch(_run, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (main, args), timeout)
            if NOTICE.asked:  # torch hides that Ctrl-C ended a process
                raise Stopped(NOTICE.asked)
    except ProcessRaisedException as error:
        last = str(error).rstrip().rpartition("\n")[2]
        if "init_process_group" in str(error):
            raise _nobody_came(args.dist_url, last) from None
        if not _USER_ERROR.match(last):
            raise
        raise UserError(_USER_ERROR.sub("", last)) from None
    except ProcessExitedException as error:
        if NOTICE.asked or error.exit_code == STATUS:
            raise Stopped(NOTICE.asked or "a signal to one of its processes") from None
        raise UserError(f"{error}, so the run stops; continue it with --resume") from None


def _pass_on(number: int, _: object) -> None:
    NOTICE.asked = signal.Signals(number).name
    processes = multiprocessing.active_children()
    if not processes:
        raise Stopped(NOTICE.asked)
    for process in processes:
        os.kill(process.pid, number)


def _run(main: Main, args: argparse.Namespace) -> None:
    """Runs ``main`` and leaves the process group, or gloo's threads would abort some processes. After a failure it does
    not leave: peers may wait."""
    try:
        with _AT_THE_END, answer_signals(), _advising():
            main(args)
    except Stopped as stopped:
        if dist.is_initialized() and not stopped.together:
            logging.shutdown()
            os._exit(STATUS)  # in the middle of whatever its peers do
        _leave_the_group()
        raise
    _leave_the_group()


def _leave_the_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
