"""What a user can get wrong on the command line, in the config and in files: one line, before anything is written."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import R18
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from repr_det import UserError
from repr_det.commands.arguments import build_config
from repr_det.commands.checks import check_run
from repr_det.commands.processes import run_tool
from repr_det.commands.train import start

ROOT = Path(__file__).resolve().parents[1]
ON = ["REPR.ENABLED", "True", "SOLVER.MAX_ITER", "40", "REPR.S1_ITERS", "6", "REPR.S2_ITERS", "3"]


def refused(cfg_maker, *opts, resume=False, num_gpus=1):
    with pytest.raises(UserError) as error:
        check_run(cfg_maker(*opts), resume=resume, num_gpus=num_gpus)
    assert "\n" not in str(error.value)
    return str(error.value)


CONFIG = [
    (["REPR.DROP_RATIO", "1.3"], "REPR.DROP_RATIO must be in (0, 1), got 1.3"),
    (["REPR.DROP_RATIO", "0.0"], "REPR.DROP_RATIO must be in (0, 1), got 0.0"),
    (["REPR.DROP_RATIO", "1.0"], "REPR.DROP_RATIO must be in (0, 1), got 1.0"),
    (["REPR.DROP_RATIO", "-0.3"], "REPR.DROP_RATIO must be in (0, 1), got -0.3"),
    (["REPR.DROP_RATIO", "float('nan')"], "command line: "),
    (["REPR.DROP_RATIO", "much"], "command line: Type mismatch"),
    (["REPR.MAX_DROP_PER_LAYER", "0.2"], "must be at least REPR.DROP_RATIO 0.3, got 0.2"),
    (["REPR.MAX_DROP_PER_LAYER", "0.0"], "REPR.MAX_DROP_PER_LAYER must be in (0, 1], got 0.0"),
    (["REPR.MAX_DROP_PER_LAYER", "1.5"], "REPR.MAX_DROP_PER_LAYER must be in (0, 1], got 1.5"),
    (["REPR.CRITERION", "orto"], "REPR.CRITERION must be one of"),
    (["REPR.CRITERION", "3"], "command line: Type mismatch"),
    (["REPR.CRITERION_BATCHES", "0"], "REPR.CRITERION_BATCHES must be an integer of at least 1, got 0"),
    (["REPR.REINIT.CALIBRATION_BATCHES", "-1"], "REPR.REINIT.CALIBRATION_BATCHES must be an integer of at least 0"),
    (["REPR.REINIT.SCALE", "large"], "REPR.REINIT.SCALE must be one of kept, old, unit, got 'large'"),
    (["REPR.REINIT.FROZEN_NORM", "x"], "REPR.REINIT.FROZEN_NORM must be one of recalibrate, keep, got 'x'"),
    (
        ["REPR.REINIT.RETURN", "loud"],
        "REPR.REINIT.RETURN must be one of as_published, function_preserving, got 'loud'",
    ),
    (["REPR.REINIT.WARMUP_ITERS", "-2"], "REPR.REINIT.WARMUP_ITERS must be an integer of at least -1, got -2"),
    (["REPR.S1_ITERS", "-5"], "REPR.S1_ITERS must be an integer of at least 0, got -5"),
    (
        ["REPR.START_ITER", "-1", "SOLVER.REFERENCE_WORLD_SIZE", "2", "SOLVER.IMS_PER_BATCH", "4"],
        "REPR.START_ITER must be an integer of at least 0, got -1",
    ),
    (["REPR.S2_ITERS", "0"], "REPR.S1_ITERS is 6 and REPR.S2_ITERS 0: set both"),
    (["REPR.S1_ITERS", "2.5"], "command line: Type mismatch"),
    (["REPR.NUM_CYCLES", "0"], "REPR.NUM_CYCLES must be an integer of at least 1, got 0"),
    (["REPR.START_ITER", "-1"], "REPR.START_ITER must be an integer of at least 0, got -1"),
    (["REPR.NUM_CYCLES", "5"], "= 45 iterations and then some of the full network, but SOLVER.MAX_ITER is 40"),
    (["SOLVER.MAX_ITER", "27"], "= 27 iterations and then some of the full network, but SOLVER.MAX_ITER is 27"),
    (
        ["REPR.S1_ITERS", "0", "REPR.S2_ITERS", "0", "SOLVER.MAX_ITER", "8"],
        "do not fit between REPR.START_ITER 0 and 6",
    ),
    (["REPR.LAYERS.INCLUDE", "['nothing.*']"], "matches no trainable Conv2d; the closest trainable ones: backbone."),
    (["REPR.LAYERS.EXCLUDE", "['*']"], "matches no trainable Conv2d"),
    (["REPR.LAYERS.INCLUDE", "['backbone.bottom_up.res2*conv*']", "MODEL.BACKBONE.FREEZE_AT", "2"], "2 that match are"),
    (["REPR.LAYERS.INCLUDE", "[3]"], "REPR.LAYERS.INCLUDE must be a list of patterns, got [3]"),
    (["REPR.LAYERS.INCLUDE", "conv"], "command line: Type mismatch"),
    ([*R18, "MODEL.RESNETS.DEPTH", "19"], "MODEL: 19"),
    (["REPR.DROP_RATE", "0.3"], "Non-existent key: REPR.DROP_RATE: did you mean REPR.DROP_RATIO"),
    (["SOLVER.BASE_RL", "0.3"], "Non-existent key: SOLVER.BASE_RL: did you mean SOLVER.BASE_LR"),
    (["solver.base_lr", "0.3"], "Non-existent key: solver.base_lr: did you mean SOLVER.BASE_LR"),
    (["REPR.ENABLED", "maybe"], "command line: Type mismatch"),
    (["REPR.ENABLED"], "must be KEY VALUE pairs, got"),
    (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE 'gpu' is not a device"),
    (["SOLVER.AMP.ENABLED", "True"], "SOLVER.AMP.ENABLED needs a GPU"),
    (["DATASETS.TRAIN", "('tiny_trian',)"], "tiny_trian"),
    (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
    (["MODEL.ROI_HEADS.NUM_CLASSES", "80"], "MODEL.ROI_HEADS.NUM_CLASSES is 80, but tiny_train has 2 classes"),
    (["MODEL.WEIGHTS", "nowhere/model.pth"], "MODEL.WEIGHTS 'nowhere/model.pth' cannot be read"),
]


@pytest.mark.parametrize(("opts", "fragment"), CONFIG, ids=[" ".join(opts) for opts, _ in CONFIG])
def test_config_values(tiny_cfg, tmp_path, opts, fragment):
    assert fragment in refused(tiny_cfg, *ON, *opts)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(tiny_cfg):
    assert "MODEL.DEVICE is 'cuda' but torch sees no GPU" in refused(tiny_cfg, *ON, "MODEL.DEVICE", "cuda")


def test_numbers_of_processes(tiny_cfg):
    assert "--num-gpus must be at least 1, got 0" in refused(tiny_cfg, *ON, num_gpus=0)
    assert "must be a multiple of --num-gpus 3" in refused(tiny_cfg, *ON, num_gpus=3)
    scaled = ("SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.IMS_PER_BATCH")
    assert "must be a multiple of SOLVER.REFERENCE_WORLD_SIZE 2" in refused(tiny_cfg, *ON, *scaled, 3, num_gpus=3)
    check_run(tiny_cfg(*scaled, 2), num_gpus=3)  # trains with a batch of 3


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (None, "is not a file"),
        ("MODEL: [1, 2", "not valid YAML"),
        ("REPR:\n  ENABLE: True\n", "Non-existent config key: REPR.ENABLE: did you mean REPR.ENABLED"),
        (
            "SOLVER:\n  MAX_ITER: 5\nMODEL:\n  MASK_ON: True\nSOLVER:\n  BASE_LR: 0.1\n",
            "the key SOLVER stands there twice",
        ),
        ("SOLVER:\n  MAX_ITER: 5\n  BASE_LR: 0.1\n  MAX_ITER: 6\n", "the key MAX_ITER stands there twice"),
        ("dataloader:\n  train: {_target_: detectron2.data.build}\nmodel: !!python/object/x {}\n", "give the .py file"),
        ("REPR: 5\n", "REPR"),
        ("MODEL:\n  WEIGHTS: 5\n", "Type mismatch"),
        ("_BASE_: nowhere.yaml\n", "nowhere.yaml"),
        ("_BASE_: repr_r50_fpn.yaml\n", "the one of this name that comes with repr_det is "),
        ("_BASE_: 'my config ü.yaml'\n", "builds on this file again"),
        ("_BASE_:\n", "_BASE_ must be the name of a config file, got None"),
        ("", "must hold config keys with their values (MODEL: ...), got nothing"),
        ("- a\n- b\n", "must hold config keys with their values (MODEL: ...), got ['a', 'b']"),
        ("some text", "must hold config keys with their values (MODEL: ...), got some text"),
        ("1: 2\n", "must hold config keys"),
        ("MODEL:\n", "MODEL is empty: give keys below it, or leave it out"),
        ("REPR:\n", "REPR is empty"),
        ("SEED: !!python/object/apply:os.system ['touch executed']\n", "not valid YAML: could not determine a"),
        (
            'SEED: !!python/object/apply:eval [\'open("executed", "w")\']\n',
            '\'open("executed", "w")\' is not arithmetic',
        ),
        ("SEED: !!python/object/apply:eval ['().__class__']\n", "'().__class__' is not arithmetic"),
        ("SEED: !!python/object/apply:eval ['(']\n", "'(' is not arithmetic"),
        ("SEED: !!python/object/apply:eval 3\n", "not valid YAML"),
        ("\x00\x01", ""),
    ],
)
def test_config_files(tmp_path, monkeypatch, text, fragment):
    path = tmp_path / "my config ü.yaml"
    monkeypatch.chdir(tmp_path)
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        build_config(str(path), [])
    assert fragment in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_no_code_of_a_saved_config_runs(tiny_cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "run" / "config.yaml"
    saved.parent.mkdir()
    saved.write_text("SEED: !!python/object/apply:os.system ['touch executed']\n")
    check_run(tiny_cfg("OUTPUT_DIR", str(saved.parent)), resume=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["retinanet_R_50_FPN_1x", "faster_rcnn_R_50_FPN_1x"])
def test_config_files_of_detectron2_are_read_as_it_reads_them(name):
    path = model_zoo.get_config_file(f"COCO-Detection/{name}.yaml")
    stock, ours = get_cfg(), build_config(path, ["MODEL.DEVICE", "cpu"])
    stock.merge_from_file(path)
    assert ours.MODEL.ANCHOR_GENERATOR == stock.MODEL.ANCHOR_GENERATOR
    assert ours.DATASETS == stock.DATASETS and ours.SOLVER == stock.SOLVER


def test_home_and_variables_in_output_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path))
    config = str(ROOT / "configs" / "baseline_r50_fpn.yaml")
    for given in ("~/x", "$WHERE/x", "${WHERE}/x"):
        assert str(tmp_path / "x") == build_config(config, ["OUTPUT_DIR", given]).OUTPUT_DIR
    with pytest.raises(UserError, match=r"OUTPUT_DIR '\$NOWHERE/x': the variable NOWHERE is not set"):
        build_config(config, ["OUTPUT_DIR", "$NOWHERE/x"])


def test_weights_that_detectron2_reads(tiny_cfg, tmp_path):
    torch.save({"model": {"stem.conv1.weight": torch.zeros(8, 3, 7, 7)}}, tmp_path / "w.pth")
    check_run(tiny_cfg("MODEL.WEIGHTS", f"{tmp_path / 'w.pth'}?matching_heuristics=True"))
    (tmp_path / "w.pt").write_bytes(b"damaged")
    assert "w.pt: not a readable torch checkpoint" in refused(tiny_cfg, "MODEL.WEIGHTS", str(tmp_path / "w.pt"))


def test_a_resumed_run_does_not_need_its_first_weights(tiny_cfg, tmp_path):
    gone = ("MODEL.WEIGHTS", str(tmp_path / "gone.pth"))
    folder = tmp_path / "run"
    folder.mkdir()
    model = build_model(tiny_cfg()).state_dict()
    torch.save({"model": model, "trainer": {}, "iteration": 3}, folder / "model_0000003.pth")
    check_run(tiny_cfg(*gone), resume=True)
    (folder / "model_0000003.pth").unlink()
    assert "gone.pth" in refused(tiny_cfg, *gone, resume=True)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def checkpoint_files(folder):
    good = {"model": {"backbone.x": torch.zeros(3)}, "iteration": 3}
    torch.save(good, folder / "good.pth")
    whole = (folder / "good.pth").read_bytes()
    bomb = Bomb(folder / "executed")
    files = {
        "truncated.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "text.pth": b"not a checkpoint",
        "bomb.pkl": pickle.dumps({"model": bomb}),
        "text.pkl": b"not a pickle",
        "truncated.pkl": pickle.dumps({"model": {"w": np.zeros(100)}})[:80],
        "empty.pkl": b"",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.save({"model": bomb}, folder / "bomb.pth")
    return [*files, "bomb.pth"]


@pytest.mark.parametrize("name", ["truncated", "empty", "text", "bomb"])
@pytest.mark.parametrize("kind", ["pth", "pkl"])
def test_weights_files(tiny_cfg, tmp_path, name, kind):
    assert f"{name}.{kind}" in checkpoint_files(tmp_path)
    message = refused(tiny_cfg, *ON, "MODEL.WEIGHTS", str(tmp_path / f"{name}.{kind}"))
    assert f"{name}.{kind}" in message
    assert not (tmp_path / "executed").exists()


def test_weights_of_a_foreign_architecture(tiny_cfg, tmp_path):
    from repr_det import Trainer

    torch.save({"model": {"features.0.weight": torch.zeros(3)}}, tmp_path / "vgg.pth")
    trainer = Trainer(tiny_cfg(*ON, "MODEL.WEIGHTS", str(tmp_path / "vgg.pth")))
    with pytest.raises(UserError, match="does not hold any weight of this model"):
        trainer.resume_or_load(resume=False)


def test_official_pickles_load(tiny_cfg, tmp_path):
    from repr_det import Trainer

    cfg = tiny_cfg(*ON, "MODEL.WEIGHTS", str(tmp_path / "R-18.pkl"))
    trainer = Trainer(cfg)
    rng = np.random.default_rng(0)
    stem = rng.normal(size=(8, 3, 7, 7)).astype(np.float32)
    with open(tmp_path / "R-18.pkl", "wb") as file:
        pickle.dump(
            {"model": {"stem.conv1.weight": stem}, "__author__": "torchvision", "matching_heuristics": True}, file
        )
    trainer.resume_or_load(resume=False)
    np.testing.assert_array_equal(trainer.model.backbone.bottom_up.stem.conv1.weight.detach().numpy(), stem)


@pytest.mark.parametrize("trace", ["model_0000003.pth", "last_checkpoint", "metrics.json", "repr_events.jsonl"])
def test_folder_of_another_run_is_left_alone(tiny_cfg, tmp_path, trace):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / trace).write_text("precious")
    message = refused(tiny_cfg, *ON)
    assert "holds another run" in message and trace in message and "--resume" in message
    assert {p.name: p.read_text() for p in folder.iterdir()} == {trace: "precious"}


def test_resume_of_another_schedule_arm_or_broken_checkpoint(tiny_cfg, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(tiny_cfg(*ON).dump())
    message = refused(tiny_cfg, *ON, "REPR.S1_ITERS", "5", resume=True)
    assert "s1_iters=6" in message and "s1_iters=5" in message
    assert "REPR.ENABLED True, this one has False" in refused(tiny_cfg, "SOLVER.MAX_ITER", "40", resume=True)
    (folder / "last_checkpoint").write_text("model_0000009.pth")
    assert "names 'model_0000009.pth', which is not there" in refused(tiny_cfg, *ON, resume=True)
    (folder / "model_0000009.pth").write_bytes(b"half")
    assert "to resume from an older one write its name into" in refused(tiny_cfg, *ON, resume=True)
    (folder / "last_checkpoint").write_bytes(b"\xff\xfe")
    assert "which is not there" in refused(tiny_cfg, *ON, resume=True)


def test_output_folder_that_is_a_file_or_cannot_be_made(tiny_cfg, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in refused(tiny_cfg, *ON, "OUTPUT_DIR", str(tmp_path / "file"))
    assert refused(tiny_cfg, *ON, "OUTPUT_DIR", str(tmp_path / "file" / "run"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert f"is a link to {tmp_path}/nowhere, which" in refused(tiny_cfg, *ON, "OUTPUT_DIR", str(tmp_path / "link"))
    if os.path.isdir("/proc/self"):  # a folder that even root cannot write to
        assert "cannot be written" in refused(tiny_cfg, *ON, "OUTPUT_DIR", "/proc/self/run")


def test_one_line_and_status_2(tiny_data, tmp_path, capsys):
    argv = ["--config-file", str(ROOT / "configs" / "repr_r50_fpn.yaml"), "--register", "mine", "nowhere.json", "."]
    with pytest.raises(SystemExit) as stopped:
        run_tool(lambda: start(argv))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in error and "nowhere.json" in error


def test_num_classes_follow_from_registered_data(tiny_data, tmp_path):
    config, json_file = str(ROOT / "configs" / "repr_r50_fpn.yaml"), str(tiny_data / "tiny.json")
    register = [["followed", json_file, str(tiny_data / "images")]]
    opts = ["DATASETS.TRAIN", "('followed',)", "DATASETS.TEST", "('followed',)"]
    assert build_config(config, opts, register).MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert build_config(config, [*opts, "MODEL.ROI_HEADS.NUM_CLASSES", "9"], register).MODEL.ROI_HEADS.NUM_CLASSES == 9
    assert json.loads(Path(json_file).read_text())["categories"][0]["name"] == "blue"
