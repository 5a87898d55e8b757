"""tools/benchmark.py: its arithmetic against closed forms and counts, and the whole command on the smallest case."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from repr_det.method.slim_choice import seconds_of
from torch.utils.flop_counter import FlopCounterMode

from repr_det import UserError
from repr_det.method.layers import find_filter_layers
from repr_det.method.orthogonality import inter_filter_orthogonality
from repr_det.method.schedule import RePrSchedule
from repr_det.studies.benchmarking import case as case_module
from repr_det.studies.benchmarking import scale as scale_module
from repr_det.studies.benchmarking import steps as steps_module
from repr_det.studies.benchmarking.case import Bench, Case, even_masks, patched, synthetic_batch
from repr_det.studies.benchmarking.command import CONFIG_FILE, main, plan
from repr_det.studies.benchmarking.flops import count
from repr_det.studies.benchmarking.memory import highest_memory
from repr_det.studies.benchmarking.prediction import predict, run_ratio
from repr_det.studies.benchmarking.report import machine, write
from repr_det.studies.benchmarking.scale import layer_flops, measure_scale
from repr_det.studies.benchmarking.steps import ARMS, measure_steps, spread
from repr_det.studies.benchmarking.transitions import needed_flops, textbook_filters, textbook_overlap
from repr_det.studies.benchmarking.whole_run import measure_run, ratio_error

TINY = Case(depth=18, size=64, batch=1, norm="BN")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depths", "19"], "--depths must be one of 18, 34, 50, 101, 152, got 19"),
        (["--ratios", "1"], "--ratios must be in (0, 1), got 1.0"),
        (["--sizes", "32"], "--sizes must be at least 64"),
        (["--sizes", "800x"], "--sizes must be a side or HEIGHTxWIDTH, such as 320 or 800x1333, got '800x'"),
        (["--sizes", "800x32"], "--sizes must be at least 64"),
        (["--heads", "large"], "--heads must be one of stock, small, got 'large'"),
        (["--norm", "LN"], "--norm must be one of FrozenBN, BN, SyncBN, GN, got 'LN'"),
        (["--only", "time"], "--only must be of steps, transitions, memory, run, scale, got 'time'"),
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--run-iters", "17"], "--run-iters must be at least 18, got 17"),
        (["--threads", "-1"], "--threads must be at least 0, got -1"),
        (["--output", __file__], "is a file, not a folder"),
        (["--amp"], "--amp needs a GPU"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(UserError) as error:
        plan(flags)
    assert message in str(error.value)


def test_textbook_route():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(7, 40))
    wanted = []
    for f in range(7):
        cosines = [weight[f] @ weight[k] / np.linalg.norm(weight[f]) / np.linalg.norm(weight[k]) for k in range(7)]
        wanted.append(sum(abs(c) for k, c in enumerate(cosines) if k != f) / 7)
    assert np.allclose(textbook_overlap(weight), wanted)
    assert np.allclose(inter_filter_orthogonality(torch.from_numpy(weight)), wanted)
    new = textbook_filters(weight[:5], weight[5:])
    assert np.allclose(new @ new.T, np.eye(2)) and np.abs(new @ weight.T).max() < 1e-12


@pytest.mark.parametrize(("filters", "dropped", "dimension"), [(32, 9, 200), (32, 9, 40)])
def test_needed_flops_are_those_of_the_products(filters, dropped, dimension):
    rows, new = torch.randn(filters, dimension), torch.randn(dropped, dimension)
    with FlopCounterMode(display=False) as drop:
        rows @ rows.T
    with FlopCounterMode(display=False) as restore:
        if filters + dropped > dimension:
            rows.T @ rows
        else:
            rows @ rows.T
            for _ in range(2):
                new = new - (new @ rows.T) @ rows
                new @ new.T
    assert needed_flops(filters, dropped, dimension) == (drop.get_total_flops(), restore.get_total_flops())


def test_spread():
    values = list(np.random.default_rng(1).normal(size=11))
    found = spread(values)
    assert [found[k] for k in ("min", "q1", "median", "q3", "max")] == pytest.approx(
        np.percentile(values, [0, 25, 50, 75, 100])
    )
    assert set(spread([2.0]).values()) == {2.0}


def test_run_ratio_is_the_sum_over_the_iterations():
    schedule = RePrSchedule(7, 3, 2, 4)
    total = sum(0.8 if schedule.phase(i) == "sub" else 1.01 for i in range(50)) + 2 * 1.5
    assert run_ratio(50, schedule, 1.01, 0.8, 1.5) == pytest.approx(total / 50)
    # 1x: 3 x 5000 of 90000 iterations in the sub-network; 3x: 3 x 17500 of 270000.
    assert predict(1.0, 0.4, 0.0) == pytest.approx({"1x": 1 - 0.6 * 15 / 90, "3x": 1 - 0.6 * 52.5 / 270})


def test_standard_error_of_a_ratio():
    rng = np.random.default_rng(2)
    stock = rng.normal(1.0, 0.05, (2000, 40))
    ours = 0.9 * stock + rng.normal(0, 0.03, stock.shape)
    ratios = ours.sum(1) / stock.sum(1)
    errors = [ratio_error(list(a), list(b)) for a, b in zip(ours, stock, strict=True)]
    assert np.mean(errors) == pytest.approx(ratios.std(), rel=0.05)


def test_a_whole_run_makes_every_transition_of_its_schedule():
    found = measure_run(dataclasses.replace(TINY, norm="FrozenBN"), CONFIG_FILE, 18, report=lambda line: None)
    assert (found["s1_iters"], found["s2_iters"], found["cycles"]) == (2, 1, 3)
    assert found["ratio"] == pytest.approx(found["repr"] / found["stock"])
    assert found["steps_ratio"] == pytest.approx((found["repr"] - found["transitions"]) / found["stock"])
    assert 0 < found["transitions"] < found["repr"] and found["error"] > 0


def test_slim_flops_are_those_of_the_kept_channels():
    """Forward, gradient of the input and of the weight: 2 multiply-adds each, of the kept share of both channels."""
    with Bench(TINY, CONFIG_FILE, repr_on=True) as bench:
        scheme = bench.hook.scheme
        macs = {}
        handles = [
            layer.conv.register_forward_hook(
                lambda conv, x, y, name=layer.name: macs.update({name: y[0, 0].numel() * conv.weight.numel()})
            )
            for layer in scheme.layers
        ]
        bench.step(0)
        for handle in handles:
            handle.remove()
        scheme.drop()
        kept = {layer.name: int((~scheme.masks[layer.name]).sum()) / layer.num_filters for layer in scheme.layers}
        saved = 0
        for name, dense in macs.items():
            share = kept[name]
            if name.endswith("conv2"):
                share *= kept[name.replace("conv2", "conv1")]
            saved += dense * (1 - share)
        found = count(bench, synthetic_batch(TINY))
    assert found["step_dense"] - found["step_exact"] == pytest.approx(6 * saved, rel=1e-9)
    assert found["step_exact"] < found["step_slim"] < found["step_dense"]
    assert found["forward_exact"] < found["forward_slim"] < found["forward_dense"]


def test_even_masks_and_patched():
    with Bench(TINY, CONFIG_FILE, repr_on=True) as bench:
        masks = even_masks(bench.hook.scheme.layers, 0.3)
        assert all(int(mask.sum()) == round(0.3 * len(mask)) for mask in masks.values())
    with pytest.raises(KeyError), patched(Case, "name", lambda original: 1):
        assert TINY.name == 1
        raise KeyError
    assert TINY.name == "R18-FPN BN small, 0.3, 1 x 64 px"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which everything takes 3 ms; the record of what was asked of it."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("record")

        def elapsed_time(self, end):
            return 3.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return asked


def test_a_gpu_is_timed_between_events(gpu):
    assert seconds_of(lambda: gpu.append("work"), "cuda") == 0.003
    assert gpu == ["wait", "record", "work", "record", "wait"]


def test_on_a_gpu_the_stock_step_is_the_case(gpu):
    (case,) = plan(["--device", "cuda", "--amp"]).cases
    assert (case.batch, case.shape, case.heads) == (2, (800, 1333), "stock")
    assert case.name == "R50-FPN FrozenBN stock AMP, 0.3, 2 x 800 x 1333 px"
    (case,) = plan("--device cuda --sizes 640x64 --batches 16 --heads small".split()).cases
    assert (case.batch, case.shape, case.heads) == (16, (640, 64), "small")
    assert [x["image"].shape for x in synthetic_batch(dataclasses.replace(case, batch=2))] == [(3, 640, 64)] * 2
    assert synthetic_batch(case)[0]["instances"].gt_boxes.tensor.amax(0).tolist() <= [64, 640, 64, 640]


def test_steps_on_a_gpu_are_timed_between_events(gpu, monkeypatch):
    """The detector stays on the CPU; what is said of the GPU is the fake's."""
    original = case_module.build_config

    def on_the_cpu(case, config_file):
        cfg = original(case, config_file)
        cfg.MODEL.DEVICE = "cpu"
        return cfg

    monkeypatch.setattr(case_module, "build_config", on_the_cpu)
    monkeypatch.setattr(steps_module, "count", lambda bench, batch: {})
    on_gpu = dataclasses.replace(TINY, device="cuda")
    found = measure_steps(on_gpu, CONFIG_FILE, 1, report=lambda line: None)
    assert {found["seconds"][arm]["median"] for arm in ARMS} == {0.003}
    assert {spread["median"] for spread in found["ratio"].values()} == {1.0}
    assert found["hook"]["S1"]["seconds"] == pytest.approx(3 * 0.003)  # before_step, after_backward, after_step
    assert gpu.count("record") % 2 == 0 and gpu[:2] == ["wait", "record"]


