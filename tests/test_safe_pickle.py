"""Files of weights that nobody vouches for: arrays and plain containers come out, all else is one line by name; nothing
is executed."""

import collections
import os
import pickle
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from torch import nn

from repr_det import UserError
from repr_det.runs.checkpoints import AtomicCheckpointer
from repr_det.runs.safe_pickle import load_checkpoint

GENUINE = {
    "model": collections.OrderedDict(
        w=np.arange(12, dtype=np.float32).reshape(3, 4),
        f=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        half=np.ones(2, np.float16),
        flag=np.array([True, False]),
        empty=np.zeros((0, 3)),
        point=np.array(2.5),
        number=np.float64(1.25),
    ),
    "__author__": "me",
    "more": [1, 2**70, 1.5, (None, True, "é"), b"\x00\xff", {"a"}],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_genuine_files_of_every_protocol(tmp_path, protocol):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(GENUINE, protocol=protocol))
    found = load_checkpoint(tmp_path / "w.pkl")
    assert found["more"] == GENUINE["more"] and type(found["model"]) is collections.OrderedDict
    for name, value in GENUINE["model"].items():
        got = found["model"][name]
        assert type(got) is type(value) and got.dtype == value.dtype, name
        np.testing.assert_array_equal(got, value)
        assert got.flags.f_contiguous == value.flags.f_contiguous and got.flags.writeable == value.flags.writeable


def test_what_python_2_wrote(tmp_path):
    """The bytes of an array are a `str`: opcode U instead of C, of as many bytes."""
    array = np.array([1.5, -2.0, 1e30], dtype="<f4")
    content = pickle.dumps({"conv1_w": array}, protocol=3).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "py2.pkl").write_bytes(content.replace(b"C\x0c", b"U\x0c").replace(b"C\x01b", b"U\x01b"))
    np.testing.assert_array_equal(load_checkpoint(tmp_path / "py2.pkl")["conv1_w"], array)


def test_containers_that_hold_themselves_or_one_another(tmp_path):
    own = {"many": []}
    for _ in range(60):
        own = {"many": [own, own]}  # 2 ** 60 dicts, if each were looked at
    own["itself"] = own
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(own))
    found = load_checkpoint(tmp_path / "w.pkl")
    assert found["itself"] is found and len(found["many"]) == 2


class Turned:
    """Pickles as a call of ``function`` with ``arguments``, then BUILD with ``state``."""

    def __init__(self, function, arguments=(), state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("thing", "named"),
    [
        (Turned(os.system, ("touch executed",)), f"{os.system.__module__}.system"),
        (Turned(eval, ("open('executed', 'w')",)), "builtins.eval"),
        (Turned(np.lib.npyio.NpzFile), "numpy.lib"),
        (Path("x"), "pathlib"),
        (torch.zeros(2), "torch._utils._rebuild_tensor_v2"),
        (np.random.RandomState(0), "numpy.random"),
        (object, "builtins.object"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_everything_else_is_refused_by_name(tmp_path, monkeypatch, thing, named, protocol):
    monkeypatch.chdir(tmp_path)
    named = named if protocol > 2 else named.replace("builtins", "__builtin__")  # Python 2's name
    Path("bad.pkl").write_bytes(pickle.dumps({"model": {"w": np.zeros(3), "x": thing}}, protocol=protocol))
    assert refused(load_checkpoint, "bad.pkl").startswith(f"bad.pkl: refused, it names {named}")
    assert not Path("executed").exists()


def test_torch_and_pycls_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net, attack = nn.Linear(1, 1), Turned(os.system, ("touch executed",))
    for name, content, message in (
        ("bad.pth", {"model": {"w": attack}}, "^bad.pth: refused, it names .*system.*$"),
        ("bad.pyth", {"model_state": {"w": attack}}, "^bad.pyth: refused, it names .*system.*$"),
        ("other.pyth", {"something": 1}, "^other.pyth has no 'model_state'"),
    ):
        torch.save(content, name)
        with pytest.raises(UserError, match=message):
            AtomicCheckpointer(net).load(name)
    assert not Path("executed").exists()
    torch.save({"model_state": {"weight": torch.ones(1, 1), "bias": torch.ones(1)}}, "good.pyth")
    AtomicCheckpointer(net).load("good.pyth")
    assert net.weight.item() == net.bias.item() == 1


multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray
POINTERS = Turned(np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63))  # "its items are pointers"


def array_of(*state):
    return Turned(multiarray._reconstruct, (np.ndarray, (0,), b"b"), state)


@pytest.mark.parametrize(
    ("attack", "value"),
    [
        (array_of(1, (1,), POINTERS, False, b"\x41" * 8), [2261634.51]),  # the claim is not looked at
        (Turned(multiarray._reconstruct, (np.ndarray, (0,), b"b")), []),  # without content
        (Turned(multiarray.scalar, (Turned(np.dtype, ("O8", False, True)), [])), None),
        (Turned(multiarray.scalar, (Turned(np.dtype, ("V8", False, True)), b"12345678")), None),
        (np.ones(2, ">f4"), None),
        (array_of(1, (9, 9), np.dtype("f8"), False, b"1234"), None),
        (array_of(1, (-1,), np.dtype("f8"), False, b"8 bytes."), None),
        (Turned(collections.OrderedDict, (), {"x": 1}), None),  # a state for a container
        (np.dtype, None),  # a name as a value
    ],
)
def test_turned_files_give_numbers_or_an_error(tmp_path, attack, value):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"w": attack}, protocol=2))
    if value is None:
        assert "w.pkl: " in refused(load_checkpoint, tmp_path / "w.pkl")
    else:
        assert load_checkpoint(tmp_path / "w.pkl")["w"].tolist() == pytest.approx(value)


