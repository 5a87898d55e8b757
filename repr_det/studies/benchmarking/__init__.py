"""What RePr costs and saves: step times, transitions, FLOPs and memory, beside stock Detectron2, on synthetic data."""
