"""The options are described once: keyword arguments, config keys, what a resume compares and errors follow from it."""

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from plain_nets import loss_of, readable_net

from repr_det import RePr, UserError
from repr_det.method.errors import OptionError
from repr_det.method.options import CONFIG_KEYS, RePrOptions, about_option, option_names
from repr_det.method.scheme import check_resumed

OTHERS = {
    "s1_iters": 3, "s2_iters": 2, "num_cycles": 1, "start_iter": 2, "drop_ratio": 0.2, "max_drop_per_layer": 0.7,
    "criterion": "random", "criterion_batches": 3, "layers": ["0"], "exclude": ["3"], "scale": "old",
    "frozen_norm": "keep", "calibration_batches": 2, "returns": "function_preserving", "warmup_iters": 5,
}  # fmt: skip
PAIRS = {"s1_iters": {"s2_iters": 4}, "s2_iters": {"s1_iters": 6}}  # set together


def built(**options) -> RePr:
    net = readable_net()
    one = RePr(net, torch.optim.SGD(net.parameters(), 0.1), 40, **options)
    loss_of(net).backward()
    one.step()
    return one


@pytest.mark.parametrize("name", option_names())
def test_a_run_is_resumed_with_the_same_options_alone(name):
    rest = PAIRS.get(name, {})
    mine = built(**({"s1_iters": 6, "s2_iters": 4} if rest else {}))
    built().load_state_dict(built().state_dict())
    with pytest.raises(UserError) as error:
        built(**{name: OTHERS[name]} | rest).load_state_dict(mine.state_dict())
    by_schedule = not about_option(name).resumed
    assert ("trained with RePrSchedule(" if by_schedule else f"trained with {name}= ") in str(error.value)
    assert "\n" not in str(error.value)


def test_states_without_an_option_are_taken():
    """Of versions that did not have it, or did not save any."""
    saved = RePrOptions().resumed()
    del saved["REPR.DROP_RATIO"]
    check_resumed(saved, RePrOptions(drop_ratio=0.1).resumed())
    check_resumed({}, RePrOptions(drop_ratio=0.1).resumed())
    with pytest.raises(OptionError, match=r"^the checkpoint was trained with scale= kept, this run has old"):
        check_resumed(saved, RePrOptions(scale="old").resumed())


def smallest_first(layer):
    return -layer.weight.flatten(1).norm(dim=1)


def test_a_function_is_saved_by_its_name(tmp_path):
    state = built(criterion=smallest_first).state_dict()
    torch.save(state, tmp_path / "state.pth")
    loaded = torch.load(tmp_path / "state.pth", weights_only=True)
    assert loaded["scheme"]["options"]["REPR.CRITERION"] == f"{__name__}.smallest_first"
    built(criterion=smallest_first).load_state_dict(loaded)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"s1_iters": -1}, "{s1_iters} must be an integer of at least 0, got -1"),
        ({"s1_iters": 3}, "{s1_iters} is 3 and {s2_iters} 0: set both, or leave both 0 to derive them"),
        ({"num_cycles": 2.5}, "{num_cycles} must be an integer of at least 1, got 2.5"),
        ({"num_cycles": True}, "{num_cycles} must be an integer of at least 1, got True"),
        ({"drop_ratio": 0}, "{drop_ratio} must be in (0, 1), got 0"),
        ({"drop_ratio": "0.3"}, "{drop_ratio} must be in (0, 1), got '0.3'"),
        ({"drop_ratio": float("nan")}, "{drop_ratio} must be in (0, 1), got nan"),
        ({"max_drop_per_layer": 1.1}, "{max_drop_per_layer} must be in (0, 1], got 1.1"),
        ({"max_drop_per_layer": 0.2}, "{max_drop_per_layer} must be at least {drop_ratio} 0.3, got 0.2"),
        ({"scale": "big"}, "{scale} must be one of kept, old, unit, got 'big'"),
        ({"warmup_iters": -2}, "{warmup_iters} must be an integer of at least -1, got -2"),
        ({"returns": "median_gamma"}, "{returns} median_gamma went in version 0.3.0: take function_preserving"),
    ],
)
def test_errors_name_what_was_written(given, message):
    with pytest.raises(OptionError) as error:
        RePrOptions(**given)
    keywords = {name: f"{name}=" for name in option_names()}
    assert str(error.value) == message.format_map(keywords)
    assert str(error.value.spelled(CONFIG_KEYS)) == message.format_map(CONFIG_KEYS)


def test_what_is_no_option_is_refused_with_those_that_are():
    with pytest.raises(OptionError, match=rf"RePr has no option 'ratio': take one of {', '.join(option_names())}$"):
        RePrOptions.of({"drop_ratio": 0.2, "ratio": 0.3})


def test_options_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RePrOptions().drop_ratio = 0.5


ONE_MORE = """
    patience: int = _option(4, "REINIT.PATIENCE", "Steps that a new filter waits.", least=1)

    def __post_init__"""
USES_IT = """
from detectron2.config import LazyCall, get_cfg
from omegaconf import OmegaConf
from repr_det import RePr, RePrHook, UserError, add_repr_config, validate_repr_config
from repr_det.detectron.lazy import repr_cfg_from_lazy
from repr_det.method.options import RePrOptions
from repr_det.method.scheme import check_resumed

def said(call):
    try:
        call()
    except UserError as error:
        return str(error)

cfg = get_cfg()
add_repr_config(cfg)
print(cfg.REPR.REINIT.PATIENCE)
print(RePrOptions.of({"patience": 7}).patience)
print(RePrHook(patience=5).options.patience)
print(said(lambda: RePrOptions(patience=0)))
cfg.merge_from_list(["REPR.ENABLED", True, "REPR.REINIT.PATIENCE", 0])
print(said(lambda: validate_repr_config(cfg)))
lazy = OmegaConf.create({"train": {"max_iter": 100}, "repr": {"REINIT": {"PATIENCE": 9}}})
print(repr_cfg_from_lazy(lazy).REPR.REINIT.PATIENCE)
print(said(lambda: check_resumed(RePrOptions().resumed(), RePrOptions(patience=6).resumed())))
"""


def test_a_new_option_is_one_edit(tmp_path):
    """In a copy of the package: a field more, and everything else knows it."""
    package = tmp_path / "repr_det"
    shutil.copytree(ROOT / "repr_det", package, ignore=shutil.ignore_patterns("__pycache__"))
    description = package / "method" / "options.py"
    text = description.read_text()
    assert text.count("\n    def __post_init__") == 1
    description.write_text(text.replace("\n    def __post_init__", ONE_MORE))
    (tmp_path / "uses_it.py").write_text(USES_IT)
    done = subprocess.run(
        [sys.executable, "uses_it.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "4",
        "7",
        "5",
        "patience= must be an integer of at least 1, got 0",
        "REPR.REINIT.PATIENCE must be an integer of at least 1, got 0",
        "9",
        "the checkpoint was trained with patience= 4, this run has 6: resume with that of the run that wrote it, or "
        "start again elsewhere",
    ]


@pytest.mark.parametrize("names", [None, CONFIG_KEYS])
@pytest.mark.parametrize("typed", ["{conv1,conv2}.*", "{", "}{", "{0}"])
def test_braces_that_a_user_typed_stay_what_they_are(typed, names):
    error = OptionError(f"{{layers}} {[typed]} matches nothing")
    error = error if names is None else error.spelled(names)
    assert str(error) == f"{'layers=' if names is None else names['layers']} {[typed]} matches nothing"
