"""A network as it is seen from outside: what one pass does, what that proves, and what extra passes must put back.

May import torch and NumPy; knows nothing of RePr.
"""
