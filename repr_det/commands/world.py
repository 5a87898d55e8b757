"""The processes of one run, whoever starts them: ``--num-gpus`` and ``--num-machines``, or torchrun."""

import argparse
import os
import re
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.engine.launch import DEFAULT_TIMEOUT, _find_free_port
from detectron2.utils import comm

from repr_det.detectron.config import scale_to_world
from repr_det.method.errors import UserError

_KEY = "repr_det/meeting"


@dataclass(frozen=True)
class World:
    """The processes of one run.

    Attributes:
        size: all processes.
        local_size: those on this machine.
        started: how, in the user's words.
    """

    size: int
    local_size: int
    started: str


@dataclass(frozen=True)
class Torchrun:
    """What torchrun tells a process that it starts.

    Attributes:
        job: the elastic job, the same after a restart; "" where rank 0 cannot be sure of that.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int
    job: str

    @classmethod
    def found(cls) -> "Torchrun | None":
        """None in a process that torchrun did not start."""
        if "TORCHELASTIC_RUN_ID" not in os.environ or "LOCAL_WORLD_SIZE" not in os.environ:
            return None
        numbers = (int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        run_id = os.environ["TORCHELASTIC_RUN_ID"]
        if run_id == "none":  # torchrun's default; then the agent itself is the job
            run_id = f"{socket.gethostname()} {os.getppid()}"
        return cls(*numbers, job=run_id)


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """What Detectron2's parser lacks."""
    parser.add_argument(
        "--rendezvous-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long the processes of a run wait for each other at its start (default 60)",
    )


def check_processes(args: argparse.Namespace, cfg: CfgNode, stated_norms: Any) -> World:
    """The processes that ``args`` and torchrun ask for fit together and fit the run.

    Args:
        cfg: of the run; of a LazyConfig what ``repr_cfg_from_lazy`` makes of it.
        stated_norms: the part of the config that names the model's norms, as nested mappings and lists.

    Raises:
        UserError: naming the option or variable.
    """
    torchrun = Torchrun.found()
    _check_options(args, torchrun)
    if torchrun is not None:
        started = f"torchrun with {torchrun.local_size} on this machine"
        world = World(torchrun.size, torchrun.local_size, started)
    else:
        started = f"--num-gpus {args.num_gpus}" + (f" --num-machines {args.num_machines}" * (args.num_machines > 1))
        world = World(args.num_gpus * args.num_machines, args.num_gpus, started)
    if world.size < 2:
        return world
    if world.size % world.local_size:
        raise UserError(f"every machine must start as many processes: {world.size} in all, {world.local_size} here")
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    if on_gpu and torch.cuda.device_count() < world.local_size:
        raise UserError(
            f"{started}, but torch sees {torch.cuda.device_count()} GPU(s) here: start one process for each, or add "
            "MODEL.DEVICE cpu"
        )
    batch = scale_to_world(cfg, world.size).SOLVER.IMS_PER_BATCH
    if not args.eval_only and batch % world.size:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {batch} must be a multiple of the {world.size} processes of this run ({started}): "
            f"such as {max(1, batch // world.size) * world.size}"
        )
    if not on_gpu and (key := _first_sync_bn(stated_norms)):
        raise UserError(f"{key} SyncBN needs GPUs, and this run has {world.size} processes on the CPU: use naiveSyncBN")
    return world


