"""The LazyConfig route: the same schedule, layers and model as the yaml twin, and a short run with resume."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_weights, refused
from conftest import SMALL as YAML_SMALL
from detectron2.config import LazyConfig
from detectron2.modeling import build_model
from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import OmegaConf
from outcomes import json_lines

from repr_det import find_filter_layers
from repr_det.commands.arguments import build_config
from repr_det.commands.data import check_datasets
from repr_det.commands.lazy import LazyTrainer, instantiate, load_lazy_config, record_reads, repr_cfg_from_lazy
from repr_det.commands.train import start
from repr_det.detectron.config import validate_repr_config

CONFIG = str(ROOT / "configs" / "lazy" / "repr_faster_rcnn_r50_fpn.py")
SMALL = f"""
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from tiny_backbone import FEATURES, tiny_resnet

globals().update(LazyConfig.load({CONFIG!r}))
model.backbone.update(bottom_up=L(tiny_resnet)(out_features=FEATURES), out_channels=16)
model.proposal_generator.head.in_channels = model.roi_heads.box_head.input_shape.channels = 16
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [48], [64]]
model.proposal_generator.post_nms_topk = (20, 20)
model.roi_heads.box_head.fc_dims = [16]
model.roi_heads.box_predictor.input_shape.channels = 16
model.roi_heads.num_classes = 2
dataloader.train.total_batch_size = 1
for _loader, _name in ((dataloader.train, "tiny_train"), (dataloader.test, "tiny_val")):
    _loader.update(num_workers=0)
    _loader.dataset.names = _name
    _loader.mapper.augmentations[0].update(short_edge_length=64, max_size=96)
