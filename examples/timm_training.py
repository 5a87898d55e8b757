#!/usr/bin/env python
"""RePr with a timm model and its average of the weights (ModelEmaV3), on scikit-learn's digits.

examples/timm_training.py [CHECKPOINT]      # written every 30 steps; training resumes where the file exists
"""

import logging
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.utils import ModelEmaV3
from torch import nn

from repr_det import RePr


def train(file: Path, model_name: str = "resnet10t", steps: int = 120, save_every: int = 30) -> nn.Module:
    torch.manual_seed(0)
    pixels, classes = load_digits(return_X_y=True)
    images, classes = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes)
    images = F.interpolate(images, size=32)
    model = timm.create_model(model_name, in_chans=1, num_classes=10)
    average = ModelEmaV3(model, decay=0.9)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    repr_training = RePr(model, optimizer, steps, averages=[average])
    parts = {"model": model, "average": average, "optimizer": optimizer, "repr": repr_training}
    if file.exists():
        saved = torch.load(file, weights_only=True)
        for name, part in parts.items():  # RePr comes last
            part.load_state_dict(saved[name])

    for step in range(repr_training.steps, steps):
        rows = torch.randint(1000, (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), classes[rows]).backward()
        optimizer.step()
        average.update(model, step=step)
        repr_training.step()
        if (step + 1) % save_every == 0:
            torch.save({name: part.state_dict() for name, part in parts.items()}, file)

    for name, network in (("model", model.eval()), ("average", average.module.eval())):
        right = network(images[1000:]).argmax(1) == classes[1000:]
        print(f"test accuracy of the {name} {100 * right.float().mean():.1f} %")
    return model


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(Path(sys.argv[1] if len(sys.argv) > 1 else "timm.pth"))
