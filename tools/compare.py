#!/usr/bin/env python
"""Compares RePr with its baseline, or one config with another, over several seeds and writes a report.

tools/compare.py --config-file configs/shapes_r18_fpn.yaml --seeds 1 2 3 [--against OTHER] [--jobs N] [KEY VALUE ...]
"""

import repr_det.commands  # noqa: F401  (first: it silences warnings of what is imported next)
from repr_det.studies.comparison.command import main
from repr_det.studies.comparison.runner import run_comparison_tool

if __name__ == "__main__":
    run_comparison_tool(main)
