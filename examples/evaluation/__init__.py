"""Scores of a model: maths, code, dialogue, divergence from its teacher, and the comparison of runs."""
