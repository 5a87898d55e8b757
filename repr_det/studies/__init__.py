"""Overlap in a checkpoint; two variants compared over seeds. May import every other room."""
