"""Files of weights that nobody vouches for: arrays and plain containers come out, all else is one line by name; nothing
is executed, and nothing ends the process."""

import collections
import os
import pickle
import random
import resource
import struct
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
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
    """The bytes of an array are a `str`."""
    data = np.array([1.5, -2.0, 1e30], dtype="<f4").tobytes()

    def text(value: bytes) -> bytes:
        return b"U" + struct.pack("<B", len(value)) + value  # SHORT_BINSTRING

    dtype = b"cnumpy\ndtype\n" + text(b"f4") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01K\x03\x85" + dtype + b"\x89" + text(data) + b"tb"
    (tmp_path / "py2.pkl").write_bytes(b"\x80\x02}" + text(b"conv1_w") + array + b"s.")
    assert load_checkpoint(tmp_path / "py2.pkl")["conv1_w"].tolist() == np.frombuffer(data, "<f4").tolist()


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
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_everything_else_is_refused_by_name(tmp_path, monkeypatch, thing, named, protocol):
    monkeypatch.chdir(tmp_path)
    named = named if protocol > 2 else named.replace("builtins", "__builtin__")  # Python 2's name
    Path("bad.pkl").write_bytes(pickle.dumps({"model": {"w": np.zeros(3), "x": thing}}, protocol=protocol))
    with pytest.raises(UserError, match=rf"^bad.pkl: refused, it names {named}") as error:
        load_checkpoint("bad.pkl")
    assert "\n" not in str(error.value) and not Path("executed").exists()


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


TURNED = {
    # The claim is not looked at: eight bytes are a number.
    "a number whose dtype says that it is a pointer": (Turned(multiarray.scalar, (POINTERS, b"\x41" * 8)), "2261634.5"),
    "an array of pointers": (array_of(1, (1,), POINTERS, False, b"\x41" * 8), "2261634.5"),
    "an array without content": (Turned(multiarray._reconstruct, (np.ndarray, (0,), b"b")), "[]"),
    "a dtype of objects": (Turned(multiarray.scalar, (Turned(np.dtype, ("O8", False, True)), [])), None),
    "a void dtype": (Turned(multiarray.scalar, (Turned(np.dtype, ("V8", False, True)), b"12345678")), None),
    "the other byte order": (np.ones(2, ">f4"), None),
    "too few bytes": (array_of(1, (9, 9), np.dtype("f8"), False, b"1234"), None),
    "a negative shape": (array_of(1, (-1,), np.dtype("f8"), False, b"8 bytes."), None),
    "too many dimensions": (array_of(1, (1,) * 99, np.dtype("f8"), False, b"8 bytes."), None),
    "a state for a container": (Turned(collections.OrderedDict, (), {"x": 1}), None),
    "a name as a value": (np.dtype, None),
}


def load_each(*paths):
    for path in paths:
        try:
            print("VALUE", load_checkpoint(path)["w"])
        except UserError as error:
            print(error)


def test_turned_files(tmp_path):
    """In a process of its own, so that a crash is seen."""
    paths = [tmp_path / f"{number}.pkl" for number in range(len(TURNED))]
    for path, (attack, _) in zip(paths, TURNED.values(), strict=True):
        path.write_bytes(pickle.dumps({"w": attack}, protocol=2))
    status, text = forked.run(["test_safe_pickle:load_each", *paths], tmp_path / "log")
    assert status == 0, text
    for path, (name, (_, value)), line in zip(paths, TURNED.items(), text.splitlines(), strict=True):
        assert line.startswith("VALUE" if value else f"{path}: ") and (value or "") in line, (name, line)


@pytest.mark.parametrize("size", [2**33, 2**40])
@pytest.mark.parametrize("opcode", [pickle.BYTEARRAY8, pickle.BINBYTES8, pickle.BINUNICODE8])
def test_a_length_that_the_file_does_not_have(tmp_path, opcode, size):
    path = tmp_path / "long.pkl"
    path.write_bytes(pickle.PROTO + b"\x05" + opcode + size.to_bytes(8, "little") + b"abc.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="not a readable pickle of weights, perhaps cut short"):
        load_checkpoint(path)  # takes no memory for them
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


PLAIN = (np.ndarray, np.generic, torch.Tensor, torch.dtype, int, float, complex, str, bytes, bytearray, type(None))


def is_plain(value):
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        return all(map(is_plain, [*value, *(value.values() if isinstance(value, dict) else ())]))
    return isinstance(value, PLAIN)


def mutated(genuine, rng):
    content = bytearray(genuine)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, size = rng.randrange(len(content)), rng.randrange(40)
        part, opcode = content[at : at + size], rng.choice(b"Rb)}](.0122aesuq\x81\x93\x85\x8a\x94tlodc")
        changes = (bytes([rng.randrange(256)]) + part[1:], b"", part + part, bytes([opcode]) + part)
        content[at : at + size] = rng.choice(changes)
    return content[: rng.randrange(len(content))] if rng.random() < 0.1 else content


def load_mutated(*paths):
    gigabyte = 2**30
    resource.setrlimit(resource.RLIMIT_AS, (16 * gigabyte, 16 * gigabyte))
    for path in map(Path, paths):
        genuine, target = path.read_bytes(), path.with_name("mutated" + path.suffix)
        rng, loaded = random.Random(path.name), 0
        for _ in range(300):
            target.write_bytes(mutated(genuine, rng))
            try:
                value = load_checkpoint(target)
            except UserError as error:
                assert "\n" not in str(error), error
            else:
                loaded += 1
                assert is_plain(value), value
        print(path.name, loaded)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 3 * gigabyte, "for files of a few kB"


def test_mutated_files_are_an_error_or_plain(tmp_path):
    """In a process of its own, so that a crash is seen."""
    tensors = {"model": {"w": torch.arange(12.0).reshape(3, 4), "n": torch.tensor(3)}, "iteration": 3}
    torch.save(tensors, tmp_path / "zip.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for protocol in (0, 2, 4, 5):
        (tmp_path / f"protocol{protocol}.pkl").write_bytes(pickle.dumps(GENUINE, protocol=protocol))
    status, text = forked.run(["test_safe_pickle:load_mutated", *sorted(tmp_path.iterdir())], tmp_path / "log")
    assert status == 0, text[-2000:]
    lines = [line.split() for line in text.splitlines() if ".p" in line[:16]]
    assert len(lines) == 6 and all(0 < int(loaded) < 300 for _, loaded in lines), text


def test_a_git_lfs_pointer_is_named(tmp_path):
    for name in ("w.pkl", "w.pth"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(UserError, match=f"{name} is a Git LFS pointer, not the file itself: git lfs pull"):
            load_checkpoint(tmp_path / name)