@pytest.mark.parametrize("opcode", [pickle.BYTEARRAY8, pickle.BINBYTES8, pickle.BINUNICODE8])
def test_a_length_that_the_file_does_not_have_takes_no_memory(tmp_path, opcode):
    path = tmp_path / "long.pkl"
    path.write_bytes(pickle.PROTO + b"\x05" + opcode + (2**33).to_bytes(8, "little") + b"abc.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "not a readable pickle of weights, perhaps cut short" in refused(load_checkpoint, path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


PLAIN = (np.ndarray, np.generic, torch.Tensor, torch.dtype, int, float, complex, str, bytes, bytearray, type(None))


def is_plain(value):
    if isinstance(value, dict):
        return is_plain([*value, *value.values()])
    return all(map(is_plain, value)) if isinstance(value, (list, tuple, set, frozenset)) else isinstance(value, PLAIN)


def mutated(genuine, rng):
    content = bytearray(genuine)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, size = rng.randrange(len(content)), rng.randrange(40)
        part, opcode = content[at : at + size], rng.choice(b"Rb)}](.0122aesuq\x81\x93\x85\x8a\x94tlodc")
        changes = (bytes([rng.randrange(256)]) + part[1:], b"", part + part, bytes([opcode]) + part)
        content[at : at + size] = rng.choice(changes)
    return content[: rng.randrange(len(content))] if rng.random() < 0.1 else content


@pytest.mark.parametrize("kind", ["zip.pth", "old.pth", "0.pkl", "2.pkl", "4.pkl", "5.pkl"])
def test_mutated_files_are_an_error_or_plain(tmp_path, kind):
    target, rng, loaded = tmp_path / f"w{Path(kind).suffix}", random.Random(kind), 0
    if target.suffix == ".pth":
        tensors = {"model": {"w": torch.arange(12.0).reshape(3, 4), "n": torch.tensor(3)}, "iteration": 3}
        torch.save(tensors, target, _use_new_zipfile_serialization=kind.startswith("zip"))
    else:
        target.write_bytes(pickle.dumps(GENUINE, protocol=int(kind[0])))
    genuine, before = target.read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        target.write_bytes(mutated(genuine, rng))
        try:
            value = load_checkpoint(target)
        except UserError as error:
            assert "\n" not in str(error), error
        else:
            loaded += 1
            assert is_plain(value), value
    assert 0 < loaded < 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**21, "for files of a few kB"


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "w.pkl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "w.pkl is a Git LFS pointer, not the file itself: git lfs" in refused(load_checkpoint, tmp_path / "w.pkl")
