#!/usr/bin/env python
"""Measures what RePr costs and saves beside stock Detectron2; needs no data.

tools/benchmark.py [--depths 18 50 101] [--only steps transitions memory] [--device cuda] [--output FOLDER]
"""

from repr_det.benchmarking.command import main
from repr_det.cli import run_tool

if __name__ == "__main__":
    run_tool(main)
