"""The restricted unpickler reads arrays and plain containers, and refuses all else by name, executing nothing."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from repr_det import UserError
from repr_det.runs.safe_pickle import load_checkpoint, load_restricted


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
