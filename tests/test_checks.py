"""What data lack that a run needs, and whose classes they have: known before the run writes anything."""

import json
import shutil
from pathlib import Path

import pytest
from coco_folder import Folder
from conftest import ROOT, SMALL
from detectron2.data import MetadataCatalog
from PIL import Image
from test_classes import write

from repr_det import UserError
from repr_det.commands import checks
from repr_det.commands.arguments import build_config
from repr_det.commands.checks import check_run
from repr_det.commands.data import DATA_FILE, check_datasets
from repr_det.datasets import class_names, register_coco_format

CONFIG = str(ROOT / "configs" / "baseline_r50_fpn.yaml")
MASK_ON = ["MODEL.MASK_ON", "True"]
BITMASK = [*MASK_ON, "INPUT.MASK_FORMAT", "bitmask"]


def refused(cfg, **options) -> str:
    with pytest.raises(UserError) as error:
        check_run(cfg, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def mine(folder, catalogs, tmp_path):
    """``mine(change, KEY, VALUE, ...)``: a config that trains on the folder after a change of its content."""

    def make(change=lambda content: None, *opts: str):
        change(folder.content)
        folder.check(for_evaluation=False)
        own = [*SMALL, "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)", "OUTPUT_DIR", str(tmp_path / "run")]
        return build_config(CONFIG, [*own, *opts], [["mine", str(folder.json), str(folder.images)]])

    return make


def masks(rle=0, **second):
    """A change: a polygon for each object, RLE for the first ones; ``second`` changes the second object."""

    def change(content):
        for number, entry in enumerate(content["annotations"]):
            x, y, w, h = entry["bbox"]
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
            if number < rle:
                size = next([i["height"], i["width"]] for i in content["images"] if i["id"] == entry["image_id"])
                entry["segmentation"] = {"size": size, "counts": [0, size[0] * size[1]]}
        content["annotations"][1].update(second)

    return change


def test_masks(mine):
    assert "segmentation" in refused(mine(lambda content: None, *MASK_ON))
    check_run(mine(masks(), *MASK_ON))
    message = refused(mine(masks(rle=2), *MASK_ON))
    assert message.startswith("INPUT.MASK_FORMAT is 'polygon', but ") and message.endswith(": set it to bitmask")
    check_run(mine(masks(rle=2), *BITMASK))
    wrong = masks(segmentation=[[1, 2, "3", 4, 5, 6]])
    check_run(mine(wrong))
    assert refused(mine(wrong, *MASK_ON)).startswith("MODEL.MASK_ON is True, but in mine annotation 2 has a polygon")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"segmentation": [], "iscrowd": 1}, "segmentation"),
        ({"segmentation": {"size": [30, 40], "counts": [0, 1300]}}, "RLE whose counts add up to 1300, not to 1200"),
    ],
)
def test_masks_that_are_only_evaluated(mine, folder, second, message):
    """pycocotools would end in a KeyError, or not at all, after the training."""
    train = Folder(folder.json.parents[1] / "train")
    masks()(train.content)
    train.check()
    register_coco_format("sound", str(train.json), str(train.images))
    assert message in refused(mine(masks(**second), *BITMASK, "DATASETS.TRAIN", "('sound',)"))


@pytest.mark.parametrize(("odd", "shown"), [([1, 2, 2] * 17, ""), ([1, 2, 2] * 16, "48, 51"), (None, "0, 51")])
def test_keypoints_need_metadata_and_one_number(mine, odd, shown):
    """Detectron2 stacks them, and would end in a ValueError at the first image that has both."""

    def keypoints(content):
        for entry in content["annotations"]:
            entry["keypoints"] = [1, 2, 2] * 17
            entry.pop("area")  # which only evaluation needs
        content["annotations"][1]["keypoints"] = odd

    cfg = mine(keypoints, "MODEL.KEYPOINT_ON", "True", "DATASETS.TEST", "()")
    assert "keypoint_names" in refused(cfg)
    MetadataCatalog.get("mine").set(keypoint_names=["nose"] * 17, keypoint_flip_map=[])
    if shown:
        assert f"{shown} numbers" in refused(cfg)
    else:
        check_datasets(cfg)
        assert "must have a finite number as 'area'" in refused(mine())


def two_files(folder: Folder, val_ids: dict[int, str]) -> list[list[str]]:
    """--register of t and v, which lists other classes."""
    files = {"t": {3: "cell", 7: "plate"}, "v": val_ids}
    return [[name, str(write(folder, ids, name)), str(folder.images)] for name, ids in files.items()]


