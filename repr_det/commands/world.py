"""The processes of one run, whoever starts them: ``--num-gpus`` and ``--num-machines``, torchrun or srun."""

import argparse
import os
import re
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from repr_det.method.errors import UserError

_KEY = "repr_det/meeting"
_TRY_SECONDS = 5
_OF_LAUNCHER = {"torchrun": "--nproc_per_node and --nnodes", "srun": "--ntasks-per-node and --nodes"}


class World(NamedTuple):
    """The numbers of processes of a run: all of them, and those on this machine; and how they are started."""

    size: int
    local_size: int
    started: str


@dataclass(frozen=True)
class Launched:
    """The variables that a launcher, torchrun or srun, gives to a process that it starts.

    Attributes:
        by: the launcher.
        local_size: processes on this machine; 0 if their number is not the same on all.
        job: its job, the same after a restart; "" if rank 0 cannot be sure of that.
    """

    by: str
    rank: int
    local_rank: int
    size: int
    local_size: int
    job: str

    @classmethod
    def found(cls) -> "Launched | None":
        """None in a process that no launcher started."""
        if "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
            numbers = (int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
            job = os.environ["TORCHELASTIC_RUN_ID"]
            if job == "none":  # torchrun's default; then the agent itself is the job
                job = f"{socket.gethostname()} {os.getppid()}"
            return cls("torchrun", *numbers, job)
        size = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        if not size.isdigit() or int(size) < 2:
            return None
        here = re.fullmatch(r"(\d+)(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", size))
        rank, local_rank = (int(os.environ[key]) for key in ("SLURM_PROCID", "SLURM_LOCALID"))
        job = f"slurm {os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"
        return cls("srun", rank, local_rank, int(size), int(here.group(1)) if here else 0, job)

    def join(self, device: str, seconds: float = DEFAULT_TIMEOUT.total_seconds()) -> None:
        """Makes the process group, by torch's own variables of the environment.

        Raises:
            UserError: the others did not come within ``seconds``.
        """
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.local_rank)
        if self.by == "srun":
            first = re.match(r"([^,\[]+)\[?(\d*)", os.environ.get("SLURM_STEP_NODELIST", "localhost"))
            os.environ.setdefault("MASTER_ADDR", "".join(first.groups()) if first else "localhost")
            os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
            os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(self.size), "LOCAL_RANK": str(self.local_rank)}
        timeout = timedelta(seconds=seconds)
        try:
            # The board must live until all have met: on rank 0 it may be the server that the others read.
            board, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            store = _store_of_this_start(board, rank, timeout) if self.by == "torchrun" else board
            backend = "nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        except (RuntimeError, ValueError, OSError) as error:  # torch's own are RuntimeErrors
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise nobody_came(where, str(error)) from error
        comm.create_local_process_group(self.local_size)
        comm.synchronize()


def _store_of_this_start(board: dist.Store, rank: int, timeout: timedelta) -> dist.Store:
    """A store that rank 0 opens anew; ``board`` only tells where.

    torchrun's agents share one store over all restarts, with the addresses that dead processes have written there, and
    count restarts each by itself: nothing in their environment names this start for all.
    """
    host, deadline = os.environ["MASTER_ADDR"], time.monotonic() + timeout.total_seconds()
    if rank == 0:
        name = uuid.uuid4().hex
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        store.set(_KEY, name)
        board.set(_KEY, f"{store.port} {name}")
        return store
    while True:
        port, name = board.get(_KEY).decode().split()
        try:
            store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=_TRY_SECONDS))
            if store.get(_KEY).decode() == name:
                store.set_timeout(timeout)
                return store
        except RuntimeError:  # it was that of a rank 0 that is gone
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def nobody_came(address: str, reason: str) -> UserError:
    """The error of a process that does not find the others at ``address``."""
    return UserError(
        f"the processes of this run did not meet at {address} ({reason.splitlines()[0]}): start all of them, with the "
        "same address, a port that is free and a host that each can reach"
    )


def dist_url(args: argparse.Namespace) -> str:
    """``--dist-url``; "auto" if it is not given, for Detectron2's default is the same port for all runs of a user."""
    default = default_argument_parser().get_default("dist_url")
    return "auto" if args.dist_url == default else args.dist_url


def check_processes(args: argparse.Namespace) -> World:
    """Returns the processes that ``args`` or a launcher ask for.

    Raises:
        UserError: naming the option.
    """
    launched = Launched.found() if args.num_machines == 1 or "TORCHELASTIC_RUN_ID" in os.environ else None
    if launched is None:
        _check_options(args)
        started = f"--num-gpus {args.num_gpus}"
        if args.num_machines > 1:
            started += f" --num-machines {args.num_machines}"
        return World(args.num_gpus * args.num_machines, args.num_gpus, started)
    usual = {"num-gpus": 1, "num-machines": 1, "machine-rank": 0}
    options = {name: getattr(args, name.replace("-", "_")) for name in usual}
    if given := " ".join(f"--{name} {value}" for name, value in options.items() if value != usual[name]):
        raise UserError(
            f"{given} beside {launched.by}, which starts the processes: leave it out and give {launched.by} "
            f"{_OF_LAUNCHER[launched.by]}"
        )
    if launched.local_size == 0 or launched.size % launched.local_size:
        raise UserError(
            f"every machine must start as many processes, and this run has {launched.size} ({launched.by} with "
            f"{launched.local_size or 'other numbers'} on this machine)"
        )
    return World(launched.size, launched.local_size, f"{launched.by} with {launched.local_size} on this machine")


def _check_options(args: argparse.Namespace) -> None:
    for name in ("num_gpus", "num_machines"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(f"--machine-rank must be in 0 ... {args.num_machines - 1}, got {args.machine_rank}")
    url = dist_url(args)
    if args.num_machines > 1 and url == "auto":
        raise UserError(
            f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT with the name or address of machine "
            "0, the same on every machine"
        )
    if args.num_gpus * args.num_machines > 1 and not re.fullmatch(r"auto|file://.+|tcp://.+:\d+", url):
        raise UserError(f"--dist-url must be tcp://HOST:PORT, file:///PATH or auto, got {url!r}")


def refuse_torchrun(tool: str) -> None:
    """Raises UserError if a tool that starts runs itself was started several times."""
    if (launched := Launched.found()) is not None:
        raise UserError(f"{tool} starts its runs itself: call it without {launched.by} (--num-gpus N for each run)")
