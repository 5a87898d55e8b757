"""What is refused before processes are started or meet, who may continue a run, and one run at a time in a folder."""

import argparse
import errno
import os
import signal
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import forked
import pytest
import torch
from conftest import refused
from detectron2.engine import HookBase
from small_loop import small_trainer

from repr_det import Trainer
from repr_det.commands import processes
from repr_det.commands.arguments import train_argument_parser
from repr_det.commands.checks import check_run
from repr_det.commands.processes import check_processes, join_torchrun, refuse_launchers
from repr_det.runs.lock import agents_of, lock_folder
from repr_det.runs.stopping import NOTICE, STATUS, StopAtSignal, Stopped, answer_signals

TORCHRUN = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
TORCHRUN |= dict(MASTER_PORT="1", TORCHELASTIC_RUN_ID="job")
SRUN = dict(SLURM_STEP_NUM_TASKS="4")


@pytest.fixture
def start_by(monkeypatch):
    """``start_by(variables, KEY=value)`` -> this process looks as if a launcher with these variables had started it."""
    return lambda variables, **changed: [monkeypatch.setenv(*pair) for pair in (variables | changed).items()]


def processes_of(cfg, words=""):
    processes = check_processes(train_argument_parser().parse_args(words.split()))
    check_run(cfg, False, False, *processes)
    return processes


@pytest.mark.parametrize(
    ("launcher", "words", "opts", "message"),
    [
        (TORCHRUN, "--num-gpus 2", "", "torchrun takes --nproc_per_node and --nnodes: leave out --num-gpus"),
        (TORCHRUN | {"WORLD_SIZE": "3"}, "", "", "2 of 3 processes are here: start as many on every machine"),
        (SRUN, "", "", "srun starts 4 runs here: for one, srun torchrun --nnodes ... --nproc_per_node ..."),
        ({}, "--num-machines 2", "", "--num-machines 2 needs --dist-url tcp://HOST:PORT"),
        ({}, "--num-machines 2 --machine-rank 2", "", "--machine-rank must be in 0 ... 1, got 2"),
        ({}, "--num-machines 0", "", "--num-machines must be at least 1, got 0"),
        ({}, "--num-gpus 3", "", "SOLVER.IMS_PER_BATCH 2 must be a multiple of 3 processes, such as 3"),
        (SRUN, "--num-machines 2 --dist-url tcp://a:1 --num-gpus 2", "SOLVER.IMS_PER_BATCH 6", "of 4 processes"),
        (TORCHRUN, "", "MODEL.RESNETS.NORM SyncBN", "stem.conv1.norm is SyncBN, which needs GPUs"),
    ],
)
def test_refused(tiny_cfg, start_by, launcher, words, opts, message):
    start_by(launcher)
    assert message in refused(processes_of, tiny_cfg(*opts.split()), words)


def test_processes(tiny_cfg, start_by):
    start_by({}, CUDA_VISIBLE_DEVICES="0")
    processes.launch_processes(print, train_argument_parser().parse_args([]), "cpu:0")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert processes_of(tiny_cfg("MODEL.RESNETS.NORM", "SyncBN")) == (1, 1)
    refuse_launchers("compare.py")
    start_by(TORCHRUN, WORLD_SIZE="4", SLURM_STEP_NUM_TASKS="2")
    assert processes_of(tiny_cfg("SOLVER.IMS_PER_BATCH", 4)) == (2, 2)
    assert processes_of(tiny_cfg("SOLVER.IMS_PER_BATCH", 3, "SOLVER.REFERENCE_WORLD_SIZE", 1)) == (2, 2)  # 12 images
    assert "compare.py starts its runs itself" in refused(refuse_launchers, "compare.py")


def test_the_board_lives_until_all_have_met(monkeypatch, start_by):
    """Rank 0 may be its server, and others read later what rank 0 wrote there."""
    start_by(TORCHRUN, RANK="0")
    boards = [torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    port, read = boards[0].port, []

    def meet(*_, **__):
        yield boards.pop(), 0, 2

    def read_as_another_rank(*_, **__):
        board = torch.distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5))
        read.append(board.get("repr_det/meeting"))

    monkeypatch.setattr(torch.distributed, "rendezvous", meet)
    monkeypatch.setattr(torch.distributed, "init_process_group", read_as_another_rank)
    monkeypatch.setattr("repr_det.commands.processes.comm", Mock())
    join_torchrun("cpu", 5)
    assert read


