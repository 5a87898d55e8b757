"""The parts that keep a run whole: files that are whole or absent, checkpoints that run nothing, exact resume, a guard.

May import the method.
"""
