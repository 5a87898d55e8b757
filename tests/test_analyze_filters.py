"""``repr-det analyze`` on checkpoints whose answer is known: numbers against NumPy, the drop against RePrScheme's."""

import json
import math
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, refused
from detectron2.modeling import build_model
from textbook import textbook_overlap
from torch import nn

from repr_det import RePrScheme, UserError
from repr_det.method.layers import FilterLayer, find_filter_layers
from repr_det.method.passes import passes_over
from repr_det.studies.analysis import analyze, expected_near_duplicates, layers_of_model, main

CONFIG = ["--config-file", str(ROOT / "configs" / "baseline_r50_fpn.yaml")]


def random_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"a.weight": (32, 32, 3, 3), "a.norm.weight": (32,), "b.conv.weight": (32, 32, 3, 3), "fc.weight": (5, 6)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def run(tmp_path, capsys):
    """``run(weights, *arguments)`` -> the content of --json, and what is printed."""

    def analyzed(saved, *arguments):
        torch.save(saved, tmp_path / "model.pth")
        main([str(tmp_path / "model.pth"), *map(str, arguments), "--json", str(tmp_path / "found.json")])
        return json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out

    return analyzed


def test_numbers_verdict_and_plot(run, tmp_path):
    weights = random_weights()
    weight, other = (weights[name].flatten(1) for name in ("a.weight", "b.conv.weight"))
    weight[5] = -2 * weight[3] + 0.01 * torch.randn(288)  # points the other way: overlaps, but is not redundant
    weight[6] = 2 * weight[4] + 0.02 * torch.randn(288)
    for row, share in ((7, 0.019), (8, 0.021)):
        weight[row] *= share * weight.norm(dim=1).median() / weight[row].norm()
    weight[9] = 0
    found, text = run({"model": weights, "iteration": 11, "optimizer": {}}, "--pairs", 3, "--plot", tmp_path / "x.svg")
    used = [i for i in range(32) if i != 9]
    first, second = found["layers"]
    assert [first[key] for key in ("name", "filters", "dimension")] == ["a", 32, 288] and second["name"] == "b.conv"
    np.testing.assert_allclose(np.array(first["overlap"])[used], textbook_overlap(weight[used]), atol=1e-6)
    np.testing.assert_allclose(second["overlap"], textbook_overlap(other), atol=1e-6)
    assert second["overlap_mean"] == pytest.approx(textbook_overlap(other).mean(), abs=1e-6)
    assert [first[key] for key in ("zero", "near_duplicates", "small")] == [[9], [3, 4, 5, 6], [7]]
    assert first["redundant"] == [4]  # the larger of two that point alike stays
    expected = np.sqrt(2 / (np.pi * 288))  # E|cos| up to terms of 1 / d
    total = textbook_overlap(weight[used]).sum() + textbook_overlap(other).sum()
    assert found["overlap_factor"] == pytest.approx(total / (30 * expected + 31 * expected), rel=0.01)
    assert text.startswith(
        "1 of 63 filters are redundant (1.6%): 1 near-duplicates of a filter that stays, idle ones not looked for "
        "(--batches). 4 have |cos| > 0.9 with another (random directions: 0), 1 a norm below 2% of the median. "
        "Mean O_f is 1.0"
    )
    assert ", iteration 11, layers by name" in text
    assert re.search(r"^all +64 .* 4 +1 +1 +0 +1 +19$", text, re.MULTILINE)  # columns of COUNTS
    pair, second, _ = found["pairs"]
    assert (pair["layer"], pair["i"], pair["j"]) == ("a", 3, 5) and pair["cosine"] < -0.99
    assert abs(pair["cosine"]) >= abs(second["cosine"])
    assert (tmp_path / "x.svg").read_text().lstrip().startswith("<?xml")
    empty = {"b.weight": weights["b.conv.weight"], "c.weight": torch.zeros(4, 2, 1, 1)}
    assert run(empty)[1].startswith("0 of 32 filters are redundant (0.0%): ")