optimizer.lr = 0.001
train.update(device="cpu", init_checkpoint="", max_iter=4, eval_period=0, seed=5)
train.checkpointer.period = 2
repr.update(s1_iters=1, s2_iters=2, num_cycles=1)
"""
SEVERAL = """
from detectron2.evaluation import DatasetEvaluators
dataloader.evaluator.dataset_name = "tiny_val"
dataloader.evaluator = [dataloader.evaluator, L(DatasetEvaluators)(evaluators=[])]
"""
OTHER_DATA = "dataloader.test.dataset.names must be one data set, the dataset_name of dataloader.evaluator"
AUGMENTATIONS = "dataloader.train.mapper.augmentations"
OLD_NODE = dict(ENABLED=True, S1_ITERS=1, S2_ITERS=2, NUM_CYCLES=1)  # of version 0.2.0


@pytest.fixture
def small_config(tiny_data, tmp_path) -> str:
    (tmp_path / "small.py").write_text(SMALL)
    return str(tmp_path / "small.py")


def test_same_schedule_layers_and_model_as_the_yaml_twin():
    lazy = load_lazy_config(CONFIG, ["train.device=cpu", "train.init_checkpoint="])
    twin = build_config(str(ROOT / "configs/repr_r50_fpn.yaml"), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    yacs = repr_cfg_from_lazy(lazy)
    assert yacs.REPR == twin.REPR and yacs.REPR.ENABLED and yacs.DATALOADER.ASPECT_RATIO_GROUPING
    for key in ("IMS_PER_BATCH", "MAX_ITER", "STEPS", "LR_SCHEDULER_NAME", "REFERENCE_WORLD_SIZE"):
        assert yacs.SOLVER[key] == twin.SOLVER[key], key
    assert validate_repr_config(yacs).drop_iters == validate_repr_config(twin).drop_iters == (9999, 24999, 39999)
    assert (yacs.DATASETS.TRAIN, yacs.DATASETS.TEST) == (twin.DATASETS.TRAIN, twin.DATASETS.TEST)
    assert yacs.MODEL.ROI_HEADS.NUM_CLASSES == 80
    twin.defrost()
    twin.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        ours, theirs = instantiate(lazy.model), build_model(twin)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    names = [[x.name for x in find_filter_layers(m, yacs.REPR.LAYERS.INCLUDE)] for m in (ours, theirs)]
    assert names[0] == names[1] and len(names[0]) == 39


def test_a_node_of_version_0_2_0_says_the_same(caplog):
    options = {"DROP_RATIO": 0.2, "SLIM": "auto", "LAYERS": {"EXCLUDE": ["*.conv3"]}, "REINIT": {"SCALE": "old"}}
    lazy = load_lazy_config(CONFIG, ["train.max_iter=900"])
    lazy.repr.update(s1_iters=1, s2_iters=2, num_cycles=1, drop_ratio=0.2, exclude=["*.conv3"], REINIT={"SCALE": "old"})
    new = repr_cfg_from_lazy(lazy)
    lazy.repr = OLD_NODE | options
    old = repr_cfg_from_lazy(lazy)
    assert old.REPR == new.REPR
    assert "REPR.SLIM" in caplog.text


def test_learning_rate_steps():
    """STEPS are where the multiplier steps, with or without a warm-up around it, or half of a cosine."""
    updates = ["lr_multiplier.scheduler.num_updates=180000", "lr_multiplier.scheduler.milestones=[60000,80000]"]
    for overrides, steps in (([], (600, 800)), (updates, (300, 400))):  # milestones count in units of the last one
        lazy = load_lazy_config(CONFIG, ["train.max_iter=900", *overrides])
        assert steps == repr_cfg_from_lazy(lazy).SOLVER.STEPS
        scheduler = instantiate(lazy.lr_multiplier.scheduler)
        assert all(scheduler(step / 900) < scheduler((step - 1) / 900) for step in steps)
        lazy.lr_multiplier = OmegaConf.to_container(lazy.lr_multiplier.scheduler)
        assert steps == repr_cfg_from_lazy(lazy).SOLVER.STEPS
    lazy.lr_multiplier = {"_target_": CosineParamScheduler, "start_value": 1, "end_value": 0}
    lazy.repr.num_cycles, lazy.train.max_iter = 1, 9000
    yacs = repr_cfg_from_lazy(lazy)
    assert yacs.SOLVER.STEPS == (4500,) and validate_repr_config(yacs).end_iter == 3375  # 3/4 of half the rate


def test_trains_evaluates_and_resumes_bit_for_bit(small_config, tmp_path):
    """With several evaluators, of which one takes no output_dir."""
    Path(small_config).write_text(SMALL + SEVERAL)

    def run(name, *flags):
        layers = "repr.layers=['backbone.bottom_up.res4.*.conv2']"
        start(["--config-file", small_config, *flags, f"train.output_dir={tmp_path / name}", layers])
        return torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]

    straight = run("a")
    events = json_lines(tmp_path / "a" / "repr_events.jsonl")
    assert [(e["event"], e["iteration"]) for e in events] == [("drop", 0), ("restore", 2)]
    assert list(events[0]["dropped"]) == ["backbone.bottom_up.res4.0.conv2"]
    assert "bbox/AP" in json_lines(tmp_path / "a" / "metrics.json")[-1]
    node = LazyConfig.load(str(tmp_path / "a" / "config.yaml")).repr
    assert instantiate(node).options.s2_iters == 2
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "model_0000001.pth", tmp_path / "b")  # in the sub-network phase
    assert_same_weights(straight, run("b", "--resume"))
    assert [e["event"] for e in json_lines(tmp_path / "b" / "repr_events.jsonl")] == ["restore"]
    assert "holds another run" in refused(run, "a")
    assert "--eval-only needs a checkpoint" in refused(run, "a", "--baseline", "--eval-only")
    run("a", "--baseline", "--eval-only", "--resume")
    assert (tmp_path / "a" / "eval_only" / "inference" / "coco_instances_results.json").is_file()


@pytest.mark.parametrize(
    ("file", "override", "message"),
    [
        ("broken", None, "broken.py: name 'models' is not defined"),
        ("empty", None, "empty.py lacks model: define model, dataloader"),
        ("small", "repr.NOPE=1", "the node repr of the LazyConfig: Non-existent config key: REPR.NO"),
        ("small", "repr.drop_ratio=many", "the node repr of the LazyConfig: Type mismatch"),
        ("small", "repr.s1_iters=50", "needs repr.start_iter 0 + repr.num_cycles 1 x (repr.s1_iters 50 + repr.s2"),
        ("old", "repr.NOPE=1", "the node repr of the LazyConfig: Non-existent config key: REPR.NO"),
        ("old", "repr.DROP_RATIO=1.5", "repr.DROP_RATIO must be in (0, 1), got 1.5"),
        ("small", "DROP_RATIO", "overrides must be path.key=value"),
        ("small", "train.max_iter=soon", "for config key: train.max_iter"),
        ("small", "train.checkpointer.max_to_keep=0", "train.checkpointer.max_to_keep must be at least 1, got 0"),
        ("small", "dataloader.test.mapper.augmentations.0.max_size=0", "dataloader.test.mapper: height and width must"),
        ("small", "optimizer.lr=-1", "optimizer: Invalid learning rate: -1"),
        ("small", "train.log_period=0", "train.log_period must be at least 1, got 0"),
        ("small", "train.init_checkpoint=gone.pth", "train.init_checkpoint 'gone.pth' cannot be read"),
        ("small", "model.roi_heads.num_classes=7", "model.roi_heads.num_classes is 7, but tiny_train has 2 classes"),
        ("small", "dataloader.evaluator.dataset_name=v", f"{OTHER_DATA} (v), got tiny_val"),
        ("two", None, f"{OTHER_DATA} (tiny_val), got tiny_val, tiny_train"),
        ("small", "train.max_itr=5", "override train.max_itr: the config has no 'max_itr' in train; did you mean trai"),
        ("small", "optimzer.lr=0.1", "the config has no 'optimzer' in it; did you mean optimizer?"),
        ("small", "optimizer.learning_rate=0.1", "the config has no 'learning_rate' in optimizer; it has"),
        ("small", "train.max_iter.x=3", "the config has no 'x' in train.max_iter"),
        ("small", f"{AUGMENTATIONS}.9.max_size=3", f"the config has no '9' in {AUGMENTATIONS}"),
        ("small", f"{AUGMENTATIONS}.0.max_sise=3", f"did you mean {AUGMENTATIONS}.0.max_size?"),
    ],
)
def test_wrong_input_gets_one_line_before_the_first_step(small_config, tmp_path, monkeypatch, file, override, message):
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("model = models.resnet")
    Path("empty.py").write_text("train = dict(max_iter=3)")
    Path("two.py").write_text(f"{SMALL}\ndataloader.test.dataset.names = ['tiny_val', 'tiny_train']\n{SEVERAL}")
    Path("old.py").write_text(f"{SMALL}\nrepr = {OLD_NODE}\n")
    words = ["--config-file", f"{file}.py", "train.output_dir=x", *([override] if override else [])]
    assert message in refused(start, words)
    assert not Path("x").exists()


def test_what_may_be_set(small_config):
    """What Detectron2 reads and its configs do not name, an argument of a callable, one of any name, an entry; and a
    model of one's own, whose number of classes no key tells."""
    keys = ["train.seed", "optimizer.nesterov", "model.backbone.bottom_up.anything", f"{AUGMENTATIONS}.0.max_size"]
    cfg = load_lazy_config(small_config, [*(f"{key}=3" for key in keys), "+train.mine=3"])
    assert all(OmegaConf.select(cfg, key) == 3 for key in (*keys, "train.mine"))
    assert load_lazy_config(small_config, ["+train.output_dir=x"], baseline=True).train.output_dir == "x"
    cfg.model = {"_target_": "my.model", "classes": 2}
    cfg.dataloader.evaluator = [{"kpt_oks_sigmas": [0.1, 0.2]}]
    check_datasets(yacs := repr_cfg_from_lazy(cfg))
    assert yacs.TEST.KEYPOINT_OKS_SIGMAS == [0.1, 0.2]


