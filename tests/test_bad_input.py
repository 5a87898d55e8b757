"""What a user can get wrong in keys, files and folders: one line, before anything is written."""

import os
import pickle
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, SMALL, assert_same_weights, end_of, refused
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from repr_det import Trainer
from repr_det.commands.arguments import build_config, config_path
from repr_det.commands.checks import check_run
from repr_det.commands.train import describe_run
from repr_det.detectron.config import scale_to_world, without_repr

ON = ["REPR.ENABLED", "True", "SOLVER.MAX_ITER", "40", "REPR.S1_ITERS", "6", "REPR.S2_ITERS", "3"]
CONFIG = str(ROOT / "configs" / "baseline_r50_fpn.yaml")
LAZY, LAZY_CONFIG = "train takes its .py file, other commands yaml configs", "lazy/repr_faster_rcnn_r50_fpn.py"
BOMB = "touch executed"


def refused_run(make, *opts, **options) -> str:
    return refused(lambda: check_run(make(*opts), **options))


@pytest.fixture(scope="module")
def weights(tiny_data) -> dict[str, torch.Tensor]:
    return build_model(build_config(CONFIG, SMALL)).state_dict()


# Every option of REPR in test_options.
REPR = [
    ("REPR.DROP_RATIO much", "command line: Type mismatch"),
    ("REPR.START_ITER -1 SOLVER.REFERENCE_WORLD_SIZE 2 SOLVER.IMS_PER_BATCH 4", "REPR.START_ITER must be an integer"),
    ("SOLVER.MAX_ITER 27", "= 27 iterations and then some of the full network, but SOLVER.MAX_ITER is 27"),
    ("REPR.S1_ITERS 0 REPR.S2_ITERS 0 SOLVER.MAX_ITER 8", "do not fit between REPR.START_ITER 0 and 6"),
    ("REPR.LAYERS.INCLUDE ['nothing.*']", "matches no trainable Conv2d; the closest trainable ones: backbone."),
    ("REPR.DROP_RATE 0.3", "Non-existent key: REPR.DROP_RATE: did you mean REPR.DROP_RATIO"),
    ("REPR.ENABLED", "must be KEY VALUE pairs, got"),
]
BOTH = [
    ("solver.base_lr 0.3", "Non-existent key: solver.base_lr: did you mean SOLVER.BASE_LR"),
    ("MODEL.DEVICE gpu", "MODEL.DEVICE 'gpu' is not a device"),
    ("SOLVER.AMP.ENABLED True", "SOLVER.AMP.ENABLED needs a GPU"),
    ("DATASETS.TRAIN ('tiny_trian',)", "tiny_trian"),
    ("DATASETS.TRAIN ()", "DATASETS.TRAIN is empty"),
    ("DATASETS.TRAIN tiny_train", "vs. tiny_train) for config key: DATASETS.TRAIN"),
    ("MODEL.ROI_HEADS.NUM_CLASSES 80", "MODEL.ROI_HEADS.NUM_CLASSES is 80, but tiny_train has 2 classes"),
    ("MODEL.WEIGHTS nowhere/model.pth", "MODEL.WEIGHTS 'nowhere/model.pth' cannot be read"),
    ("SOLVER.CHECKPOINT_PERIOD 0", "SOLVER.CHECKPOINT_PERIOD must be at least 1, got 0"),
    ("TEST.AUG.ENABLED True MODEL.META_ARCHITECTURE ProposalNetwork", "TEST.AUG.ENABLED True: TTA is only"),
    ("MODEL.ANCHOR_GENERATOR.SIZES [[8],[16]]", "MODEL: "),
    ("SOLVER.STEPS (12,40) SOLVER.MAX_ITER 40", "SOLVER: no learning-rate schedule of STEPS (12, 40)"),
    ("SOLVER.CLIP_GRADIENTS.ENABLED True SOLVER.CLIP_GRADIENTS.CLIP_TYPE foo", "SOLVER: 'foo' is not"),
    ("INPUT.CROP.ENABLED True INPUT.CROP.TYPE absolut", "CROP.TYPE absolut, "),
    ("INPUT.FORMAT XYZ", "INPUT: no test images by FORMAT XYZ, "),
    ("INPUT.CROP.ENABLED True INPUT.CROP.SIZE [2.0,2.0]", "CROP.SIZE [2.0, 2.0]: Shape computation"),
    ("INPUT.MIN_SIZE_TRAIN ('a',)", "INPUT: no images by RANDOM_FLIP horizontal, MIN_SIZE_TRAIN ('a',), "),
    ("INPUT.MAX_SIZE_TEST 0", "MAX_SIZE_TEST 0: height and width must be > 0"),
    ("TEST.AUG.ENABLED True TEST.AUG.MIN_SIZES ()", "TEST.AUG.MIN_SIZES is empty"),
    ("SEED 4294967296", "SEED 4294967296: Seed must be between 0 and"),
    ("DATALOADER.NUM_WORKERS -1", "DATALOADER.NUM_WORKERS -1: num_workers option should be non-negative"),
    ("DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler DATALOADER.REPEAT_THRESHOLD -1.0", "THRESHOLD -1.0: math"),
    ("DATALOADER.SAMPLER_TRAIN Foo", "DATALOADER.SAMPLER_TRAIN must be one of TrainingSampler, "),
    ("MODEL.LOAD_PROPOSALS True DATASETS.PROPOSAL_FILES_TRAIN ('nope.pkl',)", "PROPOSAL_FILES_TRAIN 'nope.pkl' cannot"),
    ("MODEL.LOAD_PROPOSALS True", "DATASETS.PROPOSAL_FILES_TRAIN must name a file for each of 1 data sets"),
    ("MODEL.META_ARCHITECTURE PanopticFPN", "learns from semantic segmentation, which tiny_train (COCO format) does"),
    ("SOLVER.REFERENCE_WORLD_SIZE 2 SOLVER.IMS_PER_BATCH 3", "SOLVER.IMS_PER_BATCH 3: Invalid REFERENCE_WORLD_SIZE"),
]
if not torch.cuda.is_available():
    BOTH.append(("MODEL.DEVICE cuda", "MODEL.DEVICE is 'cuda' but torch sees no GPU"))


