"""Detectron2's side of RePr. May import ``method``, ``datasets`` and ``runs``."""
