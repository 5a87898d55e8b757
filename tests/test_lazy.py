"""The LazyConfig route: the same schedule, layers and model as the yaml twin, and a short run with resume."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights
from detectron2.config import LazyConfig
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import OmegaConf

from repr_det import RePrHook, UserError, find_filter_layers
from repr_det.commands.arguments import build_config
from repr_det.commands.checks import check_run
from repr_det.commands.lazy_train import load_lazy_config, start
from repr_det.detectron.config import schedule_from_config
from repr_det.detectron.lazy import LazyTrainer, instantiate, naming_lazy_keys, repr_cfg_from_lazy
from repr_det.studies.comparison.records import read_events

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "lazy" / "repr_faster_rcnn_r50_fpn.py")
SMALL = f"""
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

globals().update(LazyConfig.load({CONFIG!r}))
_widths = (8, 8, 12, 16, 24)
model.backbone.bottom_up = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=8, norm="BN"),
    stages=[
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=1,
            stride=1 if number == 0 else 2,
            in_channels=_widths[number],
            out_channels=_widths[number + 1],
            norm="BN",
        )
        for number in range(4)
    ],
    out_features=["res2", "res3", "res4", "res5"],
)
model.backbone.out_channels = 16
model.proposal_generator.head.in_channels = 16
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [48], [64]]
model.proposal_generator.post_nms_topk = (20, 20)
model.roi_heads.box_head.input_shape.channels = 16
model.roi_heads.box_head.fc_dims = [16]
model.roi_heads.box_predictor.input_shape.channels = 16
model.roi_heads.num_classes = 2
dataloader.train.dataset.names = "tiny_train"
dataloader.test.dataset.names = "tiny_val"
dataloader.train.total_batch_size = 1
dataloader.train.num_workers = dataloader.test.num_workers = 0
for _loader in (dataloader.train, dataloader.test):
    _loader.mapper.augmentations[0].short_edge_length = 64
    _loader.mapper.augmentations[0].max_size = 96
