"""Masks and keypoints of COCO-format data: against their boxes, how pycocotools reads them, and what a run needs."""

import itertools
import json

import numpy as np
import pytest
from coco_folder import SIZES, Folder, annotation, category, every, many
from conftest import refused
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from pycocotools import mask as mask_utils

from repr_det import Trainer
from repr_det.commands.checks import check_run
from repr_det.datasets import CocoEvaluator, objects, register_coco_format

MASK_ON = ["MODEL.MASK_ON", "True"]
BITMASK = [*MASK_ON, "INPUT.MASK_FORMAT", "bitmask"]


@pytest.mark.parametrize("kind", ["mask", "keypoint"])
@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda points, size: points, None),
        (lambda points, size: points.round(), None),
        (lambda points, size: points / size, "; read as fractions, 60 of 60 fit their boxes (bbox ["),
        (lambda points, size: points[:, ::-1], "; read as y before x, 60 of 60 fit their boxes (bbox ["),
        (lambda points, size: points / 2, "in its bbox, and ends, as all do, within 60% of its image, like one of"),
        (lambda points, size: points + 1000, "more outside than in its bbox (bbox ["),
    ],
)
def test_masks_and_keypoints_are_held_against_their_boxes(folder, kind, form, message):
    many(folder)
    for entry in folder.content["annotations"]:
        x, y, w, h = entry["bbox"]
        points = form(np.array([[x, y], [x + w, y], [x + w, y + h]]), np.array(SIZES[entry["image_id"]]))
        seen = np.hstack([points, [[1], [2], [2]]]).ravel().tolist()
        entry.update(segmentation=[points.ravel().tolist()], keypoints=[*seen, 0, 0, 0])
    lines = folder.check().gaps[f"{kind} doubts"]
    assert len(lines) == (message is not None) and all(message in line for line in lines)
    every(lambda a: {"keypoints": [1, 2, 0]})(folder)
    assert "has only keypoints of visibility 0, as all have" in folder.check().gaps["keypoint doubts"][0]


def test_every_string_of_pycocotools_is_read():
    generator = np.random.default_rng(0)
    for width, height, share in itertools.product((1, 40, 640), (1, 30, 480), (0, 0.001, 0.5, 1)):
        pixels = np.asfortranarray((generator.random((height, width)) < share).astype(np.uint8))
        text = mask_utils.encode(pixels)["counts"].decode()
        assert objects._mask_fault({"size": [height, width], "counts": text}, width, height) is None
        changes = np.diff(pixels.ravel("F"), prepend=0).nonzero()[0]
        runs = np.diff(changes, prepend=0, append=pixels.size).tolist()
        assert objects._runs(text) == runs
        if pixels.any():
            y, x = pixels.nonzero()
            for counts in (text, runs):
                corners = objects.outline({"size": [height, width], "counts": counts})
                assert corners == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]
        for damaged in (text[:-1], text + "z", "!" + text):
            fault = objects._mask_fault({"size": [height, width], "counts": damaged}, width, height)
            assert fault.startswith("RLE whose counts")


def masks(**second):
    """A change: a polygon for each object, and other values for the second one."""
    polygons = every(lambda a: {"segmentation": [[2, 3, 12, 3, 12, 15]]})
    return lambda folder: (polygons(folder), annotation(1, **second)(folder))


def test_masks(mine, caplog):
    assert "segmentation" in refused(check_run, mine(*MASK_ON))
    outside = "MODEL.MASK_ON is True, but in mine annotation 2 has a segmentation more outside than in its bbox (bbox ["
    for more in ((), MASK_ON):
        assert outside not in caplog.text
        check_run(mine(*more, edit=masks()))
    assert outside in caplog.text
    rle = masks(segmentation={"size": [30, 40], "counts": [0, 1200]})
    message = refused(check_run, mine(*MASK_ON, edit=rle))
    assert message.startswith("INPUT.MASK_FORMAT is 'polygon', but ") and message.endswith(": set it to bitmask")
    check_run(mine(*BITMASK, edit=rle))
    wrong = masks(segmentation=[[1, 2, "3", 4, 5, 6]])
    check_run(mine(edit=wrong))
    message = refused(check_run, mine(*MASK_ON, edit=wrong))
    assert message.startswith("MODEL.MASK_ON is True, but in mine annotation 2 has a polygon")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"segmentation": [], "iscrowd": 1}, "segmentation"),
        ({"segmentation": {"size": [30, 40], "counts": [0, 1300]}}, "RLE whose counts add up to 1300, not to 1200"),
        ({"segmentation": {"size": [40, 30], "counts": "x"}}, "RLE of the size [40, 30], which must be [height, width"),
        ({"segmentation": [[1, 2, 3, float("nan"), 5, 6]]}, "a polygon with a coordinate that is no finite number"),
        ({"segmentation": [[1, 2, 3, 10**400, 5, 6]]}, "a polygon with a coordinate that is no finite number"),
    ],
)
def test_masks_that_are_only_evaluated(mine, folder, second, message):
    """pycocotools would end in a KeyError, or not at all, after the training."""
    train = Folder(folder.json.parents[1] / "train")
    masks()(train)
    train.check()
    register_coco_format("sound", str(train.json), str(train.images))
    assert message in refused(check_run, mine(*BITMASK, "DATASETS.TRAIN", "('sound',)", edit=masks(**second)))