def config(register, *opts, **options):
    own = [*SMALL, "DATASETS.TRAIN", "('t',)", "DATASETS.TEST", "('v',)", *map(str, opts)]
    at = own.index("MODEL.ROI_HEADS.NUM_CLASSES")
    del own[at : at + 2]
    return build_config(CONFIG, own, register, **options)


def test_a_registered_data_set_that_no_key_names(folder, catalogs, mine, caplog):
    config(two_files(folder, {9: "cell"}), "DATASETS.TEST", "()")
    assert "--register v: no key names it, the run trains on t and " in caplog.text
    config(two_files(folder, {9: "cell"}), "DATASETS.TRAIN", "('shapes_train',)", eval_only=True)
    with pytest.raises(UserError, match=r"--register mine: no key names it.* trains on shapes_train .* on shapes_val"):
        mine(lambda content: None, "DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)")


@pytest.mark.parametrize("copied", [False, True])
def test_images_of_training_in_the_test_set_are_told(folder, catalogs, tmp_path, caplog, copied):
    register = two_files(folder, {3: "cell", 7: "plate"})
    if copied:  # under other names, and one image is of its own
        images, path = Path(shutil.copytree(folder.images, tmp_path / "copied")), Path(register[1][1])
        content = json.loads(path.read_text())
        Image.new("RGB", (64, 64), (200, 1, 1)).save(images / "5.jpg")
        for entry in content["images"]:
            (images / entry["file_name"]).rename(images / f"val_{entry['file_name']}")
            entry["file_name"] = f"val_{entry['file_name']}"
        path.write_text(json.dumps(content))
        register[1][2] = str(images)
    cfg = config(register, "OUTPUT_DIR", tmp_path / "run")
    check_datasets(cfg)
    (told,) = [record.getMessage() for record in caplog.records]
    shared = f"{2 if copied else 3} of 3 images of v (DATASETS.TEST) that were compared are in t (DATASETS.TRAIN) too, "
    assert told.startswith(shared) and "1.jpg" in told
    caplog.clear()
    check_datasets(cfg, eval_only=True)
    assert not caplog.records


def test_num_classes_are_those_of_the_run(folder, catalogs, tmp_path):
    register = two_files(folder, {9: "cell"})
    cfg = config(register, "OUTPUT_DIR", tmp_path / "run")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    check_run(cfg)
    given = ["DATASETS.TRAIN", "('t',)", "DATASETS.TEST", "('v',)", "MODEL.ROI_HEADS.NUM_CLASSES", "9"]
    assert build_config(CONFIG, given, register).MODEL.ROI_HEADS.NUM_CLASSES == 9


def test_the_classes_of_the_checkpoint_hold(folder, catalogs, tmp_path, monkeypatch):
    """Same number of classes, other names or another order."""
    monkeypatch.setattr(checks, "_check_weights", lambda *args: None)
    (tmp_path / "model_0000003.pth").write_bytes(b"x")
    cfg = config(two_files(folder, {3: "cell", 7: "plate"}), "OUTPUT_DIR", tmp_path)
    for classes in (["cell", "plate"], ["plate", "cell"], ["cell", "plates"]):
        (tmp_path / DATA_FILE).write_text(json.dumps({"t": {"classes": classes}, "v": {"classes": ["plate"]}}))
        if classes == ["cell", "plate"]:
            check_run(cfg, resume=True)
        else:
            message = refused(cfg, resume=True)
            assert f"has the classes {classes[0]}, {classes[1]}, in this order, and these data have cell" in message


def test_evaluation_follows_the_classes_of_the_checkpoint(folder, catalogs, tmp_path):
    """--eval-only with the validation set alone: its own order of the classes says nothing of the model's."""
    register = two_files(folder, {1: "plate", 2: "cell"})[1:]
    (tmp_path / DATA_FILE).write_text(json.dumps({"t": {"classes": ["cell", "drop", "plate"]}}))
    opts = ["MODEL.WEIGHTS", tmp_path / "model_final.pth"]
    cfg = config(register, *opts, eval_only=True)
    check_datasets(cfg, eval_only=True)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3 and class_names("v") == ("cell", "drop", "plate")
    (tmp_path / DATA_FILE).write_text(json.dumps({"t": {"classes": ["cell", "plates"]}}))
    with pytest.raises(UserError, match=r"v has .* checkpoint.* cell, plates: .*'plate'"):
        config(register, *opts, eval_only=True)