# P(|cos| > 0.9) of random directions: length of an arc, areas of spherical caps (polynomials).
@pytest.mark.parametrize(("dimension", "near"), [(2, 2 / np.pi * np.arccos(0.9)), (3, 0.1), (5, 0.0145), (9, 3.86e-4)])
def test_the_number_of_near_duplicates_by_chance(run, dimension, near):
    torch.manual_seed(0)
    weights = {"dw.weight": torch.randn(960, dimension, 1, 1), "pw.weight": torch.randn(64, 256, 1, 1)}
    found, text = run(weights)
    expected = 960 * (1 - (1 - near) ** 959)
    assert found["near_random"] == pytest.approx(expected, rel=0.01)
    assert f"random directions: {found['near_random']:.0f})" in text
    assert found["near_duplicates"] == pytest.approx(expected, rel=0.1)
    assert expected_near_duplicates(960, 1) == 960


def test_redundant_filters_are_those_that_the_criterion_drops():
    """Of pairs one stays, opposite signs of weight and gamma make one direction, thresholds of a norm tell apart."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))
    weight, norm = net[0].weight.data, net[1]
    weight[[1, 3, 5, 7]] = torch.stack([2 * weight[0], -weight[2], -weight[4], weight[6]])
    norm.weight.data[5], norm.bias.data[7], norm.bias.data[9] = -1.0, 3.0, -100.0
    weight[11] *= 1e-3  # small, but behind the norm like any other
    images = [torch.randn(8, 3, 12, 12) for _ in range(2)]
    passes = passes_over(net, images, lambda batch: net(batch).square().mean())
    layers = find_filter_layers(net, ["0"])
    ((found,), _), ((weights_alone,), _) = analyze(layers, passes=passes, num_batches=2), analyze(layers)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scheme = RePrScheme(layers, optimizer, criterion="redundant", passes=passes, drop_ratio=0.5)
    assert found["redundant"] == list(scheme.drop().dropped["0"]) == [0, 5, 9]
    assert weights_alone["redundant"] == [0, 5, 7] and found["small"] == weights_alone["small"] == [11]


@pytest.mark.parametrize("criterion", ["ortho", "weight_norm"])
def test_the_drop_is_that_of_training(criterion):
    torch.manual_seed(0)
    convs = {"plain": nn.Conv2d(8, 16, 3, bias=False), "grouped": nn.Conv2d(16, 16, 3, groups=4, bias=False)}
    convs["plain"].weight.data[[3, 11]] = 0
    convs["grouped"].weight.data[4:8] = convs["grouped"].weight.data[:4] + 0.1
    layers = [FilterLayer(name, conv) for name, conv in convs.items()]
    found, _ = analyze(layers, criterion)
    optimizer = torch.optim.SGD([conv.weight for conv in convs.values()], 0.1)
    dropped = RePrScheme(layers, optimizer, criterion=criterion).drop().dropped
    assert {layer["name"]: layer["dropped"] for layer in found} == {name: list(dropped[name]) for name in convs}
    assert {3, 11} <= set(found[0]["dropped"])


def test_grouped_convs_are_looked_at_in_each_group():
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, groups=4, bias=False)
    weight = conv.weight.data
    weight[16:20] = weight[:4]
    weight[5] = 0
    layer = FilterLayer("x", conv)
    (found,), pairs = analyze([layer], num_pairs=30)
    expected = np.zeros(64)
    for group in range(4):
        used = [i for i in range(16 * group, 16 * group + 16) if i != 5]
        expected[used] = textbook_overlap(weight[used])
    np.testing.assert_allclose(found["overlap"], expected, atol=1e-6)
    assert found["zero"] == [5] and found["near_duplicates"] == []
    assert len(pairs) == 30
    assert all(pair["i"] // 16 == pair["j"] // 16 and pair["i"] < pair["j"] for pair in pairs)
    mean_cosine = np.sqrt(2 / (np.pi * 144))  # E|cos| up to terms of 1 / d
    assert found["overlap_random"] == pytest.approx(mean_cosine * (14 + 3 * 15) / 63, rel=0.01)


def test_names_choose_layers(run):
    """REPR.LAYERS choose among Detectron2's names; of others all but transposed convs and what predicts are taken."""
    more = {"mask.deconv.weight": torch.randn(4, 8, 2, 2), "cls_score.weight": torch.ones(2, 4, 1, 1)}
    weights = random_weights() | more

    def names(*arguments):
        return [layer["name"] for layer in run(weights, *arguments)[0]["layers"]]

    assert names() == ["a", "b.conv"] and names("--include", "b*") == ["b.conv"]
    assert names("--exclude", "a.weight", "cls*") == ["b.conv", "mask.deconv"]
    torchvision = ("rpn.head.cls_logits", "head.bbox_reg", "head.bbox_ctrness")
    weights |= {f"{name}.weight": torch.ones(2, 4, 1, 1) for name in torchvision}
    assert names() == ["a", "b.conv"]
    weights["backbone.bottom_up.res2.0.conv1.weight"] = torch.randn(4, 8, 1, 1)
    assert names() == ["backbone.bottom_up.res2.0.conv1"]


