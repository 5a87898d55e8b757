"""The warning before the first step of a run that fine-tunes a trained backbone for few iterations."""

import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_model
from test_hook import SCHEDULE, trained

from repr_det import RePrHook, Trainer
from repr_det.commands.arguments import build_config
from repr_det.detectron.fine_tuning import MEASURED, SHORT, fine_tuning_warning

BACKBONE, FPN = "backbone.bottom_up.res3.0.conv1", "backbone.fpn_output2"
C4 = "roi_heads.res5.0.conv1"  # from the same weights as the backbone
NEW = [FPN, "proposal_generator.rpn_head.conv", "roi_heads.box_head.conv1"]


@pytest.mark.parametrize(
    ("weights", "iterations", "criterion", "names", "loud", "warns"),
    [
        ("x.pkl", 800, "ortho", [BACKBONE], [BACKBONE], True),
        ("x.pkl", 800, "ortho", [BACKBONE], [], True),
        ("x.pkl", 800, "ortho", [C4], [C4], True),
        ("x.pkl", 800, "ortho", [FPN, BACKBONE], [FPN, BACKBONE], True),
        ("x.pkl", SHORT - 1, "ortho", [BACKBONE], [BACKBONE], True),
        ("x.pkl", SHORT, "ortho", [BACKBONE], [BACKBONE], False),
        ("", 800, "ortho", [BACKBONE], [BACKBONE], False),
        ("x.pkl", 800, "ortho", NEW, NEW, False),
        ("x.pkl", 800, "redundant", [BACKBONE], [], False),
        ("x.pkl", 800, "redundant", [FPN, BACKBONE], [FPN], False),
        ("x.pkl", 800, "redundant", [BACKBONE], [BACKBONE], True),
    ],
)
def test_who_is_warned(tiny_cfg, weights, iterations, criterion, names, loud, warns):
    cfg = tiny_cfg("SOLVER.MAX_ITER", iterations, "MODEL.WEIGHTS", weights, "REPR.CRITERION", criterion)
    scheme = SimpleNamespace(layers=[SimpleNamespace(name=name) for name in names], loud=loud)
    warning = fine_tuning_warning(cfg, scheme)
    assert (warning is not None) == warns
    if warns:
        assert f"{iterations} iterations from trained weights (MODEL.WEIGHTS x.pkl)" in warning and MEASURED in warning
        assert f"30 % of the filters of {sum(name != FPN for name in names)} trained convs" in warning


def test_one_warning_before_the_first_step_and_none_on_resume(tiny_cfg, tmp_path, caplog):
    torch.save({"model": build_model(tiny_cfg()).state_dict()}, tmp_path / "trained.pth")
    cfg = tiny_cfg(*SCHEDULE, "MODEL.WEIGHTS", tmp_path / "trained.pth", "DATASETS.TEST", "()")
    with caplog.at_level(logging.WARNING, "repr_det.hook"):
        trained(Trainer, cfg)
        warnings = [record for record in caplog.records if MEASURED in record.getMessage()]
        assert len(warnings) == 1
        caplog.clear()
        longer = cfg.clone()
        longer.defrost()
        longer.SOLVER.MAX_ITER = 10
        trained(Trainer, longer, resume=True)
    assert not any(MEASURED in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("depth", "blocks"), [(50, [4, 6, 3]), (101, [4, 23, 3])])
def test_in_the_form_for_fine_tuning_no_conv_returns_loud(depth, blocks):
    """Of stock models, FrozenBN and all: conv1 and conv2 of res3 to res5 take part, and nobody is warned."""
    config = str(ROOT / f"configs/repr_r{depth}_fpn_redundant.yaml")
    quick = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    model = build_model(build_config(config, quick))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    found = {}
    for form, opts in (("as it is", []), ("with conv3", ["REPR.LAYERS.EXCLUDE", "[]"])):
        cfg = build_config(config, [*quick, *opts, "SOLVER.STEPS", "()", "SOLVER.MAX_ITER", "800"])
        hook = RePrHook(cfg)
        hook.trainer = SimpleNamespace(model=model, optimizer=optimizer, data_loader=[])
        cfg.defrost()
        cfg.MODEL.WEIGHTS = "x.pkl"
        scheme = hook._build_scheme()
        found[form] = {layer.name for layer in scheme.layers}, set(scheme.loud), fine_tuning_warning(cfg, scheme)
    stages = zip((3, 4, 5), blocks, strict=True)
    convs = [f"backbone.bottom_up.res{stage}.{block}.conv" for stage, count in stages for block in range(count)]
    assert found["as it is"] == ({conv + number for conv in convs for number in "12"}, set(), None)
    names, loud, warning = found["with conv3"]
    assert names == {conv + number for conv in convs for number in "123"} and loud == {conv + "3" for conv in convs}
    assert MEASURED in warning
