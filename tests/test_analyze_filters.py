"""tools/analyze_filters.py on checkpoints whose answer is known, and files that must not load (safe_pickle)."""

import importlib.util
import json
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from detectron2.modeling import build_model

from repr_det import UserError
from repr_det.runs.safe_pickle import load_checkpoint, load_restricted
from repr_det.studies.analysis import analyze, model_by_config, read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("analyze_filters", ROOT / "tools" / "analyze_filters.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (10, 3, 3, 3), "a.norm.weight": (10,), "b.conv.weight": (6, 10, 1, 1), "fc.weight": (5, 6)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights["b.conv.weight"][4] = -2 * weights["b.conv.weight"][1] + 0.01  # nearly opposite
    return weights


def overlaps(weight: torch.Tensor) -> np.ndarray:
    rows = weight.flatten(1).double().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return (np.abs(unit @ unit.T).sum(1) - 1) / len(unit)


def run(*args, **kwargs) -> dict:
    """Runs the tool with --json beside its checkpoint; returns the json."""
    path = Path(args[0]).with_suffix(".json")
    tool.main([*map(str, args), "--json", str(path)])
    return json.loads(path.read_text())


def test_numbers_table_and_plots(tmp_path, capsys):
    weights = random_weights()
    torch.save({"model": weights, "iteration": 11, "optimizer": {}}, tmp_path / "model.pth")
    found = run(tmp_path / "model.pth", "--pairs", "3", "--plot", tmp_path / "plot.svg")
    assert found["iteration"] == 11 and found["filters"] == 16 and not found["sub_network"]
    a, b = found["layers"]
    for layer, name, d in ((a, "a", 27), (b, "b.conv", 10)):
        expected = overlaps(weights[f"{name}.weight"])
        assert (layer["name"], layer["filters"], layer["dimension"]) == (name, len(expected), d)
        np.testing.assert_allclose(layer["overlap"], expected, atol=1e-6)
        assert layer["overlap_mean"] == pytest.approx(expected.mean(), abs=1e-6)
    # floor(0.3 * 16) = 4 filters, at most 3 of b: brute force over the ranked list.
    ranked = sorted(((-x, n, i) for n in ("a", "b.conv") for i, x in enumerate(overlaps(weights[f"{n}.weight"]))))
    taken = {"a": [], "b.conv": []}
    for _, name, index in ranked:
        if sum(map(len, taken.values())) < 4 and len(taken[name]) < {"a": 5, "b.conv": 3}[name]:
            taken[name].append(index)
    assert {x["name"]: x["dropped"] for x in found["layers"]} == {n: sorted(t) for n, t in taken.items()}
    first = found["pairs"][0]
    assert (first["layer"], first["i"], first["j"]) == ("b.conv", 1, 4) and first["cosine"] < -0.99
    cosines = [abs(pair["cosine"]) for pair in found["pairs"]]
    assert len(cosines) == 3 and cosines == sorted(cosines, reverse=True)
    text = capsys.readouterr().out
    assert "after iteration 11, full network: 16 filters" in text and "b.conv" in text and "all" in text
    assert (tmp_path / "plot.svg").read_text().lstrip().startswith("<?xml")
    run(tmp_path / "model.pth", "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_grouped_convs_of_a_config_are_looked_at_in_each_group(tmp_path, tiny_cfg):
    """Filters of two groups are alike and still do not overlap: they look at other channels."""
    opts = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NUM_GROUPS", 4, "MODEL.RESNETS.WIDTH_PER_GROUP", 16]
    include = ["backbone.bottom_up.res2.0.conv1", "backbone.bottom_up.res2.0.conv2"]
    cfg = tiny_cfg(*opts, "REPR.LAYERS.INCLUDE", include, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
    weights = {name: value.clone() for name, value in build_model(cfg).state_dict().items()}
    weight = weights[f"{include[1]}.weight"]  # (64, 16, 3, 3), groups of 16
    weight[16:20] = weight[:4]
    weight[5] = 0
    torch.save({"model": weights}, tmp_path / "model.pth")
    analysis = analyze(model_by_config(read_checkpoint(tmp_path / "model.pth"), cfg)[1], num_pairs=30)
    plain, grouped = analysis.layers
    np.testing.assert_allclose(plain.overlap, overlaps(weights[f"{include[0]}.weight"]), atol=1e-6)
    expected = np.zeros(64)
    for group in range(4):
        kept = [i for i in range(16 * group, 16 * group + 16) if i != 5]
        expected[kept] = overlaps(weight[kept])
    np.testing.assert_allclose(grouped.overlap, expected, atol=1e-6)
    assert grouped.zero == [5] and grouped.duplicates == [] and grouped.max_cosine < 0.5
    assert all(i // 16 == j // 16 for name, i, j, _ in analysis.pairs if name == include[1])
    generator = torch.Generator().manual_seed(0)
    random = [overlaps(torch.randn(n, 144, generator=generator)).mean() for n in (15, 16, 16, 16) for _ in range(20)]
    assert grouped.expected == pytest.approx(np.mean(random), rel=0.02)


def test_patterns_choose_layers(tmp_path):
    weights = {**random_weights(), "mask.deconv.weight": torch.randn(4, 8, 2, 2)}
    torch.save(weights, tmp_path / "plain.pth")
    assert [x["name"] for x in run(tmp_path / "plain.pth")["layers"]] == ["a", "b.conv"]
    assert [x["name"] for x in run(tmp_path / "plain.pth", "--include", "b*")["layers"]] == ["b.conv"]
    found = run(tmp_path / "plain.pth", "--exclude", "a.weight")
    assert [x["name"] for x in found["layers"]] == ["b.conv", "mask.deconv"]


@pytest.mark.parametrize("with_state", [True, False])
def test_a_sub_network_is_reported_as_such(tmp_path, capsys, with_state):
    weights = random_weights()
    weights["a.weight"][[2, 7]] = 0
    saved = {"model": weights, "iteration": 4}
    if with_state:
        masks = {"a": torch.arange(10) % 5 == 2, "b.conv": torch.zeros(6, dtype=torch.bool)}
        saved["trainer"] = {"hooks": {"RePrHook": {"scheme": {"masks": masks}}}}
    torch.save(saved, tmp_path / "sub.pth")
    found = run(tmp_path / "sub.pth")
    said = (
        "sub-network phase of RePr: 2 of 16" if with_state else "2 of 16 filters are exactly zero: written in the sub-"
    )
    assert said in capsys.readouterr().out and found["sub_network"]
    a = found["layers"][0]
    assert a["zero"] == [2, 7]
    kept = [i for i in range(10) if i not in (2, 7)]
    np.testing.assert_allclose(np.array(a["overlap"])[kept], overlaps(weights["a.weight"][kept]), atol=1e-6)
    assert a["overlap_mean"] == pytest.approx(overlaps(weights["a.weight"][kept]).mean(), abs=1e-6)


def test_broken_filters_are_named(tmp_path, capsys):
    weights = random_weights()
    weights["a.weight"][3, 0] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    assert run(tmp_path / "nan.pth")["layers"][0]["not_finite"] == [3]
    assert "Not finite: a [3]" in capsys.readouterr().out


def test_the_verdict_counts_duplicates_and_dead_filters(tmp_path, capsys):
    torch.manual_seed(0)
    weight = torch.randn(32, 288)
    weight[5] = -2 * weight[3] + 0.01 * torch.randn(288)  # points the other way: a near-duplicate all the same
    weight[7] *= 0.019 * weight.norm(dim=1).median() / weight[7].norm()
    weight[8] *= 0.021 * weight.norm(dim=1).median() / weight[8].norm()
    weight[9] = 0
    torch.save({"a.weight": weight.view(32, 32, 3, 3), "b.weight": torch.randn(32, 32, 3, 3)}, tmp_path / "x.pth")
    found = run(tmp_path / "x.pth")
    assert [layer["near_duplicates"] for layer in found["layers"]] == [[3, 5], []]
    assert [layer["dead"] for layer in found["layers"]] == [[7], []]
    used = np.delete(weight.numpy(), 9, axis=0)
    used = used / np.linalg.norm(used, axis=1, keepdims=True)
    overlap = (np.abs(used @ used.T).sum(1) - 1) / 31
    other = torch.load(tmp_path / "x.pth")["b.weight"].flatten(1).numpy()
    other = other / np.linalg.norm(other, axis=1, keepdims=True)
    expected = np.sqrt(2 / (np.pi * 288))  # E|cos| up to terms of 1 / d
    total = overlap.sum() + ((np.abs(other @ other.T).sum(1) - 1) / 32).sum()
    assert found["overlap_factor"] == pytest.approx(
        total / (31 * expected * 30 / 31 + 32 * expected * 31 / 32), rel=0.01
    )
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("There is something to remove: mean O_f is 1.0")
    assert "of 63 filters 2 are near-duplicates (|cos| > 0.9), 1 dead" in said


def test_the_verdict_on_random_filters_is_that_nothing_can_be_removed(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save({"a.weight": torch.randn(64, 32, 3, 3), "b.weight": torch.randn(16, 64, 1, 1)}, tmp_path / "x.pth")
    run(tmp_path / "x.pth")
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("There is nothing to remove: mean O_f is 0.99 times"), said


def test_layers_of_a_config(tmp_path, tiny_cfg):
    cfg = tiny_cfg("REPR.LAYERS.INCLUDE", "['backbone.bottom_up.res5*conv*']")
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    _, layers = model_by_config(read_checkpoint(tmp_path / "model.pth"), cfg)
    assert [x.name for x in layers] == [f"backbone.bottom_up.res5.{b}.conv{c}" for b in (0, 1) for c in (1, 2)]
    for layer in layers:
        assert torch.equal(layer.weight, model.get_submodule(layer.name).weight)
    with pytest.raises(UserError, match=r"res5.0.conv1.weight is 512x256x3x3 in the model .* and absent in the file"):
        torch.save(random_weights(), tmp_path / "other.pth")
        model_by_config(read_checkpoint(tmp_path / "other.pth"), cfg)


def test_training_batches_show_which_filters_are_idle(tmp_path, tiny_data, tiny_cfg, capsys):
    """Weights say nothing about a ReLU that never opens; the criterion "redundant" would drop just those."""
    layer, closed = "backbone.bottom_up.res4.1.conv1", [3, 200]
    include = ["REPR.LAYERS.INCLUDE", f"['{layer}']"]
    model = build_model(tiny_cfg(*include))
    model.get_submodule(layer).norm.bias.data[closed] = -100.0
    model.get_submodule(layer).weight.data[5] = 0.0  # a dropped filter is none that is idle
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    config, keys = ["--config-file", ROOT / "configs/baseline_r50_fpn.yaml"], [*SMALL, *include]
    (without,) = run(tmp_path / "model.pth", *config, *keys)["layers"]
    assert without["idle"] is None and without["dead"] == [] and "idle" not in capsys.readouterr().out
    keys += ["DATASETS.TEST", "('nowhere_val',)"]  # nothing is evaluated
    found = run(tmp_path / "model.pth", *config, "--batches", "2", "--criterion", "redundant", *keys)
    assert found["layers"][0]["idle"] == closed and found["layers"][0]["dropped"] == [3, 5, 200]
    out = capsys.readouterr().out
    assert next(line for line in out.splitlines() if line.startswith("all ")).split()[-1] == "3"
    assert "There is something to remove" in out
    assert "2 idle (no output above 0 and no gradient on 2 training batches)" in out.splitlines()[-1]
    with pytest.raises(UserError, match="nowhere_train"):
        run(tmp_path / "model.pth", *config, "--batches", "2", *keys, "DATASETS.TRAIN", "('nowhere_train',)")


@pytest.mark.parametrize("author", ["Caffe2", "torchvision"])
def test_official_pkl_weights_of_a_config(tmp_path, tiny_cfg, author):
    """Files as of the model zoo: NumPy arrays under Caffe2's or torchvision's names."""
    cfg = tiny_cfg("MODEL.RESNETS.DEPTH", 18, "REPR.LAYERS.INCLUDE", "['backbone.bottom_up.res5*conv*']")
    model = build_model(cfg)
    branches = {"conv1": "branch2a", "conv2": "branch2b", "shortcut": "branch1"}
    weights = {}
    for name, tensor in model.backbone.bottom_up.state_dict().items():
        if name.endswith("weight") and "norm" not in name and "stem" not in name:
            stage, block, conv, _ = name.split(".")
            own = f"{stage}_{block}_{branches[conv]}_w" if author == "Caffe2" else name
            weights[own] = tensor.numpy()
    saved = weights if author == "Caffe2" else {"model": weights, "__author__": author, "matching_heuristics": True}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(saved, protocol=2))
    _, layers = model_by_config(read_checkpoint(tmp_path / "R-18.pkl"), cfg)
    assert len(layers) == 4
    for layer in layers:
        assert torch.equal(layer.weight, model.get_submodule(layer.name).weight)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_restricted_pickle_reads_arrays(tmp_path, protocol):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    saved = {"model": {"c": array, "f": np.asfortranarray(array), "scalar": np.float64(2.5)}, "__author__": "x"}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({**saved, "bytes": b"\x00\xff"}, protocol=protocol))
    found = load_restricted(tmp_path / "w.pkl")
    np.testing.assert_array_equal(found["model"]["c"], array)
    np.testing.assert_array_equal(found["model"]["f"], array)
    assert found["model"]["scalar"] == 2.5 and found["bytes"] == b"\x00\xff" and found["__author__"] == "x"


def test_restricted_pickle_reads_what_python_2_wrote(tmp_path):
    """Protocol 2 of Python 2: the bytes of an array are a `str`."""
    data = np.array([1.5, -2.0, 1e30], dtype="<f4").tobytes()

    def text(value: bytes) -> bytes:
        return b"U" + struct.pack("<B", len(value)) + value  # SHORT_BINSTRING

    dtype = b"cnumpy\ndtype\n" + text(b"f4") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01K\x03\x85" + dtype + b"\x89" + text(data) + b"tb"
    (tmp_path / "py2.pkl").write_bytes(b"\x80\x02}" + text(b"conv1_w") + array + b"s.")
    assert load_restricted(tmp_path / "py2.pkl")["conv1_w"].tolist() == np.frombuffer(data, "<f4").tolist()


class Calls:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("thing", "named"),
    [
        (Calls(os.system, "touch executed"), f"{os.system.__module__}.system"),
        (Calls(eval, "open('executed', 'w')"), "builtins.eval"),
        (Calls(getattr, "text", "join"), "builtins.getattr"),
        (Calls(np.lib.npyio.NpzFile), "numpy.lib"),
        (Path("x"), "pathlib"),
        (torch.zeros(2), "torch._utils._rebuild_tensor_v2"),
        (np.random.RandomState(0), "numpy.random"),
        (object, "builtins.object"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_restricted_pickle_refuses_everything_else_by_name(tmp_path, monkeypatch, thing, named, protocol):
    monkeypatch.chdir(tmp_path)
    Path("bad.pkl").write_bytes(pickle.dumps({"model": {"w": np.zeros(3), "x": thing}}, protocol=protocol))
    with pytest.raises(UserError) as error:
        load_restricted("bad.pkl")
    text = str(error.value)
    named = named if protocol > 2 else named.replace("builtins", "__builtin__")  # Python 2's name
    assert text.startswith(f"bad.pkl: refused, it names {named}")
    assert "\n" not in text and not Path("executed").exists()


@pytest.mark.parametrize(("thing", "named"), [(Calls(os.system, "touch executed"), "system"), (Path("x"), "pathlib")])
def test_torch_checkpoints_are_not_executed(tmp_path, monkeypatch, thing, named):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": thing}}, "bad.pth")
    with pytest.raises(UserError, match=f"bad.pth: refused, it names .*{named}") as error:
        load_checkpoint("bad.pth")
    assert "\n" not in str(error.value) and not Path("executed").exists()


def damaged(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / ("w.pkl" if kind.startswith("pkl") else "w.pth")
    if "pkl" in kind:
        path.write_bytes(pickle.dumps({"model": {"w": np.zeros((4, 2, 3, 3))}, "__author__": "x"}))
    else:
        torch.save({"model": random_weights()}, path)
    whole = path.read_bytes()
    if "cut" in kind:
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif "empty" in kind:
        path.write_bytes(b"")
    elif "text" in kind:
        path.write_text("<html>404: not found</html>")
    elif "list" in kind:
        path.write_bytes(pickle.dumps([1, 2])) if "pkl" in kind else torch.save([1], path)
    elif "missing" in kind:
        path.unlink()
    elif "folder" in kind:
        path.unlink()
        path.mkdir()
    elif "weightless" in kind:
        torch.save({"iteration": 3}, path)
    return path


@pytest.mark.parametrize(
    "kind", [f"{e} {k}" for e in ("pkl", "pth") for k in "cut empty text list missing folder".split()]
)
def test_damaged_files_get_one_line(tmp_path, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(UserError, match=r"w\.p(kl|th)") as error:
        tool.main([str(path)])
    assert "\n" not in str(error.value) and len(str(error.value)) < 250 + len(str(path))


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        (
            ["--include", "nothing*"],
            "no 4-D weight matches --include nothing* less --exclude *deconv*; there are: a, b",
        ),
        (
            ["--criterion", "taylor"],
            "criterion 'taylor' looks at training batches: give --config-file and --batches, or",
        ),
        (["--batches", "-1"], "--batches must be at least 0, got -1"),
        (["--batches", "2"], "--batches 2 needs --config-file"),
        (["--register", "mine", "my.json", "images"], "--register mine my.json images needs --config-file"),
        (["--criterion", "nope"], "REPR.CRITERION must be one of"),
        (["--drop-ratio", "1.5"], "REPR.DROP_RATIO must be in (0, 1), got 1.5"),
        (["--max-drop-per-layer", "0.1"], "REPR.MAX_DROP_PER_LAYER 0.1 lets"),
        (["--pairs", "-1"], "pairs must be at least 0, got -1"),
        (["--json", "no/such/folder.json"], "--json no/such/folder.json: the folder no/such does not exist"),
        (["--plot", "{tmp}/x.nope"], "Format 'nope' is not supported"),
        (["REPR.DROP_RATIO", "0.2"], "config options REPR.DROP_RATIO 0.2 need --config-file"),
        (["--config-file", "nope.yaml"], "--config-file 'nope.yaml' is not a file"),
        (["--config-file", str(ROOT / "configs/repr_r50_fpn.yaml"), "--include", "a"], "go without --config-file"),
    ],
)
def test_wrong_arguments_get_one_line(tmp_path, args, fragment):
    torch.save(random_weights(), tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        tool.main([str(tmp_path / "w.pth"), *(a.replace("{tmp}", str(tmp_path)) for a in args)])
    assert fragment in str(error.value) and "\n" not in str(error.value)


def test_weightless_checkpoint_says_what_it_holds(tmp_path):
    with pytest.raises(UserError, match="no weights found; it holds iteration"):
        tool.main([str(damaged(tmp_path, "pth weightless"))])


def test_exit_status_and_stderr(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["analyze_filters.py", str(tmp_path / "none.pth")])
    with pytest.raises(SystemExit) as stopped:
        tool.run_tool(tool.main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("analyze_filters.py: error: ")