def test_weights_are_found_wherever_they_lie(run):
    """PyTorch's tutorial saves them as model_state_dict; a counter may be a tensor, and a layer have no filter left."""
    saved = {"optimizer": {"state": {0: {"momentum": torch.ones(4, 2, 1, 1)}}}, "iteration": torch.tensor(11)}
    saved["optimizer"]["itself"] = saved
    saved["model_state_dict"] = random_weights() | {"gone.weight": torch.zeros(0, 32, 3, 3)}
    found, text = run(saved)
    assert [layer["name"] for layer in found["layers"]] == ["a", "b.conv"]
    assert found["iteration"] == 11 and ", iteration 11," in text


def test_the_config_beside_a_checkpoint(run, tmp_path, tiny_cfg):
    """It names the layers, also of NumPy arrays under Caffe2's names as in the model zoo; a LazyConfig's does not."""
    cfg = tiny_cfg("REPR.LAYERS.INCLUDE", ["*res5.0.conv?"], "REPR.CRITERION", "redundant")
    saved = build_model(cfg).state_dict()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    found, text = run(saved)
    assert [layer["name"] for layer in found["layers"]] == [f"backbone.bottom_up.res5.0.conv{c}" for c in (1, 2)]
    assert found["criterion"] == "ortho" and str(tmp_path / "config.yaml") in text
    for layer in found["layers"]:
        np.testing.assert_allclose(layer["overlap"], textbook_overlap(saved[f"{layer['name']}.weight"]), atol=1e-6)
    wanted = [saved[f"backbone.bottom_up.res5.0.conv{c}.weight"] for c in (1, 2)]
    weights = {f"res5_0_branch2{c}_w": weight.numpy() for c, weight in zip("ab", wanted, strict=True)}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(weights, protocol=2))
    layers = layers_of_model(tmp_path / "R-18.pkl", cfg)[1]
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, wanted, strict=True))
    with pytest.raises(UserError, match=r"has no backbone.bottom_up.res5.0.conv2.weight of \(\d+, \d+, 3, 3\): give"):
        run({name: value for name, value in saved.items() if "res5.0.conv2" not in name})
    with pytest.raises(UserError, match=r"(\d+) of \1 filters of backbone.bottom_up.res5.0.conv2 hold NaN"):
        run(saved | {"backbone.bottom_up.res5.0.conv2.weight": math.nan * wanted[1]})
    (tmp_path / "config.yaml").write_text("model: {}\n")
    assert len(run(saved)[0]["layers"]) >= 8


