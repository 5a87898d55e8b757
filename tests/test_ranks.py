"""Two gloo processes of a plain loop: rank 0 decides, whatever the others would have chosen."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_weights

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks saw, of seeds of their own."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    files = [folder / f"{rank}.pt" for rank in (0, 1)]
    processes = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), port, str(file)], env=environment)
        for rank, file in enumerate(files)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(file, weights_only=True) for file in files]


def test_who_takes_part_is_what_all_ranks_have_shown(ranks):
    """The third conv predicts on rank 1."""
    assert [found["layers"] for found in ranks] == [["first", "second"]] * 2


def test_masks_are_those_of_rank_0(ranks):
    assert ranks[0]["dropped"] == ranks[1]["dropped"] == ranks[0]["restored"] == ranks[1]["restored"]
    assert sum(map(len, ranks[0]["dropped"].values())) == 9


def test_new_filters_and_statistics_are_those_of_rank_0(ranks):
    assert_same_weights(ranks[0]["before"], ranks[1]["before"])
    assert_same_weights(ranks[0]["after"], ranks[1]["after"])
    rows = ranks[0]["dropped"]["first"]
    for key in ("first.weight", "norm.running_mean", "norm.running_var"):
        assert (ranks[0]["after"][key][rows] != ranks[0]["before"][key][rows]).any()
    assert_same_weights(ranks[0]["end"], ranks[1]["end"])


def test_flags_and_means(ranks):
    assert all(found["flags"].tolist() == [True, True] for found in ranks)
    assert all(found["mean"].tolist() == [0.5, 3.0] for found in ranks)