def test_weights_that_resume_does_not_evaluate_are_named(small_config, tmp_path, caplog):
    (tmp_path / "model_final.pth").touch()
    load_lazy_config(small_config, [f"train.output_dir={tmp_path}", "train.init_checkpoint=b"], (), False, True, True)
    words = [*YAML_SMALL, "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", "b"]
    build_config(str(ROOT / "configs/repr_r50_fpn.yaml"), words, (), False, True, True)
    assert caplog.messages.count(f"--resume evaluates the checkpoint in {tmp_path}, not 'b'") == 2


def test_what_nothing_reads_is_found_by_the_reads(small_config):
    """detrex's keys, and a node of one's own; Detectron2's are all read."""
    cfg = load_lazy_config(small_config, [])
    cfg.train.update(clip_grad={"enabled": True, "params": {"max_norm": 0.1}}, model_ema={"enabled": True})
    cfg.train.log_period, cfg.train.checkpointer.max_to_keep = 3, 4
    cfg.ema = {"decay": 0.9}
    cfg.image_size = 3  # used while the file was read
    unread = record_reads(cfg)
    *_, save, _, _, write = LazyTrainer.of(cfg)(repr_cfg_from_lazy(cfg))._hooks
    assert (save.max_to_keep, write._period) == (4, 3)
    cfg.dataloader.evaluator = None
    assert LazyTrainer.of(cfg).test(None, None) == {}
    assert unread() == ["ema.decay", "train.clip_grad", "train.model_ema"]