def test_who_may_continue(start_by, tmp_path, monkeypatch):
    """The run of a folder is that of torchrun's agents that took part in it, also if rank 0 is now that of another one;
    a later job of the same name is another one."""

    def resumes(*agents, resume=False):
        args = argparse.Namespace(resume=resume, eval_only=False)
        monkeypatch.setattr(processes.comm, "all_gather", lambda mine: agents if mine == "" else [mine])
        with processes._AT_THE_END:
            processes._take(args, str(tmp_path))
        return args.resume

    assert not resumes("a 1", "b 1")
    (tmp_path / "last_checkpoint").write_text("model.pth")
    assert resumes("c 1", "b 1") and resumes("c 1")
    for others in (["a 1"], ["c 2"], [""]):
        assert "holds another run (last_checkpoint): add --resume" in refused(resumes, *others)
    assert resumes("c 1") and resumes("d 1", resume=True) and resumes("d 1")
    flags = [argparse.Namespace(resume=False, eval_only=eval_only) for eval_only in (False, True)]
    assert list(map(processes.may_continue, flags)) == [False, False]
    start_by(TORCHRUN)
    assert list(map(processes.may_continue, flags)) == [True, False]  # every rank evaluates the same weights


def hold(folder, held):
    _lock = lock_folder(folder)
    if os.fork() == 0:  # as a loader worker does
        time.sleep(60)
        os._exit(0)
    Path(held).touch()
    time.sleep(60)


def test_a_killed_run_leaves_no_lock(tmp_path):
    holder = forked.Command(["test_world:hold", tmp_path, tmp_path / "held"], tmp_path / "log")
    forked.wait_until((tmp_path / "held").exists)
    assert f"OUTPUT_DIR {tmp_path} is being trained by another process (" in refused(lock_folder, tmp_path)
    holder.kill()
    lock_folder(tmp_path, wait=1).release()


@pytest.mark.parametrize(
    ("iteration", "where", "saved", "last"),
    [
        (3, "before_step", [3], 3),
        (5, "before_step", [], 5),  # the periodic checkpoint of iteration 5 is there
        (5, "after_step", [], 5),  # in an evaluation after it
        (4, "after_step", [5], 5),  # in an evaluation after no checkpoint: with the next step
        (0, "before_train", [], 0),
        (9, "before_step", [], 10),  # the last one: the final checkpoint is there, the evaluation is left out
        (10, "after_train", [], 10),  # in the evaluation after the last step
    ],
)
def test_signals(iteration, where, saved, last):
    number = {3: signal.SIGUSR1, 4: signal.SIGINT}.get(iteration, signal.SIGTERM)
    trainer, prepared = small_trainer(steps=10), []
    trainer.iter, trainer.checkpointer = 0, Mock()
    trainer.cfg = SimpleNamespace(SOLVER=SimpleNamespace(CHECKPOINT_PERIOD=3 if iteration == 5 else 100))
    stop = StopAtSignal(lambda: prepared.append(trainer.iter))
    sender = HookBase()
    setattr(sender, where, lambda: trainer.iter == iteration and os.kill(os.getpid(), number))
    trainer.register_hooks([stop, sender])
    if where == "before_step":
        trainer._hooks.reverse()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, answer_signals():
        trainer.train(0, 10)
    assert stopped.value.code == STATUS == 75 and stopped.value.asked == signal.Signals(number).name
    assert trainer.checkpointer.save.call_args_list == [call(f"model_{i:07d}", iteration=i) for i in saved]
    assert prepared == saved and trainer.iter == last
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    """Not a copy of the first, nor another SIGTERM. A background job of a shell ignores both."""
    sent, asked = [(signal.SIGINT, 5.0), (signal.SIGINT, 5.5), (signal.SIGTERM, 8.0), (signal.SIGINT, 9.0)], []
    monkeypatch.setattr("repr_det.runs.stopping.time", Mock(monotonic=Mock(side_effect=[at for _, at in sent])))
    for handler in (signal.SIG_IGN, signal.default_int_handler):
        signal.signal(signal.SIGINT, handler)
        with nullcontext() if handler is signal.SIG_IGN else pytest.raises(Stopped), answer_signals():
            NOTICE.unsaved = True
            for number, _ in sent[: 2 if handler is signal.SIG_IGN else 4]:
                os.kill(os.getpid(), number)
                asked.append(NOTICE.asked)
    assert asked == ["", "", "SIGINT", "SIGINT", "SIGTERM"]


def test_loader_workers_are_kept_out():
    with answer_signals():
        child = os.fork()
        if child == 0:
            alone = os.getpgid(0) == os.getpid() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            os._exit(0 if alone else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_folder_that_not_every_machine_sees(tiny_cfg, monkeypatch):
    trainer = Trainer(tiny_cfg())
    monkeypatch.setattr("repr_det.detectron.engine.comm.all_gather", lambda mine: ["model_0000009.pth", mine])
    message = "model_0000009.pth for rank 0 and none for others; copy rank 0's folder"
    assert message in refused(trainer.resume_or_load, resume=True)


def test_a_file_system_without_locks_still_knows_the_agents(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("filelock.FileLock.acquire", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    lock_folder(tmp_path, ["host 1"])
    assert "cannot be locked (No locks available)" in caplog.text
    assert agents_of(tmp_path) == {"host 1"}
