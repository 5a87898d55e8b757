#!/usr/bin/env python
"""RePr in a training loop: a small classifier of scikit-learn's digits, 20 seconds on a CPU."""

import logging

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from repr_det import RePr

logging.basicConfig(level=logging.INFO, format="%(message)s")
torch.manual_seed(0)
pixels, classes = load_digits(return_X_y=True)
images, classes = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes)
convs = [layer for width in (1, 32) for layer in (nn.Conv2d(width, 32, 3), nn.BatchNorm2d(32), nn.ReLU())]
model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(512, 10))
optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)

repr_training = RePr(model, optimizer, total_steps=600)
for _ in range(600):
    rows = torch.randint(1000, (50,))
    optimizer.zero_grad()
    F.cross_entropy(model(images[rows]), classes[rows]).backward()
    optimizer.step()
    repr_training.step()

model.eval()
print(f"test accuracy {100 * (model(images[1000:]).argmax(1) == classes[1000:]).float().mean():.1f} %")
