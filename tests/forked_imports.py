"""What the process that forks commands has imported, before any computation."""

import tiny_backbone  # noqa: F401
import torch

import repr_det.commands.console
import repr_det.commands.lazy
import repr_det.commands.train  # noqa: F401

torch.set_num_threads(1)
