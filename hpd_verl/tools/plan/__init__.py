"""Estimates memory, time and disk of a run from the models' config.json (docs/planner.md)."""
