"""Detectron2's side: the config node REPR, RePrHook, Trainer, and the same for LazyConfigs.

May import the method, datasets and runs.
"""

import repr_det.detectron.blocks  # noqa: F401