@pytest.mark.parametrize(
    ("arm", "opts", "message"), [*([ON, *case] for case in REPR), *([arm, *case] for case in BOTH for arm in ([], ON))]
)
def test_keys(tiny_cfg, tmp_path, arm, opts, message):
    """Both arms get the same checks."""
    assert message in refused_run(tiny_cfg, *arm, *opts.split())
    assert not (tmp_path / "run").exists()


def test_what_has_no_effect_is_said(tiny_cfg, caplog):
    scaled = ["SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.IMS_PER_BATCH", 2]
    check_run(tiny_cfg(*scaled), num_gpus=3)  # trains with a batch of 3
    assert scale_to_world(without_repr(tiny_cfg(*scaled, "SOLVER.MAX_ITER", 4)), 1).SOLVER.MAX_ITER == 8
    for warmup, boxes in ((9, 100), (10, 400)):
        assert "WARMUP" not in caplog.text and "DETECTIONS" not in caplog.text
        check_run(tiny_cfg("SOLVER.WARMUP_ITERS", warmup, "SOLVER.MAX_ITER", 10, "TEST.DETECTIONS_PER_IMAGE", boxes))
    assert "SOLVER.WARMUP_ITERS 10 is no shorter than SOLVER.MAX_ITER 10: the learning rate never comes" in caplog.text
    assert "TEST.DETECTIONS_PER_IMAGE is 400, and COCO's AP counts the best 100 of an image" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: [1, 2", "not valid YAML"),
        ("REPR:\n  ENABLE: True\n", "Non-existent config key: REPR.ENABLE: did you mean REPR.ENABLED"),
        ("SOLVER:\n  MAX_ITER: 5\n  BASE_LR: 0.1\n  MAX_ITER: 6\n", "the key MAX_ITER stands there twice"),
        ("dataloader:\n  train: {_target_: detectron2.data.build}\nmodel: !!python/object/x {}\n", LAZY),
        ("MODEL:\n  WEIGHTS: 5\n", "Type mismatch"),
        ("_BASE_: nowhere.yaml\n", "nowhere.yaml"),
        ("_BASE_: 'my config ü.yaml'\n", "builds on this file again"),
        ("_BASE_:\n", "_BASE_ is empty: give what belongs to it, or leave it out"),
        ("", "must hold config keys with their values (MODEL: ...), got nothing"),
        (f"SEED: !!python/object/apply:os.system ['{BOMB}']\n", "not valid YAML: could not determine a"),
        ('SEED: !!python/object/apply:eval [\'open("executed", "w")\']\n', "is not arithmetic"),
        ("SEED: !!python/object/apply:eval ['().__class__']\n", "'().__class__' is not arithmetic"),
    ],
)
def test_config_files(tmp_path, monkeypatch, text, message):
    path = tmp_path / "my config ü.yaml"
    monkeypatch.chdir(tmp_path)
    path.write_text(text)
    line = refused(build_config, str(path), [])
    assert message in line and str(path) in line
    if message == LAZY:
        assert line.replace(str(path), config_path(LAZY_CONFIG)) == refused(build_config, LAZY_CONFIG, [])
    assert not (tmp_path / "executed").exists()


