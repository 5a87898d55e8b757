#!/usr/bin/env python
"""RePr with torchvision's Faster R-CNN, on synthetic shapes. Other models and their patterns: docs/zoo.md.

examples/torchvision_detection.py [CHECKPOINT]      # written every 10 steps; training resumes where the file exists
"""

import logging
import sys
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from repr_det import RePr
from repr_det.datasets import CLASS_NAMES, generate_shapes


def batch_of(seed: int, number: int = 2) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images (3, H, W), RGB in [0, 1], with boxes (N, 4) as corners in px and labels (N,) from 1."""
    images, targets = [], []
    for image, objects in generate_shapes(seed, number):
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        images.append(torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1) / 255)
        targets.append({"boxes": boxes, "labels": torch.tensor([each["category_id"] for each in objects])})
    return images, targets


def train(model: nn.Module, file: Path, layers: list[str], steps: int = 40, save_every: int = 10) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9, weight_decay=1e-4)
    loader = [batch_of(seed) for seed in range(min(steps, 16))]
    # For frozen norms (weights of ImageNet, weights_backbone="DEFAULT") RePr looks at batches of `loader`.
    repr_training = RePr(
        model, optimizer, steps, layers=layers, loader=loader, loss=lambda batch: sum(model(*batch).values())
    )
    parts = {"model": model, "optimizer": optimizer, "repr": repr_training}
    if file.exists():
        saved = torch.load(file, weights_only=True)
        for name, part in parts.items():  # RePr comes last
            part.load_state_dict(saved[name])
    for step in range(repr_training.steps, steps):
        torch.manual_seed(step)  # proposals are sampled at random
        loss = sum(model(*loader[step % len(loader)]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        repr_training.step()
        print(f"step {step}: loss {loss.item():.3f}")
        if (step + 1) % save_every == 0:
            torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    return model


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build = torchvision.models.detection.fasterrcnn_resnet50_fpn
    detector = build(weights=None, weights_backbone=None, num_classes=len(CLASS_NAMES) + 1, min_size=128, max_size=256)
    train(detector, Path(sys.argv[1] if len(sys.argv) > 1 else "detector.pth"), ["backbone.body.layer*.conv*"])
