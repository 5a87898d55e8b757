"""The warning before the first step of a run that fine-tunes a trained backbone for few iterations."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import R18, SCHEDULE, At, interrupt, trained
from detectron2.modeling import build_model

from repr_det import RePrHook, Trainer
from repr_det.detectron.hook import ADVICE, SHORT, fine_tuning_warning

BACKBONE, FPN = "backbone.bottom_up.res3.0.conv1", "backbone.fpn_output2"
C4 = "roi_heads.res5.0.conv1"  # from the same weights as the backbone


@pytest.mark.parametrize(
    ("weights", "iterations", "epochs", "spares", "names", "not_silent", "warns"),
    [
        ("x.pkl", 800, 12.0, False, [BACKBONE], [], True),
        ("x.pkl", 800, 12.0, False, [FPN, C4], [FPN, C4], True),
        ("x.pkl", SHORT - 1, None, False, [BACKBONE], [BACKBONE], True),
        ("x.pkl", SHORT, 2.1, False, [BACKBONE], [BACKBONE], False),
        ("x.pkl", 90_000, 1.5, False, [BACKBONE], [BACKBONE], True),  # the same schedule with 2 images a batch
        ("", 800, 12.0, False, [BACKBONE], [BACKBONE], False),
        ("x.pkl", 800, 12.0, False, [FPN, "roi_heads.box_head.conv1"], [FPN], False),
        ("x.pkl", 800, 12.0, True, [FPN, BACKBONE], [FPN], False),
        ("x.pkl", 800, 12.0, True, [BACKBONE], [BACKBONE], True),
    ],
)
def test_who_is_warned(weights, iterations, epochs, spares, names, not_silent, warns):
    layers = [SimpleNamespace(name=name) for name in names]
    criterion, options = SimpleNamespace(spares=spares), SimpleNamespace(drop_ratio=0.3)
    scheme = SimpleNamespace(layers=layers, not_silent=not_silent, criterion=criterion, options=options)
    warning = fine_tuning_warning(weights, iterations, epochs, scheme)
    assert (warning is not None) == warns
    if warns:
        length = f"{iterations} iterations" if epochs is None else f"{iterations} iterations ({epochs:.3g} epochs)"
        assert f"{length} from trained weights (x.pkl)" in warning and ADVICE in warning
        assert "30 % of the filters of 1 trained convs" in warning


def test_one_warning_before_the_first_step_and_none_on_resume(tiny_cfg, tmp_path, caplog):
    torch.save({"model": build_model(tiny_cfg()).state_dict()}, tmp_path / "trained.pth")
    keys = *SCHEDULE, "MODEL.WEIGHTS", tmp_path / "trained.pth", "DATASETS.TEST", "()"
    trained(tiny_cfg(*keys))
    assert caplog.text.count(ADVICE) == 1
    trained(tiny_cfg(*keys, "SOLVER.MAX_ITER", 10), resume=True)
    assert caplog.text.count(ADVICE) == 1


def test_the_config_for_fine_tuning_has_no_conv_that_cannot_return_silently(tiny_cfg):
    """A ResNet-50 with FrozenBN, at a quarter of its width: conv1 and conv2 of res3 to res5 participate."""
    small = "MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.NORM FrozenBN MODEL.RESNETS.WIDTH_PER_GROUP 8 SOLVER.STEPS () "
    small += "MODEL.RESNETS.STEM_OUT_CHANNELS 16 MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.BACKBONE.FREEZE_AT 2"
    for exclude, convs, not_silent in (((), "12", ""), (("REPR.LAYERS.EXCLUDE", []), "123", "3")):
        cfg = tiny_cfg(*R18, *small.split(), *exclude, "SOLVER.MAX_ITER", 800, config="repr_r50_fpn_redundant.yaml")
        trainer = Trainer(cfg)
        trainer.register_hooks([At(0, interrupt)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        scheme = next(hook.scheme for hook in trainer._hooks if isinstance(hook, RePrHook))
        modules = [name for name, _ in trainer.model.named_modules()]
        names = [name for name in modules if re.fullmatch(rf".*res[345]\.\d+\.conv[{convs}]", name)]
        assert {layer.name for layer in scheme.layers} == set(names) and len(names) == len(convs) * 13
        assert set(scheme.not_silent) == {name for name in names if name[-1] in not_silent}
