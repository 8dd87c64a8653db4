"""Rewards of answers: maths, and programs that run in a sandbox. Neither torch nor verl is imported."""
