"""Checks before Ray starts or a model loads: settings (run.py), data files (data.py), models (models.py).

Each raises one ValueError, ``SETTING=VALUE: what was found; what to do``; start.py runs all checks of a command.
"""