def test_config_files_of_detectron2_are_read_as_it_reads_them():
    path = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    stock, ours = get_cfg(), build_config(path, ["MODEL.DEVICE", "cpu"])
    stock.merge_from_file(path)
    assert ours.MODEL.ANCHOR_GENERATOR == stock.MODEL.ANCHOR_GENERATOR
    assert ours.DATASETS == stock.DATASETS and ours.SOLVER == stock.SOLVER


def test_home_and_variables_in_output_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path))
    for given in ("~/x", "$WHERE/x", "${WHERE}/x"):
        assert str(tmp_path / "x") == build_config(CONFIG, ["OUTPUT_DIR", given]).OUTPUT_DIR
    message = "OUTPUT_DIR '$NOWHERE/x': the variable NOWHERE is not set"
    assert message in refused(build_config, CONFIG, ["OUTPUT_DIR", "$NOWHERE/x"])
    for given, folder in (([], "output/repr_r50_fpn_baseline"), (["OUTPUT_DIR", "x"], "x")):
        cfg = build_config("repr_r50_fpn.yaml", given, baseline=True)
        assert not cfg.REPR.ENABLED and cfg.OUTPUT_DIR.endswith(folder)


def test_folders_that_hold_another_run_and_those_in_which_nothing_was_trained(tiny_cfg, tmp_path):
    run = tmp_path / "run"
    (run / "inference").mkdir(parents=True)
    for name in ("config.yaml", "config_detectron2.yaml", "log.txt", "data_sets.json"):
        (run / name).write_text("{}")
    for name in ("metrics.json", "repr_events.jsonl"):  # opened, and the run stopped before its first step
        (run / name).touch()
    check_run(tiny_cfg())
    for trace in ("repr_events.jsonl", "model_0000003.pth"):
        (run / trace).write_text("precious")
        assert f"holds another run ({trace}): add --resume" in refused_run(tiny_cfg, *ON)
        (run / trace).rename(tmp_path / trace)
        assert (tmp_path / trace).read_text() == "precious"


def test_resume_of_another_arm_or_with_other_options(tiny_cfg, tmp_path):
    opts = ["REPR.ENABLED", True, "REPR.S1_ITERS", 2, "REPR.S2_ITERS", 2, "REPR.NUM_CYCLES", 1, "SOLVER.MAX_ITER", 6]
    opts += ["DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", 1]
    end_of(tiny_cfg(*opts))
    check_run(tiny_cfg(*opts), resume=True)
    for_one = ["REPR.S1_ITERS", 4, "REPR.S2_ITERS", 4, "SOLVER.MAX_ITER", 12, "SOLVER.REFERENCE_WORLD_SIZE", 1]
    check_run(tiny_cfg(*opts, *for_one), resume=True, num_gpus=2)
    before = {path: path.stat().st_mtime for path in (tmp_path / "run").rglob("*")}
    message = "trained with REPR.DROP_RATIO 0.3, this run has 0.2"
    assert message in refused_run(tiny_cfg, *opts, "REPR.DROP_RATIO", 0.2, resume=True)
    message = "was trained with RePr on, this run has it off"
    assert message in refused_run(tiny_cfg, *opts, "REPR.ENABLED", False, resume=True)
    assert before == {path: path.stat().st_mtime for path in (tmp_path / "run").rglob("*")}


@pytest.mark.parametrize("eval_only", [False, True])
def test_output_folder_that_cannot_be_made(tiny_cfg, tmp_path, eval_only):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "OUTPUT_DIR is empty" in refused_run(tiny_cfg, *ON, "OUTPUT_DIR", "", eval_only=eval_only)
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "link", "/proc/self/run"):
        assert "cannot be written (" in refused_run(tiny_cfg, *ON, "OUTPUT_DIR", folder, eval_only=eval_only)


class Bomb:
    def __reduce__(self):
        return os.system, (BOMB,)


def test_files_that_hold_no_weights(tiny_cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, "bomb.pth")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps({"model": Bomb()}))
    torch.save({"net": {"conv.weight": torch.zeros(3)}}, "odd.pth")
    torch.save({"model": {"backbone.x": torch.zeros(3)}, "iteration": 3}, "truncated.pth")
    os.truncate("truncated.pth", 500)
    (tmp_path / "empty.pth").touch()
    damaged = ("text.pkl", "damaged.pth.tar", "damaged")
    for name in damaged:
        (tmp_path / name).write_bytes(b"not a checkpoint")
    for path in list(tmp_path.iterdir()):
        line = refused_run(tiny_cfg, *ON, "MODEL.WEIGHTS", str(path))
        assert path.name in line
        assert "not a readable torch checkpoint" in line or path.name not in (*damaged[1:], "truncated.pth")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()


