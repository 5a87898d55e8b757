"""Files of weights that nobody vouches for: what a turned or damaged file can do is one clear line, never a crash."""

import collections
import pickle
import random
import resource
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from torch import nn

from repr_det import UserError
from repr_det.runs.checkpoints import AtomicCheckpointer
from repr_det.runs.safe_pickle import load_checkpoint, load_restricted

GENUINE = {
    "model": collections.OrderedDict(
        w=np.arange(12, dtype=np.float32).reshape(3, 4),
        f=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        big=np.arange(4, dtype=">i4"),
        half=np.ones(2, np.float16),
        flag=np.array([True, False]),
        empty=np.zeros((0, 3)),
        point=np.array(2.5),
        number=np.float64(1.25),
    ),
    "__author__": "me",
    "more": [1, 2**70, 1.5, (None, True, "é"), b"\x00\xff", {"a"}],
}


@pytest.mark.parametrize("protocol", range(6))
def test_genuine_files_of_every_protocol(tmp_path, protocol):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(GENUINE, protocol=protocol))
    found = load_restricted(tmp_path / "w.pkl")
    assert found["more"] == GENUINE["more"] and type(found["model"]) is collections.OrderedDict
    for name, value in GENUINE["model"].items():
        got = found["model"][name]
        assert type(got) is type(value) and got.dtype == value.dtype, name
        np.testing.assert_array_equal(got, value)
        assert got.flags.f_contiguous == value.flags.f_contiguous and got.flags.writeable == value.flags.writeable


PLAIN = (np.ndarray, np.generic, torch.Tensor, torch.dtype, torch.Size, int, float, complex, str, bytes, bytearray)
PLAIN = (*PLAIN, type(None))


class Turned:
    """Pickles as a call of ``name`` with ``arguments``, then BUILD with ``state``."""

    def __init__(self, name, arguments, state=None):
        self.call = (name, arguments) if state is None else (name, arguments, state)

    def __reduce__(self):
        return self.call


scalar = (np._core if hasattr(np, "_core") else np.core).multiarray.scalar
reconstruct = (np._core if hasattr(np, "_core") else np.core).multiarray._reconstruct
OBJECT_FLAGS = (3, "<", None, None, None, -1, -1, 63)  # "its items are pointers"


def attacks():
    as_pointers = Turned(np.dtype, ("f8", False, True), OBJECT_FLAGS)
    return {
        "a number whose dtype says that it is a pointer": Turned(scalar, (as_pointers, b"\x41" * 8)),
        "an array of them": Turned(reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), as_pointers, False, b"\x41" * 8)),
        "a dtype with fields": Turned(np.dtype, ("f8", False, True), (3, "<", None, ("a",), {"a": 1}, 8, 1, 0)),
        "a dtype of objects": Turned(scalar, (Turned(np.dtype, ("O8", False, True)), [])),
        "a void dtype": Turned(scalar, (Turned(np.dtype, ("V8", False, True)), b"12345678")),
        "too few bytes": Turned(reconstruct, (np.ndarray, (0,), b"b"), (1, (9, 9), np.dtype("f8"), False, b"1234")),
        "a negative shape": Turned(
            reconstruct, (np.ndarray, (0,), b"b"), (1, (-1,), np.dtype("f8"), False, b"8 bytes.")
        ),
        "no content": Turned(reconstruct, (np.ndarray, (0,), b"b")),
        "a state for a container": Turned(collections.OrderedDict, (), {"x": 1}),
    }


def load_each(*paths):
    for path in paths:
        try:
            print("VALUE", load_restricted(path)["model"]["w"])
        except UserError as error:
            print(error)