def _check_options(args: argparse.Namespace, torchrun: Torchrun | None) -> None:
    if torchrun is not None:
        given = [f"--{name} {value}" for name, value in _started_by_options(args).items()]
        if given:
            raise UserError(
                f"{' '.join(given)} beside torchrun, which starts the processes: leave it out and give torchrun "
                "--nproc_per_node and --nnodes"
            )
        return
    for name in ("num_gpus", "num_machines"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(f"--machine-rank must be in 0 ... {args.num_machines - 1}, got {args.machine_rank}")
    refuse_srun(args.num_machines)
    default = default_argument_parser().get_default("dist_url")
    if args.num_machines > 1 and args.dist_url in (default, "auto"):
        raise UserError(
            f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT with the name or address of machine "
            "0, the same on every machine"
        )
    if args.num_gpus * args.num_machines > 1 and not re.fullmatch(r"auto|file://.+|tcp://.+:\d+", args.dist_url):
        raise UserError(f"--dist-url must be tcp://HOST:PORT, file:///PATH or auto, got {args.dist_url!r}")


def _started_by_options(args: argparse.Namespace) -> dict[str, int]:
    words = {"num-gpus": args.num_gpus, "num-machines": args.num_machines, "machine-rank": args.machine_rank}
    return {name: value for name, value in words.items() if value != (0 if name == "machine-rank" else 1)}


def refuse_srun(num_machines: int = 1) -> None:
    """Raises UserError where srun started this command several times: each would train alone."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if num_machines == 1 and tasks.isdigit() and int(tasks) > 1:
        nodes = os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES", "1"))
        raise UserError(
            f"srun started this command {tasks} times: start one task a node (srun --ntasks-per-node=1) of torchrun "
            f"--nnodes {nodes} --nproc_per_node N --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id "
            "$SLURM_JOB_ID with this command behind it, as examples/slurm.sbatch does"
        )


def refuse_torchrun(tool: str) -> None:
    """Raises UserError where a tool that starts runs itself was started several times."""
    if Torchrun.found() is not None:
        raise UserError(f"{tool} starts its runs itself: call it without torchrun (--num-gpus N for each run)")


def _first_sync_bn(node: Any, path: str = "MODEL") -> str:
    """The key below which "SyncBN" stands, "" where there is none."""
    if isinstance(node, str):
        return path if node == "SyncBN" else ""
    if hasattr(node, "items"):
        inside = [(f"{path}.{key}", value) for key, value in node.items()]
    elif isinstance(node, (list, tuple)):
        inside = [(path, value) for value in node]
    else:
        return ""
    return next((found for name, value in inside if (found := _first_sync_bn(value, name))), "")


def join_torchrun(torchrun: Torchrun, device: str, seconds: float) -> None:
    """Makes the process group of a process that torchrun started.

    The elastic agent's store outlives a restart, and with it what dead ranks have written there. So it only tells where
    the store of this attempt is, which rank 0 opens anew.

    Raises:
        UserError: the others did not come within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        board, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        store = _own_store(board, torchrun, deadline)
        _wait_for_all(store, torchrun.rank, torchrun.size, deadline)
    except _DISTRIBUTED_ERRORS as error:
        raise _nobody_came(torchrun.size, address, seconds, error) from error
    _make_groups(store, torchrun.rank, torchrun.size, torchrun.local_rank, torchrun.local_size, device)


def join_by_options(local_rank: int, args: argparse.Namespace, url: str, device: str) -> None:
    """Makes the process group of a process that ``--num-gpus`` started; see ``join_torchrun``."""
    size, rank = args.num_gpus * args.num_machines, args.machine_rank * args.num_gpus + local_rank
    seconds = args.rendezvous_timeout
    deadline = time.monotonic() + seconds
    try:
        store, _, _ = next(dist.rendezvous(url, rank, size, timeout=timedelta(seconds=seconds)))
        _wait_for_all(store, rank, size, deadline)
    except _DISTRIBUTED_ERRORS as error:
        raise _nobody_came(size, url, seconds, error) from error
    _make_groups(store, rank, size, local_rank, args.num_gpus, device)


_DISTRIBUTED_ERRORS = (RuntimeError, ValueError, OSError)  # torch's own are RuntimeErrors


def url_of(args: argparse.Namespace) -> str:
    """``--dist-url``, with a free port for "auto" and where it is not given: Detectron2's default is the same port for
    all runs of a user."""
    default = default_argument_parser().get_default("dist_url")
    return f"tcp://127.0.0.1:{_find_free_port()}" if args.dist_url in ("auto", default) else args.dist_url


def _own_store(board: dist.Store, torchrun: Torchrun, deadline: float) -> dist.Store:
    host = os.environ["MASTER_ADDR"]
    if torchrun.rank == 0:
        name = uuid.uuid4().hex
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_left(deadline))
        store.set(_KEY, name)
        board.set(_KEY, f"{store.port} {name}")
        return store
    while True:
        board.wait([_KEY], _left(deadline))
        port, name = board.get(_KEY).decode().split()
        try:
            store = dist.TCPStore(host, int(port), is_master=False, timeout=min(_left(deadline), timedelta(seconds=5)))
            if store.get(_KEY).decode() == name:
                return store
        except RuntimeError:  # of a rank 0 that is gone
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _wait_for_all(store: dist.Store, rank: int, size: int, deadline: float) -> None:
    store.set(f"{_KEY}/{rank}", "here")
    keys = [f"{_KEY}/{other}" for other in range(size)]
    try:
        store.wait(keys, _left(deadline))
    except RuntimeError as error:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(f"rank(s) {', '.join(map(str, missing))} did not come") from error


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(0.1, deadline - time.monotonic()))


def _nobody_came(size: int, address: str, seconds: float, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    host = urlparse(address if "://" in address else f"tcp://{address}").hostname
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return UserError(f"{address} is in use, by another run perhaps: give --dist-url another port, or auto")
    return UserError(
        f"the {size} processes of this run did not meet at {address} within {seconds:g} s ({reason}): start all of "
        f"them, with the same address, and see that {host} can be reached; --rendezvous-timeout waits longer"
    )


def _make_groups(store: dist.Store, rank: int, size: int, local_rank: int, local_size: int, device: str) -> None:
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(local_rank)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(local_size)
    comm.synchronize()