def test_weights_that_can_be_begun_with(tiny_cfg, tmp_path, weights):
    """--eval-only needs all of them; ?matching_heuristics=True finds other names; official pickles load."""
    assert "--eval-only needs a checkpoint" in refused_run(tiny_cfg, eval_only=True)
    torch.save({"model": weights}, tmp_path / "whole.pth")
    check_run(tiny_cfg("MODEL.WEIGHTS", str(tmp_path / "whole.pth")), eval_only=True)
    part = {k.removeprefix("backbone.bottom_up."): v for k, v in weights.items() if "bottom_up" in k}
    torch.save(part, tmp_path / "part.pth")
    path = str(tmp_path / "part.pth")
    assert "does not hold any weight of this model" in refused_run(tiny_cfg, "MODEL.WEIGHTS", path)
    assert "Unsupported query remaining" in refused_run(tiny_cfg, "MODEL.WEIGHTS", f"{path}?strict=1")
    heuristics = ["MODEL.WEIGHTS", f"{path}?matching_heuristics=True"]
    assert "does not hold all weights of this model" in refused_run(tiny_cfg, *heuristics, eval_only=True)
    official = {k: v.numpy() for k, v in part.items()}
    with open(tmp_path / "R-18.pkl", "wb") as file:
        pickle.dump({"model": official, "__author__": "torchvision", "matching_heuristics": True}, file)
    for opts in (heuristics, ["MODEL.WEIGHTS", str(tmp_path / "R-18.pkl")]):
        check_run(tiny_cfg(*opts))
        trainer = Trainer(tiny_cfg(*opts))
        trainer.resume_or_load(resume=False)
        assert_same_weights(trainer.model.backbone.bottom_up.state_dict(), part)
    said = "12 training images, 90000 iterations of 2 images: 1.5e+04 epochs; RePr is off (REPR.ENABLED True, or a "
    assert describe_run(trainer).startswith(said)


def test_what_a_resumed_run_reads(tiny_cfg, tmp_path, weights):
    """MODEL.WEIGHTS is not read. A file of a plain loop, a SimpleTrainer or of weights alone can only be evaluated."""
    (tmp_path / "run").mkdir()
    checkpoint = tmp_path / "run" / "model_0000003.pth"
    gone = ["MODEL.WEIGHTS", "gone.pth"]
    for more in ({"iteration": 3, "optimizer": {}}, {"trainer": {"iteration": 3, "optimizer": {}}}, {}):
        torch.save({"model": weights, **more}, checkpoint)
        check_run(tiny_cfg(*gone), resume=True, eval_only=True)
        message = f"{tmp_path / 'run'} holds weights, not a run of this trainer: give it as MODEL.WEIGHTS, with another"
        assert message in refused_run(tiny_cfg, *gone, resume=True)
        assert message in refused(Trainer(tiny_cfg(*gone)).resume_or_load)
    torch.save({"model": weights, "trainer": {"iteration": 3, "_trainer": {}}}, checkpoint)
    check_run(tiny_cfg(*gone), resume=True)
    wider = [*gone, "MODEL.FPN.OUT_CHANNELS", "32"]
    assert "does not hold all weights" in refused_run(tiny_cfg, *wider, resume=True)
    checkpoint.unlink()
    assert "gone.pth" in refused_run(tiny_cfg, *gone, resume=True)


def test_a_sub_network_is_no_start(tiny_cfg, tmp_path, weights, caplog):
    weights = {name: value.clone() for name, value in weights.items()}
    conv = "backbone.bottom_up.res3.0.conv1"
    for key in ("weight", "norm.weight", "norm.bias"):
        weights[f"{conv}.{key}"][[3, 5]] = 0
    torch.save({"model": weights}, tmp_path / "sub.pth")
    opts = ["MODEL.WEIGHTS", str(tmp_path / "sub.pth")]
    what = f"sub.pth holds a sub-network: 2 filters of {conv} are zero with their norm"
    for arm in ([], ON):
        assert what in refused_run(tiny_cfg, *arm, *opts)
    check_run(tiny_cfg(*opts), eval_only=True)
    assert f"{what}; its AP" in caplog.text


def test_the_meta_device_is_left_where_a_model_needs_numbers(tiny_cfg):
    built = []

    def build_model(cfg):
        layer = torch.nn.Linear(2, 2)
        built.append(layer.weight.device.type)
        layer.share = layer.weight.sum().item()
        return layer

    check_run(tiny_cfg(), trainer=Mock(build_model=build_model))
    assert built == ["meta", "cpu"]
