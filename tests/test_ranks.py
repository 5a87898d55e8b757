"""Two processes of a plain loop, with gloo on the CPU or NCCL on two GPUs: rank 0 decides, whatever the others would
have chosen."""

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from conftest import GPU, assert_same_weights
from ranks import CRITERIA

TWO_GPUS = [*GPU, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
SIMULATED = pytest.mark.skipif("SIMULATED_CUDA_DEVICES" not in os.environ, reason="needs simulated devices")
BACKENDS = ["gloo", *(pytest.param(name, marks=TWO_GPUS) for name in ("nccl", "cuda:nccl", "cpu:gloo,cuda:nccl"))]


@pytest.fixture(scope="module", params=[*BACKENDS, pytest.param("cuda:xccl", marks=[*TWO_GPUS, SIMULATED])])
def ranks(request, tmp_path_factory):
    folder, backend = tmp_path_factory.mktemp("ranks"), request.param
    words = [[str(rank), str(folder), backend] for rank in (0, 1)]
    if backend == "gloo":
        commands = [forked.Command(["ranks:main", *own], folder / f"{own[0]}.log") for own in words]
        assert [command.status(120) for command in commands] == [0, 0], commands[0].text + commands[1].text
    else:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        script = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
        processes = [subprocess.Popen([*script, *own], env=environment) for own in words]
        assert [process.wait(300) for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in (0, 1)]


def test_a_layer_participates_if_all_ranks_have_shown_that_it_can(ranks):
    """The third conv predicts on rank 1."""
    assert [found["layers"] for found in ranks] == [["first", "second"]] * 2


def test_masks_new_filters_and_statistics_are_those_of_rank_0(ranks):
    one, other = ranks
    assert one["dropped"] == other["dropped"] == one["restored"] == other["restored"]
    assert sum(map(len, one["dropped"].values())) == 9
    for when in ("before", "after", "end"):
        assert_same_weights(one[when], other[when])
    rows = one["dropped"]["first"]
    for key in ("first.weight", "norm.running_mean", "norm.running_var"):
        assert (one["after"][key][rows] != one["before"][key][rows]).any()


def test_ranks_that_differ_are_refused_at_a_transition(ranks):
    for found in ranks:
        told = [f"RePr at the {event} of cycle 1: layer first differs between" for event in ("drop", "restore")]
        assert [line.partition(" rank 0 and rank(s) [1]")[0] for line in found["refused"]] == told


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_the_mean_of_those_of_the_ranks(name, ranks):
    for found in ranks:
        for layer, score in found["together"][name].items():
            first, second = (one["alone"][name][layer] for one in ranks)
            torch.testing.assert_close(score, (first + second) / 2)
