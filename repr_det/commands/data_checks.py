"""Checks of what the data sets of a run hold."""

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from repr_det.datasets import (
    CocoSummary,
    agree_on_classes,
    any_mapped,
    check_registered,
    class_names,
    listed,
    shared_images,
)
from repr_det.method.errors import UserError

logger = logging.getLogger(__name__)
_SEMANTIC = ("PanopticFPN", "SemanticSegmentor", "PanopticDeepLab")


def check_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """Every data set of the run exists, is well formed, has what the model learns from, and the model's classes."""
    train, test = (() if eval_only else cfg.DATASETS.TRAIN), cfg.DATASETS.TEST
    mapped = any_mapped((train, test))  # refuses a name in place of names
    for key, names, needed in (("TRAIN", train, not eval_only), ("TEST", test, eval_only)):
        if needed and not names:
            raise UserError(f"DATASETS.{key} is empty: name at least one registered data set")
    summaries = {name: check_registered(name, for_evaluation=name in test) for name in dict.fromkeys((*train, *test))}
    if not (eval_only and mapped):  # those are mapped to the classes of the checkpoint
        agree_on_classes(train, test)
    retina = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    key = "MODEL.RETINANET.NUM_CLASSES" if retina else "MODEL.ROI_HEADS.NUM_CLASSES"
    num_classes = cfg.MODEL.RETINANET.NUM_CLASSES if retina else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    for name in summaries:
        if len(class_names(name)) != num_classes:
            raise UserError(f"{key} is {num_classes}, but {name} has {len(class_names(name))} classes: set it to that")
    if cfg.MODEL.LOAD_PROPOSALS:
        _check_proposals(cfg, eval_only)
    for name in train:
        if summaries[name] is not None:
            _check_targets(cfg, name, summaries[name])
    for name in test:
        if summaries[name] is not None:
            _check_truth(cfg, name, summaries[name])
            _warn_of_shared_images({n: s for n, s in summaries.items() if n in train and s}, name, summaries[name])


def _warn_of_shared_images(train: dict[str, CocoSummary], name: str, summary: CocoSummary) -> None:
    for trained, other in train.items():
        pairs, compared = shared_images(other.files, summary.files)
        if pairs:
            logger.warning(
                "%d of %d images of %s (DATASETS.TEST) that were compared are in %s (DATASETS.TRAIN) too, the first is "
                "%s, there %s: AP of images that the model was trained on says nothing about new ones",
                *(len(pairs), compared, name, trained, pairs[0][1], pairs[0][0]),
            )


def _check_proposals(cfg: CfgNode, eval_only: bool) -> None:
    for which in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        files, names = cfg.DATASETS[f"PROPOSAL_FILES_{which}"], cfg.DATASETS[which]
        if len(files) != len(names):
            raise UserError(
                f"DATASETS.PROPOSAL_FILES_{which} must name a file for each of {len(names)} data sets, since "
                f"MODEL.LOAD_PROPOSALS is True; got {tuple(files)}"
            )
        for file in files:
            local_file(file, f"DATASETS.PROPOSAL_FILES_{which}")


def local_file(path: str, key: str, otherwise: str = "") -> str:
    """The local file of what a key names, downloaded where it is a URL.

    Raises:
        UserError: it cannot be read; ``otherwise`` says what else would be right.
    """
    try:
        local = PathManager.get_local_path(path)
        found, reason = os.path.isfile(local), "it is not a file"
    except Exception as error:  # whatever a download handler raises, the user needs the same line
        found, reason = False, " ".join(str(error).split())
    if not found:
        raise UserError(f"{key} {path!r} cannot be read ({reason}): give the path of a local file{otherwise}")
    return local


def _check_masks(name: str, summary: CocoSummary, masks: int, objects: int) -> None:
    if masks < objects:
        raise UserError(
            f"MODEL.MASK_ON is True, but {objects - masks} of {objects} objects in {name} lack a segmentation: set it "
            "to False, or give every object one"
        )
    if summary.mask_gap:
        raise UserError(f"MODEL.MASK_ON is True, but in {name} {summary.mask_gap}: fix it, or set MASK_ON to False")


def _check_truth(cfg: CfgNode, name: str, summary: CocoSummary) -> None:
    """Masks and keypoints are there where they are evaluated, of crowd regions too."""
    if cfg.MODEL.MASK_ON:
        _check_masks(name, summary, summary.masks + summary.crowd_masks, summary.num_boxes)
    if cfg.MODEL.KEYPOINT_ON and summary.keypoint_gap:
        raise UserError(f"MODEL.KEYPOINT_ON is True, but in {name} {summary.keypoint_gap}: fix it, or set it to False")


def _check_targets(cfg: CfgNode, name: str, summary: CocoSummary) -> None:
    """Masks, keypoints and semantic segmentation are there where the model learns them."""
    if cfg.MODEL.META_ARCHITECTURE in _SEMANTIC:
        raise UserError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} learns from semantic segmentation, which {name} "
            "(COCO format) does not have: register it by Detectron2's register_coco_panoptic_separated, or take "
            "GeneralizedRCNN"
        )
    objects = summary.num_boxes - summary.crowds
    if cfg.MODEL.MASK_ON:
        _check_masks(name, summary, summary.masks, objects)
        if summary.rle_masks and cfg.INPUT.MASK_FORMAT == "polygon":
            raise UserError(
                f"INPUT.MASK_FORMAT is 'polygon', but {summary.rle_masks} of {objects} objects of {name} have RLE "
                "masks: set it to bitmask"
            )
    if cfg.MODEL.KEYPOINT_ON:
        metadata = MetadataCatalog.get(name)
        if not summary.keypoints:
            raise UserError(f"MODEL.KEYPOINT_ON is True, but no object of {name} has keypoints: set it to False")
        if not metadata.get("keypoint_names") or metadata.get("keypoint_flip_map") is None:
            raise UserError(
                f"MODEL.KEYPOINT_ON is True, but the metadata of {name} have no keypoint_names and keypoint_flip_map, "
                "which Detectron2 needs: set them by MetadataCatalog, or MODEL.KEYPOINT_ON to False"
            )
        if summary.keypoint_numbers != {3 * len(metadata.keypoint_names)}:
            found, wanted = listed(sorted(summary.keypoint_numbers)), len(metadata.keypoint_names)
            raise UserError(
                f"MODEL.KEYPOINT_ON is True, but objects of {name} have keypoints of {found} numbers: give each object "
                f"3 for each of the {wanted} keypoint_names, 0 if unlabelled"
            )
