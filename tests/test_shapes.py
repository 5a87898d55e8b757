"""The shapes data set: same pixels everywhere, boxes against brute force, difficulty, the folder, the registration."""

import hashlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from coco_folder import ap_of_the_truth
from conftest import contents, refused
from detectron2.data import DatasetCatalog, MetadataCatalog

from repr_det import datasets
from repr_det.datasets import shapes

PINNED = {
    "train": "5810b0c366d207ddbb5ced37ae3ac1f79d860162de5a1ceafbe30c0455f9de10",
    "val": "ccabf867feafa6411227f012d34cbdfd24226bc9b60d16a2e184ee1c535e76fb",
}


def test_pixels_and_annotations_are_the_pinned_ones():
    """The two splits share no image."""
    images = []
    for split, pinned in PINNED.items():
        digest = hashlib.sha256()
        for image, objects in shapes.generate_shapes(shapes.SPLITS[split][0], 20):
            digest.update(repr(image.shape).encode() + image.tobytes() + json.dumps(objects, sort_keys=True).encode())
            images.append(image.tobytes())
        assert digest.hexdigest() == pinned
    assert len({*images}) == 40


@pytest.mark.parametrize("name", shapes.CLASS_NAMES)
def test_stencil_against_opencvs_distance_to_the_outline(name):
    loops, stretch, radius, angle = shapes.OUTLINES[name], 85, 23, math.radians(211)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = [np.array(loop) / shapes.ONE * (1, stretch / 100) @ turn.T * radius + radius + 1 for loop in loops]
    mask = shapes.stencil(loops, radius, stretch, 211)
    assert mask.shape == (2 * radius + 3, 2 * radius + 3)
    far = 0
    for (y, x), inside in np.ndenumerate(mask):
        distances = [cv2.pointPolygonTest(c.astype(np.float32), (float(x), float(y)), True) for c in corners]
        if min(map(abs, distances)) > 0.15:  # px: corners lie on a grid of 1/16 px
            far += 1
            assert inside == (sum(distance > 0 for distance in distances) == 1)
    assert far > 0.8 * mask.size


def test_box_and_area_of_a_single_shape_are_those_of_the_pixels_it_changes(monkeypatch):
    plain = dict.fromkeys(("CLUTTER", "OCCLUDERS", "NOISE", "PATCHES"), (0, 0)) | {"BLUR": 0, "LOW_CONTRAST": 0}
    for key, value in (plain | {"TEXTURES": ("solid",), "OBJECTS": (1, 1)}).items():
        monkeypatch.setattr(shapes, key, value)
    drawn = list(shapes.generate_shapes(5, 60))
    monkeypatch.setattr(shapes, "OBJECTS", (0, 0))
    clipped = 0
    for (image, objects), (background, none) in zip(drawn, shapes.generate_shapes(5, 60), strict=True):
        assert none == []
        changed = (image != background).any(2)
        for thing in objects:
            rows, columns = np.nonzero(changed)
            x, y, w, h = thing["bbox"]
            assert [x, y, x + w - 1, y + h - 1] == [columns.min(), rows.min(), columns.max(), rows.max()]
            assert thing["area"] == changed.sum()
            clipped += x == 0 or y == 0 or x + w == image.shape[1] or y + h == image.shape[0]
    assert clipped > 5


def test_every_object_stays_visible_and_many_are_partly_hidden(monkeypatch):
    canvases = []
    finish = shapes._Canvas.finish
    monkeypatch.setattr(shapes._Canvas, "finish", lambda canvas: (canvases.append(canvas), finish(canvas))[1])
    areas = [o["area"] for _, objects in shapes.generate_shapes(2, 40) for o in objects]
    visible = np.concatenate([np.bincount(c.top[c.top >= 0], minlength=len(c.objects)) for c in canvases])
    whole = np.concatenate([c.full_areas for c in canvases])
    assert len(areas) > 100 and (visible >= shapes.MIN_VISIBLE / 100 * whole).all()
    assert 0.15 < (visible < 0.9 * np.array(areas)).mean() < 0.8


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": (1, 4), "val": (2, 3)})
    monkeypatch.setitem(shapes.PARTS, "train_75", ("train", 2))


