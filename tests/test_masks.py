"""Masks and keypoints of COCO-format data: against their boxes, and against how pycocotools reads them."""

import itertools

import numpy as np
import pytest
from coco_folder import SIZES, every, many
from pycocotools import mask as mask_utils

from repr_det.datasets import objects


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