def test_a_model_that_takes_more_than_an_image(run, tmp_path, tiny_cfg, caplog):
    """Fast R-CNN takes proposals."""
    opts = "MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals MODEL.LOAD_PROPOSALS True REPR.LAYERS.INCLUDE ['*res5*']"
    cfg = tiny_cfg(*opts.split())
    (tmp_path / "config.yaml").write_text(cfg.dump())
    model = build_model(cfg)
    found, _ = run(model.state_dict())
    named = [name for name, module in model.named_modules() if "res5" in name and isinstance(module, nn.Conv2d)]
    assert [layer["name"] for layer in found["layers"]] == named != []
    assert "All convs of REPR.LAYERS are looked at: a pass of an image ended in AssertionError" in caplog.text


def test_training_batches_show_which_filters_are_idle(run, tiny_data, tiny_cfg):
    conv, closed = "backbone.bottom_up.res4.0.conv1", [3, 7]
    model = build_model(tiny_cfg())
    model.get_submodule(conv).norm.bias.data[closed] = -100.0
    model.get_submodule(conv).weight.data[5] = 0.0  # a dropped filter is none that is idle
    saved = {"model": model.state_dict()}
    keys = [*SMALL, "REPR.LAYERS.INCLUDE", [conv], "DATASETS.TEST", "('nowhere_val',)"]  # nothing is evaluated
    (layer,) = run(saved, *CONFIG, *keys)[0]["layers"]
    assert layer["idle"] == layer["small"] == []
    for criterion in ("redundant", "apoz"):
        found, _ = run(saved, *CONFIG, "--batches", 2, "--criterion", criterion, *keys)
        assert found["layers"][0]["idle"] == closed
        assert "2 idle (no output above 0 and no gradient on 2 training batches)" in found["verdict"]
        assert found["layers"][0]["redundant"] == closed
        assert criterion != "redundant" or found["layers"][0]["dropped"] == [3, 5, 7]
    with pytest.raises(UserError, match="nowhere_train"):
        run(saved, *CONFIG, "--batches", 2, *keys, "DATASETS.TRAIN", "('nowhere_train',)")


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ("{tmp}/none.pth", "none.pth: no 4-D weight matches --include *; it holds iteration"),
        ("{tmp}/cut.pkl", "cut.pkl: not a readable pickle"),
        ("{tmp}/w.pth --criterion apoz", "'apoz' looks at training batches: give --config-file and --batches"),
        ("{tmp}/w.pth --batches -1", "--batches must be at least 0, got -1"),
        ("{tmp}/w.pth REPR.DROP_RATIO 0.2", "KEY VALUE ['REPR.DROP_RATIO', '0.2'] needs --config-file"),
        ("{tmp}/w.pth --exclude *", "w.pth: no 4-D weight matches --include * and not --exclude *; it holds a, b.conv"),
        ("{tmp}/nan.pth", "2 of 3 filters of b hold NaN or infinity: give"),
        ("{tmp}/w.pth --criterion nope", "--criterion must be one of"),
        ("{tmp}/w.pth --drop-ratio 1.5", "--drop-ratio must be in (0, 1), got 1.5"),
        ("{tmp}/w.pth --json no/such/folder.json", "no/such/folder.json: the folder no/such does not exist"),
        ("{tmp}/w.pth --json {tmp}", " is a folder: give a file"),
        ("{tmp}/w.pth --plot {tmp}/x.nope", "Format 'nope' is not supported"),
        ("{tmp}/w.pth --config-file nope.yaml --include a", "go without --config-file"),
    ],
)
def test_wrong_arguments_and_files_get_one_line(tmp_path, words, fragment):
    torch.save(random_weights(), tmp_path / "w.pth")
    torch.save({"iteration": 3}, tmp_path / "none.pth")
    torch.save({"b.weight": torch.tensor([1.0, math.nan, math.inf]).view(3, 1, 1, 1)}, tmp_path / "nan.pth")
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps({"w": np.zeros((4, 2, 3, 3))})[:-60])
    assert fragment in refused(main, words.replace("{tmp}", str(tmp_path)).split())