optimizer.lr = 0.001
train.update(device="cpu", init_checkpoint="", max_iter=4, eval_period=0, seed=5)
train.checkpointer.period = 2
repr.update(s1_iters=1, s2_iters=2, num_cycles=1)
"""
OLD_NODE = dict(ENABLED=True, S1_ITERS=1, S2_ITERS=2, NUM_CYCLES=1)  # of version 0.2.0


@pytest.fixture
def small_config(tiny_data, tmp_path) -> str:
    (tmp_path / "small.py").write_text(SMALL)
    return str(tmp_path / "small.py")


def test_same_schedule_layers_and_model_as_the_yaml_twin():
    lazy = load_lazy_config(CONFIG, ["train.device=cpu", "train.init_checkpoint="])
    twin = build_config(str(ROOT / "configs/repr_r50_fpn.yaml"), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    yacs = repr_cfg_from_lazy(lazy)
    assert yacs.REPR == twin.REPR and yacs.REPR.ENABLED
    for key in ("IMS_PER_BATCH", "MAX_ITER", "STEPS", "LR_SCHEDULER_NAME", "REFERENCE_WORLD_SIZE"):
        assert yacs.SOLVER[key] == twin.SOLVER[key], key
    assert schedule_from_config(yacs) == schedule_from_config(twin)
    assert RePrHook(yacs).schedule.drop_iters == (9999, 24999, 39999)
    assert (yacs.DATASETS.TRAIN, yacs.DATASETS.TEST) == (twin.DATASETS.TRAIN, twin.DATASETS.TEST)
    assert yacs.DATALOADER.ASPECT_RATIO_GROUPING and yacs.MODEL.ROI_HEADS.NUM_CLASSES == 80
    twin.defrost()
    twin.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        ours, theirs = instantiate(lazy.model), build_model(twin)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    names = [[x.name for x in find_filter_layers(m, yacs.REPR.LAYERS.INCLUDE)] for m in (ours, theirs)]
    assert names[0] == names[1] and len(names[0]) == 39


def test_a_node_of_version_0_2_0_says_the_same(caplog):
    options = {"DROP_RATIO": 0.2, "SLIM": "auto", "LAYERS": {"EXCLUDE": ["*.conv3"]}, "REINIT": {"SCALE": "old"}}
    lazy = load_lazy_config(CONFIG, [])
    lazy.repr.update(s1_iters=1, s2_iters=2, num_cycles=1, drop_ratio=0.2, exclude=["*.conv3"], scale="old")
    new = repr_cfg_from_lazy(lazy)
    assert instantiate(lazy.repr).options.resumed() == RePrHook(new).options.resumed()
    lazy.repr = OLD_NODE | options
    with caplog.at_level(logging.WARNING):
        old = repr_cfg_from_lazy(lazy)
    assert old.REPR == new.REPR
    assert "REPR.SLIM" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "steps", "name"),
    [
        (["train.max_iter=900"], (600, 800), "WarmupMultiStepLR"),  # milestones count in units of the last one
        (
            ["lr_multiplier.scheduler.num_updates=180000", "lr_multiplier.scheduler.milestones=[60000,80000]"],
            (30000, 40000),
            "WarmupMultiStepLR",
        ),
    ],
)
def test_learning_rate_steps(overrides, steps, name):
    yacs = repr_cfg_from_lazy(load_lazy_config(CONFIG, overrides))
    solver = yacs.SOLVER
    assert solver.get("STEPS") == steps and solver.get("LR_SCHEDULER_NAME") == name
    # Where the multiplier really steps, with fvcore's own scheduler.
    scheduler = instantiate(load_lazy_config(CONFIG, overrides).lr_multiplier.scheduler)
    total = solver.MAX_ITER
    for step in steps:
        assert scheduler(step / total) < scheduler((step - 1) / total)


def test_other_schedulers():
    lazy = load_lazy_config(CONFIG, ["repr.num_cycles=1"])
    bare = OmegaConf.to_container(lazy.lr_multiplier.scheduler)
    lazy.lr_multiplier = bare  # without the warm-up around it
    assert repr_cfg_from_lazy(lazy).SOLVER.STEPS == (60000, 80000)
    lazy.lr_multiplier = {"_target_": CosineParamScheduler, "start_value": 1, "end_value": 0}
    yacs = repr_cfg_from_lazy(lazy)
    assert yacs.SOLVER.STEPS == (45000,) and schedule_from_config(yacs).end_iter == 33750  # 3/4 of half the rate


@pytest.mark.parametrize(
    "overrides, refusal",
    [
        (["repr.layers=['backbone.bottom_up.res4.*.conv2']"], None),
        (["repr.layers=['backbone.res4.*.conv2']"], r"repr\.layers .* matches no trainable Conv2d; the closest .*res4"),
    ],
)
def test_layers_are_those_of_the_configs_own_model(small_config, overrides, refusal):
    lazy = load_lazy_config(small_config, overrides)

    def check():
        with naming_lazy_keys(lazy):
            check_run(repr_cfg_from_lazy(lazy), build=lambda: instantiate(lazy.model))

    if refusal is None:
        check()
    else:
        with pytest.raises(UserError, match=refusal):
            check()


def trained(config: str, folder: Path, *overrides: str, resume: bool = False) -> LazyTrainer:
    seed_all_rng(5)
    trainer = LazyTrainer(load_lazy_config(config, [f"train.output_dir={folder}", *overrides]))
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def test_trains_evaluates_and_resumes_bit_for_bit(small_config, tmp_path):
    straight = trained(small_config, tmp_path / "a")
    events = read_events(tmp_path / "a")
    assert [(e["event"], e["iteration"]) for e in events] == [("drop", 0), ("restore", 2)]
    dropped = sum(map(len, events[0]["dropped"].values()))
    assert dropped == int(0.3 * sum(x.num_filters for x in find_filter_layers(straight.model, ["*res*.conv*"])))
    assert "AP" in straight._last_eval_results["bbox"]
    sub = torch.load(tmp_path / "a" / "model_0000001.pth", weights_only=True)
    name, rows = next(iter(events[0]["dropped"].items()))
    assert not sub["model"][f"{name}.weight"][rows].any()

    # The second half again, from the checkpoint in the middle of the sub-network phase.
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model_0000001.pth").write_bytes((tmp_path / "a" / "model_0000001.pth").read_bytes())
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000001.pth")
    resumed = trained(small_config, tmp_path / "b", resume=True)
    assert_same_weights(straight.model.state_dict(), resumed.model.state_dict())
    with pytest.raises(UserError, match="trained with RePr on, this run has it off"):
        trained(small_config, tmp_path / "b", "repr.ENABLED=False", resume=True)


def test_command_line(small_config, tmp_path):
    args = ["--config-file", small_config, f"train.output_dir={tmp_path / 'run'}", "train.max_iter=4"]
    start(args)
    assert (tmp_path / "run" / "model_final.pth").exists() and (tmp_path / "run" / "repr_events.jsonl").exists()
    node = LazyConfig.load(str(tmp_path / "run" / "config.yaml")).repr
    assert instantiate(node).options.s2_iters == 2
    with pytest.raises(UserError, match="holds another run"):
        start(args)
    with pytest.raises(UserError, match="--eval-only needs a checkpoint"):
        start(["--config-file", small_config, "--baseline", "--eval-only", *args[2:]])
    start(["--config-file", small_config, "--baseline", "--eval-only", "--resume", *args[2:]])


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        (["--config-file", "nope.py"], "--config-file 'nope.py' is not a .py file"),
        ([], "--config-file is missing"),
        (
            ["--config-file", "{small}", "repr.NOPE=1"],
            "the node repr has no option 'NOPE': take one of s1_iters, ",
        ),
        (["--config-file", "{small}", "repr.drop_ratio=1.5"], "repr.drop_ratio must be in (0, 1), got 1.5"),
        (["--config-file", "{small}", "repr.drop_ratio=many"], "the node repr of the LazyConfig: Type mismatch"),
        (
            ["--config-file", "{small}", "repr=3"],
            "repr must be L(RePrHook)(...) or a dict with the keys of REPR, got",
        ),
        (["--config-file", "{small}", "repr.s1_iters=50"], "needs repr.start_iter 0 + repr.num_cycles 1 x (repr.s1_"),
        (["--config-file", "{small}", "repr.returns=median_gamma"], "repr.returns median_gamma went in version 0.3.0"),
        (
            ["--config-file", "{old}", "repr.NOPE=1"],
            "the node repr of the LazyConfig: Non-existent config key: REPR.NO",
        ),
        (["--config-file", "{old}", "repr.DROP_RATIO=1.5"], "repr.DROP_RATIO must be in (0, 1), got 1.5"),
        (["--config-file", "{small}", "DROP_RATIO", "0.2"], "overrides must be path.key=value"),
        (["--config-file", "{small}", "train.max_iter=soon"], "train.max_iter must be an integer, got 'soon'"),
        (["--config-file", "{small}", "train.init_checkpoint=gone.pth"], "'gone.pth' cannot be read"),
        (["--config-file", "{small}", "model.roi_heads.num_classes=7"], "model.roi_heads.num_classes is 7, but tiny_t"),
        (
            ["--config-file", "{small}", "dataloader.train.total_batch_size=0"],
            "dataloader.train.total_batch_size must be",
        ),
        (
            ["--config-file", "{small}", "train.amp.enabled=True"],
            "train.amp.enabled needs a GPU in Detectron2, train.dev",
        ),
        (
            ["--config-file", "{small}", "train.checkpointer.period=0"],
            "train.checkpointer.period must be at least 1, got 0",
        ),
        (
            ["--config-file", "{small}", "dataloader.evaluator.dataset_name=vv"],
            "dataloader.evaluator.dataset_name must be that of dataloader.test (",
        ),
        (["--config-file", "{broken}"], "broken.py: NameError: name 'models' is not defined"),
        (["--config-file", "{empty}"], "empty.py lacks model: define model, dataloader"),
    ],
)
def test_wrong_input_gets_one_line_before_the_first_step(small_config, tmp_path, args, fragment):
    (tmp_path / "broken.py").write_text("model = models.resnet")
    (tmp_path / "empty.py").write_text("train = dict(max_iter=3)")
    (tmp_path / "old.py").write_text(f"{SMALL}\nrepr = {OLD_NODE}\n")
    files = {f"{{{name}}}": str(tmp_path / f"{name}.py") for name in ("small", "broken", "empty", "old")}
    with pytest.raises(UserError) as error:
        start([*(files.get(a, a) for a in args), *([f"train.output_dir={tmp_path / 'x'}"] if args else [])])
    assert fragment in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()
