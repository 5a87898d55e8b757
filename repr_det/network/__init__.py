"""A network seen from outside. May import torch and NumPy; knows nothing of RePr."""