def test_turned_files(tmp_path):
    """In a process of its own, so that a crash is seen."""
    paths = [tmp_path / f"{number}.pkl" for number in range(len(attacks()))]
    for path, attack in zip(paths, attacks().values(), strict=True):
        path.write_bytes(pickle.dumps({"model": {"w": attack}}, protocol=2))
    status, text = forked.run(["test_safe_pickle:load_each", *paths], tmp_path / "log")
    assert status == 0, text
    for path, name, line in zip(paths, attacks(), text.splitlines(), strict=True):
        if "pointer" in name or name == "an array of them":  # the claim is not looked at: eight bytes are a number
            assert line.startswith("VALUE") and "2261634.5" in line, (name, line)
        else:
            assert line.startswith(f"{path}: "), (name, line)


def is_plain(value):
    if isinstance(value, dict):
        return all(map(is_plain, [*value, *value.values()]))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(is_plain, value))
    return isinstance(value, PLAIN)


def mutated(genuine, rng):
    content = bytearray(genuine)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, end = sorted((rng.randrange(len(content)), rng.randrange(len(content))))
        end = min(end, at + 40)
        kind = rng.randrange(6)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at] = rng.randrange(256)
        elif kind == 2:
            del content[at:end]
        elif kind == 3:
            content[at:at] = content[at:end]
        elif kind == 4:
            content[at:at] = bytes([rng.choice(b"Rb)}](.0122aesuq\x81\x93\x85\x8a\x94tlodc")])
        else:
            content = content[: max(at, 1)]
        content = content or bytearray(b".")
    return content


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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak < 3 * gigabyte, f"{peak} bytes for files of a few kB"


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


@pytest.mark.parametrize("size", [2**33, 2**40])
@pytest.mark.parametrize("opcode", [pickle.BYTEARRAY8, pickle.BINBYTES8, pickle.BINUNICODE8])
def test_a_length_that_the_file_does_not_have(tmp_path, opcode, size):
    """Eight bytes of damage say that 8 GB follow: no memory is taken for them."""
    path = tmp_path / "long.pkl"
    path.write_bytes(pickle.PROTO + b"\x05" + opcode + size.to_bytes(8, "little") + b"abc.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="not a readable pickle of weights, perhaps cut short"):
        load_restricted(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


def test_containers_that_hold_themselves_or_one_another(tmp_path):
    many = []
    for _ in range(60):
        many = [many, many]  # 2 ** 60 lists, if each were looked at
    own = {"w": np.ones(2)}
    own["itself"] = own
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"own": own, "many": many}))
    found = load_restricted(tmp_path / "w.pkl")
    assert found["own"]["itself"] is found["own"] and len(found["many"]) == 2


def test_a_git_lfs_pointer_is_named(tmp_path):
    for name in ("w.pkl", "w.pth"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(UserError, match=f"{name} is a Git LFS pointer, not the file itself: git lfs pull"):
            load_checkpoint(tmp_path / name)


def test_pycls_files_go_through_the_same_door(tmp_path):
    class Bomb:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"model_state": {"w": Bomb()}}, tmp_path / "w.pyth")
    checkpointer = AtomicCheckpointer(nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"w.pyth: refused, it names .*print"):
        checkpointer.load(str(tmp_path / "w.pyth"))
    torch.save({"something": 1}, tmp_path / "other.pyth")
    with pytest.raises(UserError, match="lie under 'model_state'"):
        AtomicCheckpointer(nn.Linear(1, 1)).load(str(tmp_path / "other.pyth"))
    torch.save({"model_state": {"weight": torch.ones(1, 1), "bias": torch.ones(1)}}, tmp_path / "good.pyth")
    net = nn.Linear(1, 1)
    AtomicCheckpointer(net).load(str(tmp_path / "good.pyth"))
    assert net.weight.item() == net.bias.item() == 1


def test_tensors_of_a_checkpoint_need_not_be_read(tmp_path):
    torch.save({"model": {"w": torch.ones(3)}, "iteration": 3}, tmp_path / "c.pth")
    found = load_checkpoint(tmp_path / "c.pth", map_location="meta")
    assert found["iteration"] == 3 and found["model"]["w"].is_meta