def test_the_folder_holds_what_is_generated_and_is_reused_silently(few_images, tmp_path, capsys):
    root = shapes.build_shapes(tmp_path / "a folder" / "shäpes")
    assert capsys.readouterr().err.count("\n") == 1
    for split, (seed, count) in shapes.SPLITS.items():
        truth = json.loads((root / "annotations" / f"{split}.json").read_text())
        assert len(list((root / split).iterdir())) == len(truth["images"]) == count
        for entry, (image, objects) in zip(truth["images"], shapes.generate_shapes(seed, count), strict=True):
            stored = cv2.imdecode(np.fromfile(root / split / entry["file_name"], np.uint8), cv2.IMREAD_COLOR)
            assert np.array_equal(stored, image) and image.shape[:2] == (entry["height"], entry["width"])
            mine = [a for a in truth["annotations"] if a["image_id"] == entry["id"]]
            assert [{k: v for k, v in a.items() if k not in ("id", "image_id")} for a in mine] == objects
    assert sorted(path.name for path in root.parent.iterdir()) == [".shäpes.lock", "shäpes"]
    wanted = contents(root)
    (root / "train" / "000001.png").write_bytes(b"mark")
    shapes.build_shapes(root)
    assert (root / "train" / "000001.png").read_bytes() == b"mark" and capsys.readouterr().err == ""
    shapes.annotation_file(root, "train_75").unlink()  # as version 0.1.0 left it
    shapes.build_shapes(root)
    assert contents(root) == wanted


@pytest.mark.parametrize("foreign", ["photo.jpg", "VERSION"])
def test_what_is_in_the_way_is_left_alone(few_images, tmp_path, foreign):
    root = tmp_path / "shapes"
    root.mkdir()
    (root / foreign).write_bytes(b"\xffmine")
    for place in (root, root / foreign, root / foreign / "inside"):
        assert "cannot be written to " in refused(shapes.build_shapes, place)
    assert contents(root) == {f".{foreign}.lock": b"", foreign: b"\xffmine"}


@pytest.mark.parametrize("before", ["absent", "empty", "outdated"])
def test_an_interrupted_build_changes_nothing_and_of_several_one_draws(few_images, tmp_path, monkeypatch, before):
    reference = contents(shapes.build_shapes(tmp_path / "reference" / "shapes"))
    root, write, writes, start = tmp_path / "shapes", shapes._write, [], threading.Barrier(4, timeout=60)
    if before == "empty":
        root.mkdir()
    elif before == "outdated":
        shapes.build_shapes(root)
        (root / "VERSION").write_text("repr_det shapes 0 abc\n")
        (root / "train" / "old.png").touch()
    wanted = contents(root)
    encoded = cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cv2, "imencode", Mock(side_effect=[*[encoded] * 5, KeyboardInterrupt]))
        shapes.build_shapes(root)
    assert contents(root) == wanted and root.exists() == (before != "absent")

    monkeypatch.setattr(shapes, "_write", lambda *args: (writes.append(args), write(*args)))
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(lambda: (start.wait(), shapes.build_shapes(root))) for _ in range(4)]:
            assert done.result()[1] == root
    assert contents(root) == reference and len(writes) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".shapes.lock", "reference", "shapes"]


def test_registration_is_lazy_and_may_be_repeated(few_images, catalogs, tmp_path, monkeypatch):
    root = tmp_path / "data" / "shapes"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root.parent))
    for _ in range(2):
        datasets.register_builtin()
    assert not root.exists()
    datasets.check_registered("shapes_train_75")  # before anything is loaded, as the commands do
    records = DatasetCatalog.get("shapes_train")
    assert MetadataCatalog.get("shapes_val").thing_classes == list(shapes.CLASS_NAMES)
    assert DatasetCatalog.get("shapes_train_75") == records[:2] and len(records) == 4
    assert ap_of_the_truth("shapes_val") == pytest.approx(100)
