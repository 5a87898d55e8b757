"""Checks of what the data sets of a run hold."""

import itertools
import logging
import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from repr_det.datasets import check_registered, class_names
from repr_det.datasets.coco_format import CocoSummary
from repr_det.datasets.findings import listed
from repr_det.datasets.image_files import shared_images
from repr_det.datasets.registered import agree_on_classes, any_mapped
from repr_det.method.errors import UserError

logger = logging.getLogger(__name__)
_SEMANTIC = ("PanopticFPN", "SemanticSegmentor", "PanopticDeepLab")


def check_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """Every data set of the run exists, is well formed, has what the model learns from, and the model's classes."""
    train, test = (() if eval_only else cfg.DATASETS.TRAIN), cfg.DATASETS.TEST
    mapped = any_mapped((train, test))  # refuses a name in place of names
    key, needed = ("TEST", test) if eval_only else ("TRAIN", train)
    if not needed:
        raise UserError(f"DATASETS.{key} is empty: name at least one registered data set")
    summaries = {name: check_registered(name, for_evaluation=name in test) for name in dict.fromkeys((*train, *test))}
    if not (eval_only and mapped):  # those are mapped to the classes of the checkpoint
        agree_on_classes(train, test)
    head = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    for name, summary in summaries.items():
        number, classes = cfg.MODEL[head].NUM_CLASSES, len(class_names(name))
        if classes != number:
            raise UserError(f"MODEL.{head}.NUM_CLASSES is {number}, but {name} has {classes} classes: set it to that")
        if summary and cfg.MODEL.MASK_ON:
            _check_masks(cfg, name, summary, name in train, name in test)
        if summary and cfg.MODEL.KEYPOINT_ON:
            _check_keypoints(name, summary, name in train, name in test)
        if summary and name in train and cfg.MODEL.META_ARCHITECTURE in _SEMANTIC:
            raise UserError(
                f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} learns from semantic segmentation, which "
                f"{name} (COCO format) does not have: register it by Detectron2's register_coco_panoptic_separated"
            )
    if cfg.MODEL.LOAD_PROPOSALS:
        _check_proposals(cfg, eval_only)
    for trained, tested in itertools.product(train, test):
        if summaries[trained] and summaries[tested]:
            _warn_of_shared_images(trained, summaries[trained], tested, summaries[tested])


def _warn_of_shared_images(trained: str, train: CocoSummary, tested: str, test: CocoSummary) -> None:
    pairs, compared = shared_images(train.files, test.files)
    if pairs:
        logger.warning(
            f"{len(pairs)} of {compared} images of {tested} (DATASETS.TEST) that were compared are in {trained} "
            f"(DATASETS.TRAIN) too, the first is {pairs[0][1]}, there {pairs[0][0]}: AP of images that the model was "
            "trained on says nothing about new ones"
        )


def _check_masks(cfg: CfgNode, name: str, summary: CocoSummary, train: bool, test: bool) -> None:
    """Masks are there if they are learnt or evaluated, of crowd regions if they are evaluated."""
    for purpose in ("masks", "crowd masks") if test else ("masks",):
        _refuse("MODEL.MASK_ON", name, summary.gaps[purpose])
    if train and summary.gaps["polygons"] and cfg.INPUT.MASK_FORMAT == "polygon":
        gap = summary.gaps["polygons"][0]
        raise UserError(f"INPUT.MASK_FORMAT is 'polygon', but in {name} {gap}: set it to bitmask")


def _check_keypoints(name: str, summary: CocoSummary, train: bool, test: bool) -> None:
    metadata, gaps = MetadataCatalog.get(name), []
    wanted, found = 3 * len(metadata.get("keypoint_names") or ()), sorted(summary.keypoint_numbers)
    if train and found != [wanted]:
        gaps = [f"objects have {listed(found)} numbers as keypoints, and its keypoint_names ask for {wanted} of each"]
    elif train and (not wanted or metadata.get("keypoint_flip_map") is None):
        gaps = ["the metadata have no keypoint_names and keypoint_flip_map, which MetadataCatalog must get"]
    _refuse("MODEL.KEYPOINT_ON", name, gaps or (test and summary.gaps["keypoints"]))


def _refuse(key: str, name: str, gaps: list[str] | None) -> None:
    if gaps:
        raise UserError(f"{key} is True, but in {name} {gaps[0]}: fix it, or set {key} to False")


def _check_proposals(cfg: CfgNode, eval_only: bool) -> None:
    for which in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        key, number, files = (
            f"PROPOSAL_FILES_{which}",
            len(cfg.DATASETS[which]),
            cfg.DATASETS[f"PROPOSAL_FILES_{which}"],
        )
        if len(files) != number:
            raise UserError(
                f"DATASETS.{key} must name a file for each of {number} data sets, since MODEL.LOAD_PROPOSALS is True; "
                f"got {tuple(files)}"
            )
        for file in files:
            local_file(file, f"DATASETS.{key}")


def local_file(path: str, key: str, otherwise: str = "") -> str:
    """The local file of what a key names, downloaded if it is a URL.

    Raises:
        UserError: it cannot be read; ``otherwise`` says what else would be right.
    """
    try:
        local = PathManager.get_local_path(path)
        problem = "" if os.path.isfile(local) else "it is not a file"
    except Exception as error:  # whatever a download handler raises, the user needs the same line
        problem = " ".join(str(error).split())
    if problem:
        raise UserError(f"{key} {path!r} cannot be read ({problem}): give the path of a local file{otherwise}")
    return local