@pytest.mark.parametrize("leftover", [[], [5, 5], [5, 5, 9, 9], [5, 5, 9, 9, 9]])
def test_leftovers_of_clipped_polygons_are_left_out_as_in_training(mine, leftover):
    """pycocotools decides by the first polygon what it reads."""
    check_run(mine(*MASK_ON, edit=masks(segmentation=[leftover, [2, 3, 12, 3, 12, 15]])))
    truth = CocoEvaluator("mine", ("segm",), False)._coco_api
    assert truth.annToRLE(truth.anns[2]) == truth.annToRLE(truth.anns[1])


KEYPOINTS = [([1, 2, 2] * 17, ""), ([1, 2, 2] * 16, "16 in objects of mine, 17 in"), (None, "0 in objects of mine, 17")]
KEYPOINTS += [([1, 2, 7] * 17, "annotation 2 has a keypoint [x, y, visibility] whose visibility is not 0, 1 or 2 (")]


@pytest.mark.parametrize(("odd", "shown"), KEYPOINTS)
def test_keypoints_need_metadata_and_one_number(mine, caplog, odd, shown):
    """Detectron2 stacks them, and would end in a ValueError at the first image that has both."""

    def keypoints(folder):
        every(lambda a: {"keypoints": [1, 2, 2] * 17})(folder)
        annotation(0, area=...)(folder)  # which only evaluation needs
        annotation(1, keypoints=odd)(folder)

    cfg = mine("MODEL.KEYPOINT_ON", "True", "DATASETS.TEST", "()", edit=keypoints)
    assert "keypoint_names" in refused(check_run, cfg)
    MetadataCatalog.get("mine").set(keypoint_names=["nose"] * 17, keypoint_flip_map=[])
    if shown:
        assert shown in refused(check_run, cfg)
    else:
        check_run(cfg)
        assert "MODEL.KEYPOINT_ON is True, but in mine annotation 1 has keypoints more outside than in" in caplog.text
        assert "must have a finite number as 'area'" in refused(check_run, mine())


FLIPPED = [["left_eye", "nose", "right_eye"], ["EarRight", "EarLeft", "tip"], ["1", "2", "3"]]


@pytest.mark.parametrize(("names", "indices"), zip(FLIPPED, [[2, 1, 0], [1, 0, 2], [0, 1, 2]], strict=True))
def test_the_categories_name_keypoints_and_all_have_one_number(mine, folder, catalogs, caplog, names, indices):
    """Detectron2's loss takes other objects' rows for those that the head has too many."""

    def keypoints(number):
        return every(lambda a: {"keypoints": [*a["bbox"][:2], 2] * number, "num_keypoints": number})

    category(0, keypoints=names)(folder)
    head, sigmas = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "TEST.KEYPOINT_OKS_SIGMAS"
    told = "differ: 17 in {}, 17 in {}, 3 in objects of mine, 3 in keypoint_names of mine; give all that of the data"
    assert told.format(head, sigmas) in refused(check_run, mine("MODEL.KEYPOINT_ON", "True", edit=keypoints(3)))
    opts = ["MODEL.KEYPOINT_ON", "True", head, "3", sigmas, "[0.1, 0.1, 0.2]"]
    check_run(cfg := mine(*opts))
    assert ("in mine a flip exchanges no keypoints: none have" in caplog.text) is (names == ["1", "2", "3"])
    assert create_keypoint_hflip_indices(cfg.DATASETS.TRAIN) == indices
    assert Trainer.build_evaluator(cfg, "mine")._kpt_oks_sigmas == [0.1, 0.1, 0.2]
    keypoints(4)(folder)
    path = folder.json.with_name("other.json")
    path.write_text(json.dumps(folder.content))
    register_coco_format("other", path, folder.images)
    cfg = mine(*opts, "DATASETS.TEST", "('other',)", edit=keypoints(3))
    assert "3 in keypoint_names of mine, 4 in objects of other; give" in refused(check_run, cfg)
