"""Detectron2's side of RePr: config, hook, trainer. May import ``method``, ``datasets`` and ``runs``."""