def test_peak_memory_of_a_gpu_is_what_torch_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert highest_memory("cuda") == 123
    assert highest_memory("cpu") > 1e8


def test_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(scale_module, "gemm_rate", lambda device: 1e11)
    found = measure_scale(TINY, CONFIG_FILE, 1, lambda line: None, networks=["R18"], channels=[32])
    results = {"machine": machine(), "pairs": 1, "cases": [], "scale": found}
    write(results, str(tmp_path))
    (network,), layers = found["networks"], found["layers"]
    assert [(x["kernel"], x["channels"], x["weights"]) for x in layers] == [(3, 32, 32 * 32 * 9), (1, 32, 32 * 32)]
    # 10 of 32 filters with 288 weights: two Gram matrices of 32, two projections on 10 new ones.
    assert layers[0]["flops"] == 2 * 2 * 32**2 * 288 + 2 * (4 * 32 * 10 * 288 + 2 * 10**2 * 288)
    assert layers[0]["eigen"] == 0 < layers[1]["eigen"]  # 32 + 10 filters do not fit into 32 dimensions
    assert network["filters"] == 4 * (64 + 128 + 256 + 512) and 0 < network["drop"] < network["restore"]
    assert "R18  " in (tmp_path / "benchmark.txt").read_text()
    assert {"scale.svg", "scale.png"} <= {path.name for path in tmp_path.iterdir()}


