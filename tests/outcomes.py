"""The outcome of a run of the tiny detector, to be compared bit for bit."""

import json

import torch
from conftest import SMALL


def train_words(data, folder, *opts, flags=()):
    """``repr-det train`` of the tiny detector on the tiny data."""
    words = ["repr-det", "train", *flags, "--config-file", "baseline_r50_fpn.yaml"]
    for name in ("tiny_train", "tiny_val"):
        words += ["--register", name, data / "tiny.json", data / "images"]
    return [*words, *SMALL, "OUTPUT_DIR", folder, *opts]


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcome(folder):
    """Weights, optimizer state, transitions and logged rows."""
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    rows = json_lines(folder / "metrics.json")
    assert len({row["iteration"] for row in rows}) == len(rows)
    return {
        "model": saved["model"],
        "optimizer": saved["trainer"]["_trainer"]["optimizer"]["state"],
        "events": [{**line, "seconds": 0} for line in json_lines(folder / "repr_events.jsonl")],
        "rows": [{k: v for k, v in row.items() if "time" not in k and "eta" not in k} for row in rows],
    }


def assert_same(a, b, path=""):
    """Nested dicts, lists, tensors and numbers."""
    if torch.is_tensor(b):
        assert torch.equal(a, b), path
    elif isinstance(b, dict):
        assert a.keys() == b.keys(), path
        for key, value in b.items():
            assert_same(a[key], value, f"{path}/{key}")
    elif isinstance(b, (list, tuple)):
        assert_same(dict(enumerate(a)), dict(enumerate(b)), path)
    else:
        assert a == b or (a != a and b != b), (path, a, b)  # AP is NaN if there are no such objects
