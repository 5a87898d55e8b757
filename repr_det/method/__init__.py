"""RePr in plain PyTorch: score filters, drop them, hold them at zero, bring them back orthogonal; knows no trainer.

May import torch, NumPy and SciPy; no other room, no Detectron2, no fvcore.
"""
