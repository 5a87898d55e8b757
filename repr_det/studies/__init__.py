"""What studies RePr: overlap in a checkpoint, both arms compared over seeds, cost in time and memory.

May import every other room.
"""
