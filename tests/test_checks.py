"""What is known to be wrong before a run writes anything: its keys, what it begins with, what its data lack."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_folder import Folder
from conftest import R18, SMALL
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from pycocotools import mask as mask_utils

from repr_det import UserError
from repr_det.commands import checks, data_checks
from repr_det.commands.arguments import build_config
from repr_det.commands.checks import check_run
from repr_det.commands.data import DATA_FILE
from repr_det.datasets import register_coco_format
from repr_det.detectron.config import scale_to_world, without_repr
from repr_det.runs.files import run_traces

ROOT = Path(__file__).resolve().parents[1]
ON = ["REPR.ENABLED", "True", "SOLVER.MAX_ITER", "40", "REPR.S1_ITERS", "6", "REPR.S2_ITERS", "3"]


def refused(cfg, **options) -> str:
    with pytest.raises(UserError) as error:
        check_run(cfg, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def weights(tiny_data) -> dict[str, torch.Tensor]:
    """Of the tiny detector."""
    config = str(ROOT / "configs" / "baseline_r50_fpn.yaml")
    return build_model(build_config(config, SMALL)).state_dict()


def test_a_config_without_the_node_is_scaled_too(tiny_cfg):
    cfg = without_repr(tiny_cfg("SOLVER.REFERENCE_WORLD_SIZE", "2", "SOLVER.MAX_ITER", "4"))
    assert scale_to_world(cfg, 1).SOLVER.MAX_ITER == 8


def test_the_batch_is_that_of_the_scaled_config(tiny_cfg):
    """1 image for 1 process is 2 for 2."""
    check_run(tiny_cfg("SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.IMS_PER_BATCH", "1"), num_gpus=2)
    assert "must be a multiple of --num-gpus 3" in refused(tiny_cfg(), num_gpus=3)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SOLVER.CHECKPOINT_PERIOD", "0"], "SOLVER.CHECKPOINT_PERIOD must be at least 1, got 0"),
        (["SOLVER.CHECKPOINT_PERIOD", "-5"], "SOLVER.CHECKPOINT_PERIOD must be at least 1, got -5"),
        (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH must be at least 1, got 0"),
        (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER must be at least 1, got 0"),
        (
            ["TEST.AUG.ENABLED", "True", "MODEL.META_ARCHITECTURE", "ProposalNetwork"],
            "Detectron2 has test-time augmentation for GeneralizedRCNN, not ProposalNetwork: set it to False",
        ),
        (["MODEL.KEYPOINT_ON", "True"], "is True, but in tiny_train the metadata have no keypoint_names"),
        (["MODEL.MASK_ON", "True"], "in tiny_train annotation 1 has no segmentation"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[8],[16]]"], "MODEL: "),
        (["SOLVER.STEPS", "(12,40)", "SOLVER.MAX_ITER", "40"], "SOLVER: no learning-rate schedule of STEPS (12, 40)"),
        (["SOLVER.STEPS", "(12,6)"], "SOLVER: no learning-rate schedule of STEPS (12, 6)"),
        (["SOLVER.LR_SCHEDULER_NAME", "Foo"], "Unknown LR scheduler: Foo"),
        (["SOLVER.BASE_LR", "-0.1"], "SOLVER: Invalid learning rate: -0.1"),
        (["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "foo"], "SOLVER: 'foo' is not"),
        (["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolut"], "INPUT.CROP: no crops of TYPE absolut,"),
        (["INPUT.RANDOM_FLIP", "sideways"], "INPUT: no augmentations of RANDOM_FLIP sideways, MIN_SIZE_TRAIN"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "foo"], "MIN_SIZE_TRAIN_SAMPLING foo: foo"),
        (
            ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", "(64,)"],
            "short_edge_length must be two values using 'range' sample style. Got (64,)",
        ),
        (["INPUT.FORMAT", "XYZ"], "INPUT.FORMAT 'XYZ' is none that Detectron2 reads images in ("),
        (["DATALOADER.SAMPLER_TRAIN", "Foo"], "DATALOADER.SAMPLER_TRAIN must be one of TrainingSampler, "),
        (["OUTPUT_DIR", ""], "OUTPUT_DIR is empty"),
        (
            ["TEST.EXPECTED_RESULTS", "[['bbox','AP']]"],
            "TEST.EXPECTED_RESULTS must be a list of [task, metric, value, tolerance], got ['bbox', 'AP']",
        ),
        (
            ["MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TRAIN", "('nope.pkl',)"],
            "DATASETS.PROPOSAL_FILES_TRAIN 'nope.pkl' cannot be read",
        ),
        (["MODEL.LOAD_PROPOSALS", "True"], "DATASETS.PROPOSAL_FILES_TRAIN must name a file for each of 1 data sets"),
        (
            ["MODEL.META_ARCHITECTURE", "PanopticFPN"],
            "PanopticFPN learns from semantic segmentation, which tiny_train (COCO format) does not have",
        ),
        ([*R18, "MODEL.RESNETS.DEPTH", "19"], "MODEL: 19"),
        (["MODEL.FPN.OUT_CHANNELS", "-1"], "MODEL: "),
    ],
)
@pytest.mark.parametrize("arm", [[], ON], ids=["baseline", "repr"])
def test_both_arms_get_the_same_checks(tiny_cfg, tmp_path, arm, opts, message):
    assert message in refused(tiny_cfg(*arm, *opts))
    assert not (tmp_path / "run").exists()


def test_what_has_no_effect_is_said(tiny_cfg, caplog):
    check_run(tiny_cfg("SOLVER.WARMUP_ITERS", 9, "SOLVER.MAX_ITER", 10, "TEST.DETECTIONS_PER_IMAGE", 100))
    assert "WARMUP_ITERS" not in caplog.text and "TEST.DETECTIONS" not in caplog.text
    check_run(tiny_cfg("SOLVER.WARMUP_ITERS", 10, "SOLVER.MAX_ITER", 10, "TEST.DETECTIONS_PER_IMAGE", 400))
    assert "SOLVER.WARMUP_ITERS 10 is no shorter than SOLVER.MAX_ITER 10: the learning rate never comes" in caplog.text
    assert "TEST.DETECTIONS_PER_IMAGE is 400, and COCO's AP counts the best 100 of an image" in caplog.text


# ---- the folder ----


def test_a_folder_in_which_nothing_was_trained_blocks_no_start(tiny_cfg, tmp_path):
    folder = tmp_path / "run"
    (folder / "inference").mkdir(parents=True)
    for name in ("config.yaml", "config_detectron2.yaml", "log.txt", "data_sets.json"):
        (folder / name).write_text("{}")
    for name in ("metrics.json", "repr_events.jsonl"):  # opened, and the run stopped before its first step
        (folder / name).write_text("")
    assert run_traces(folder) == []
    check_run(tiny_cfg())
    (folder / "metrics.json").write_text("{}\n")
    assert "holds another run (metrics.json)" in refused(tiny_cfg())


# ---- what it begins with ----


def test_eval_only_needs_weights_and_all_of_them(tiny_cfg, tmp_path, weights):
    assert "--eval-only needs a checkpoint" in refused(tiny_cfg(), eval_only=True)
    torch.save({"model": weights}, tmp_path / "whole.pth")
    check_run(tiny_cfg("MODEL.WEIGHTS", str(tmp_path / "whole.pth")), eval_only=True)
    backbone = {k: v for k, v in weights.items() if "bottom_up" in k}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    cfg = tiny_cfg("MODEL.WEIGHTS", str(tmp_path / "backbone.pth"))
    check_run(cfg)
    assert "does not hold all weights of this model" in refused(cfg, eval_only=True)


def test_weights_that_fit_no_model_are_refused_before_anything_is_written(tiny_cfg, tmp_path):
    torch.save({"model": {"features.0.weight": torch.zeros(3)}}, tmp_path / "vgg.pth")
    assert "does not hold any weight of this model" in refused(tiny_cfg("MODEL.WEIGHTS", str(tmp_path / "vgg.pth")))
    torch.save({"net": {"conv.weight": torch.zeros(3)}}, tmp_path / "odd.pth")
    assert "odd.pth" in refused(tiny_cfg("MODEL.WEIGHTS", str(tmp_path / "odd.pth")))
    for name in ("damaged.pt", "damaged.pth.tar", "damaged"):
        (tmp_path / name).write_bytes(b"half a file")
        assert "not a readable torch checkpoint" in refused(tiny_cfg("MODEL.WEIGHTS", str(tmp_path / name)))
    assert not (tmp_path / "run").exists()


def test_the_query_of_weights(tiny_cfg, tmp_path, weights):
    part = {k.removeprefix("backbone.bottom_up."): v for k, v in weights.items() if "bottom_up" in k}
    torch.save(part, tmp_path / "part.pth")
    path = str(tmp_path / "part.pth")
    check_run(tiny_cfg("MODEL.WEIGHTS", f"{path}?matching_heuristics=True"))
    assert "does not hold any weight" in refused(tiny_cfg("MODEL.WEIGHTS", path))
    assert "only ?matching_heuristics=True is known" in refused(tiny_cfg("MODEL.WEIGHTS", f"{path}?strict=1"))


def test_weights_that_a_resumed_run_does_not_read(tiny_cfg, tmp_path, weights):
    (tmp_path / "run").mkdir()
    torch.save({"model": weights, "iteration": 3}, tmp_path / "run" / "model_0000003.pth")
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000003.pth")
    cfg = tiny_cfg("MODEL.WEIGHTS", "gone.pth")
    check_run(cfg, resume=True)
    check_run(cfg, resume=True, eval_only=True)
    wider = tiny_cfg("MODEL.WEIGHTS", "gone.pth", "MODEL.FPN.OUT_CHANNELS", "32")
    assert "does not hold all weights" in refused(wider, resume=True)


def test_a_sub_network_is_no_start(tiny_cfg, tmp_path, weights, caplog):
    weights = {name: value.clone() for name, value in weights.items()}
    conv = "backbone.bottom_up.res3.0.conv1"
    for key in ("weight", "norm.weight", "norm.bias"):
        weights[f"{conv}.{key}"][[3, 5]] = 0
    torch.save({"model": weights}, tmp_path / "sub.pth")
    opts = ["MODEL.WEIGHTS", str(tmp_path / "sub.pth")]
    for arm in ([], ON):
        message = refused(tiny_cfg(*arm, *opts))
        assert f"holds 2 filters that are zero with their norm, 2 of them in {conv}" in message and "sub.pth" in message
    check_run(tiny_cfg(*opts), eval_only=True)
    assert f"holds 2 filters that are zero with their norm, 2 of them in {conv}: a sub-network, whose AP" in caplog.text
    weights[f"{conv}.norm.bias"][:] = 1  # a channel that says something
    torch.save({"model": weights}, tmp_path / "sub.pth")
    check_run(tiny_cfg(*opts))


def test_the_meta_device_is_left_where_a_model_needs_numbers(tiny_cfg):
    built = []

    def build():
        layer = torch.nn.Linear(2, 2)
        built.append(layer.weight.device.type)
        layer.share = layer.weight.sum().item()
        return layer

    check_run(tiny_cfg(), build=build)
    assert built == ["meta", "cpu"]


# ---- data ----


@pytest.fixture
def mine(folder, catalogs, tmp_path):
    """``mine(change, KEY, VALUE, ...)``: a config that trains on the folder after a change of its content."""

    def make(change=lambda content: None, *opts: str):
        change(folder.content)
        folder.check(for_evaluation=False)
        own = [*SMALL, "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)", "OUTPUT_DIR", str(tmp_path / "run")]
        register = [["mine", str(folder.json), str(folder.images)]]
        return build_config(str(ROOT / "configs" / "baseline_r50_fpn.yaml"), [*own, *opts], register)

    return make


EYE = mask_utils.encode(np.asfortranarray(np.eye(30, 40, dtype=np.uint8)))["counts"].decode()


def polygons(content, rle=0):
    for number, entry in enumerate(content["annotations"]):
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
        if number < rle:
            size = next([i["height"], i["width"]] for i in content["images"] if i["id"] == entry["image_id"])
            entry["segmentation"] = {"size": size, "counts": [0, size[0] * size[1]]}


def test_masks(mine):
    mask_on = ["MODEL.MASK_ON", "True"]
    assert "in mine annotation 1 has no segmentation" in refused(mine(lambda content: None, *mask_on))
    check_run(mine(polygons, *mask_on))
    message = refused(mine(lambda content: polygons(content, rle=2), *mask_on))
    assert message.startswith("INPUT.MASK_FORMAT is 'polygon', but in mine annotation 1 has an RLE mask")
    assert message.endswith("2 such of 4): set it to bitmask")
    check_run(mine(lambda content: polygons(content, rle=2), *mask_on, "INPUT.MASK_FORMAT", "bitmask"))

    def wrong(content):
        polygons(content)
        content["annotations"][1]["segmentation"][0][2] = "4"

    check_run(mine(wrong))
    message = refused(mine(wrong, *mask_on))
    assert message.startswith("MODEL.MASK_ON is True, but in mine annotation 2 has a polygon with a coordinate that")


def test_masks_that_are_only_evaluated(mine, folder):
    """pycocotools would end in a KeyError, or not at all, after the training."""
    mask_on = ["MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT", "bitmask"]
    train = Folder(folder.json.parents[1] / "train")
    polygons(train.content)
    train.check()
    register_coco_format("sound", str(train.json), str(train.images))
    mask_on += ["DATASETS.TRAIN", "('sound',)"]
    assert "in mine annotation 1 has no segmentation" in refused(mine(lambda content: None, *mask_on))

    def damaged(value, **more):
        def change(content):
            polygons(content)
            content["annotations"][1].update(segmentation=value, **more)

        return mine(change, *mask_on)

    assert "in mine annotation 2 has no segmentation" in refused(damaged([], iscrowd=1))
    for counts, gap in (
        ("zzz", "of COCO's compressed form: 'zzz'"),
        ([0, 1300], "add up to 1300, not to the 1200 pix"),
    ):
        message = refused(damaged({"size": [30, 40], "counts": counts}))
        assert f"in mine annotation 2 has RLE whose counts {'are not ' * (counts == 'zzz')}{gap}" in message
    check_run(damaged({"size": [30, 40], "counts": EYE}))


def test_area_is_needed_for_evaluation_only(mine):
    def without_area(content):
        for entry in content["annotations"]:
            del entry["area"]

    check_run(mine(without_area, "DATASETS.TEST", "()"))
    assert "has no 'area', which COCO evaluation needs" in refused(mine())


def test_keypoints_need_metadata(mine):
    def keypoints(content):
        for entry in content["annotations"]:
            entry["keypoints"] = [1, 2, 2] * 17

    cfg = mine(keypoints, "MODEL.KEYPOINT_ON", "True", "DATASETS.TEST", "()")
    assert "51 numbers as keypoints, and its keypoint_names ask for 0 of each" in refused(cfg)
    MetadataCatalog.get("mine").set(keypoint_names=["nose"] * 17, keypoint_flip_map=[])
    data_checks.check_datasets(cfg)


@pytest.mark.parametrize("odd, shown", [([1, 2, 2] * 16, "48, 51"), ([1, 2] * 17, "34, 51"), (None, "0, 51")])
def test_keypoints_of_another_number_are_refused(mine, odd, shown):
    """Detectron2 stacks them, and would end in a ValueError at the first image that has both."""

    def keypoints(content):
        for entry in content["annotations"]:
            entry["keypoints"] = [1, 2, 2] * 17
        content["annotations"][1]["keypoints"] = odd

    cfg = mine(keypoints, "MODEL.KEYPOINT_ON", "True", "DATASETS.TEST", "()")
    MetadataCatalog.get("mine").set(keypoint_names=["nose"] * 17, keypoint_flip_map=[])
    assert f"objects have {shown} numbers as keypoints, and its keypoint_names ask for 51" in refused(cfg)


def test_a_registered_data_set_beside_those_that_are_used(folder, catalogs, caplog):
    config(two_files(folder, {9: "cell"}), "DATASETS.TEST", "()")
    assert "--register v: no key names it, the run trains on t and tests on nothing" in caplog.text
    config(two_files(folder, {9: "cell"}), "DATASETS.TRAIN", "('shapes_train',)", eval_only=True)


def test_a_registered_data_set_that_no_key_names(mine):
    with pytest.raises(UserError, match=r"--register mine: no key names it.* trains on shapes_train .* on shapes_val"):
        mine(lambda content: None, "DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)")


def two_files(folder: Folder, val_ids: dict[int, str]) -> list[list[str]]:
    """--register of t and v, which lists other classes."""
    folder.check()
    content = json.loads(folder.json.read_text())
    ids = {c["name"]: c["id"] for c in content["categories"]}
    content["categories"] = [{"id": i, "name": name} for i, name in val_ids.items()]
    back = {ids[name]: i for i, name in val_ids.items() if name in ids}
    content["annotations"] = [
        a | {"category_id": back[a["category_id"]]} for a in content["annotations"] if a["category_id"] in back
    ]
    val = folder.json.with_name("val.json")
    val.write_text(json.dumps(content))
    return [["t", str(folder.json), str(folder.images)], ["v", str(val), str(folder.images)]]


def config(register, *opts, **options):
    own = [*SMALL, "DATASETS.TRAIN", "('t',)", "DATASETS.TEST", "('v',)", *opts]
    at = own.index("MODEL.ROI_HEADS.NUM_CLASSES")
    del own[at : at + 2]
    return build_config(str(ROOT / "configs" / "baseline_r50_fpn.yaml"), own, register, **options)


@pytest.mark.parametrize("copied", [None, "same name", "other name"])
def test_images_of_training_in_the_test_set_are_told(folder, catalogs, tmp_path, caplog, copied):
    register = two_files(folder, {3: "cell", 7: "plate"})
    if copied:
        images = shutil.copytree(folder.images, tmp_path / "copied")
        content = json.loads(Path(register[1][1]).read_text())
        Image.new("RGB", (64, 64), (200, 1, 1)).save(images / "5.jpg")  # one image is of its own
        if copied == "other name":
            for entry in content["images"]:
                (images / entry["file_name"]).rename(images / f"val_{entry['file_name']}")
                entry["file_name"] = f"val_{entry['file_name']}"
        Path(register[1][1]).write_text(json.dumps(content))
        register[1][2] = str(images)
    cfg = config(register, "OUTPUT_DIR", str(tmp_path / "run"))
    data_checks.check_datasets(cfg)
    (told,) = [record.getMessage() for record in caplog.records]
    shared = "2 of 3" if copied else "3 of 3"
    assert told.startswith(
        f"{shared} images of v (DATASETS.TEST) that were compared are in t (DATASETS.TRAIN) too, the "
    )
    assert str(folder.images / "1.jpg") in told
    caplog.clear()
    data_checks.check_datasets(cfg, eval_only=True)
    assert not caplog.records


def test_one_name_in_place_of_a_tuple_of_names(tiny_cfg):
    cfg = tiny_cfg().clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = "tiny_train"
    assert "data sets must be a tuple of names, ('tiny_train',), got 'tiny_train'" in refused(cfg)
    for key, value, wanted in (("DATASETS.TRAIN", "tiny_train", "'tiny_train'"), ("INPUT.MIN_SIZE_TRAIN", "64", "64")):
        with pytest.raises(UserError) as error:
            tiny_cfg(key, value)
        assert str(error.value) == f"command line: {key} must be a tuple, ({wanted},), got {wanted}"


def test_num_classes_are_those_of_the_run(folder, catalogs, tmp_path):
    cfg = config(two_files(folder, {9: "cell"}), "OUTPUT_DIR", str(tmp_path / "run"))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    check_run(cfg)


def test_the_classes_of_the_checkpoint_hold(folder, catalogs, tmp_path, weights, monkeypatch):
    """Same number of classes, other names or another order."""
    monkeypatch.setattr(checks, "_check_weights", lambda *args: None)
    run = tmp_path / "run"
    run.mkdir()
    (run / "model_0000003.pth").write_bytes(b"x")
    register = two_files(folder, {3: "cell", 7: "plate"})
    record = {"t": {"classes": ["cell", "plate"]}, "v": {"classes": ["plate"]}}
    (run / DATA_FILE).write_text(json.dumps(record))
    cfg = config(register, "OUTPUT_DIR", str(run))
    monkeypatch.setattr(checks, "check_last_checkpoint", lambda folder: None)
    check_run(cfg, resume=True)
    for classes in (["plate", "cell"], ["cell", "plates"]):
        (run / DATA_FILE).write_text(json.dumps({"t": {"classes": classes}}))
        message = refused(cfg, resume=True)
        assert f"was trained on the classes {classes[0]}, {classes[1]}, in this order" in message
        assert "have cell, plate" in message


def test_evaluation_follows_the_classes_of_the_checkpoint(folder, catalogs, tmp_path):
    """--eval-only with the validation set alone: its own order of the classes says nothing of the model's."""
    from repr_det import datasets

    register = two_files(folder, {1: "plate", 2: "cell"})[1:]
    (tmp_path / DATA_FILE).write_text(json.dumps({"t": {"classes": ["cell", "drop", "plate"]}}))
    cfg = config(register, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth"), eval_only=True)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3 and datasets.class_names("v") == ("cell", "drop", "plate")
    checks.check_datasets(cfg, eval_only=True)
    assert datasets.class_names("v") == ("cell", "drop", "plate")
    with pytest.raises(
        UserError, match=r"data set v has .*, and the checkpoint has cell, plates: .* lacks 'plate'"
    ):
        (tmp_path / DATA_FILE).write_text(json.dumps({"t": {"classes": ["cell", "plates"]}}))
        config(register, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth"), eval_only=True)
