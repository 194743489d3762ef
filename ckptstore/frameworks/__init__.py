"""Trainers: where each puts checkpoints, what marks them complete, how it is told to resume."""