def test_filters_of_a_grouped_conv_are_layers_of_their_own():
    net = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, groups=4), torch.nn.BatchNorm2d(64))
    (layer,) = find_filter_layers(net, ["0"])
    assert layer_flops(layer, 0.25) == 4 * sum(needed_flops(16, 4, 144))


def test_whole_command(tmp_path, capsys):
    flags = "--depths 18 --sizes 64 --batches 1 --pairs 2 --repeats 1 --run-iters 18 --norm BN --output".split()
    main([*flags, str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "benchmark.txt").read_text() in printed
    results = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    (entry,) = results["cases"]
    assert entry["name"] == TINY.name and set(entry["steps"]["seconds"]) == set(ARMS)
    assert entry["steps"]["dropped"] == int(0.3 * entry["steps"]["filters"])
    for arm in ARMS:
        assert 0 < entry["steps"]["seconds"][arm]["min"] <= entry["steps"]["seconds"][arm]["median"]
        assert entry["memory"]["bytes"][arm] > 1e8
    assert 0 < entry["steps"]["hook"]["S1"]["share"] < 0.05
    assert entry["transitions"]["textbook_restore"] > entry["transitions"]["restore"] > 0
    assert set(entry["prediction"]) == {"1x", "3x", "flops"}
    run = entry["run"]
    assert 0 < run["transitions"] < run["repr"] and run["steps_ratio"] < run["ratio"]
    assert run["1x"] == pytest.approx(run["steps_ratio"], abs=0.02) and run["1x"] > run["steps_ratio"]
    assert any(path.suffix == ".svg" for path in (tmp_path / "out").iterdir())
