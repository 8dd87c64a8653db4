"""Hybrid Policy Distillation (HPD) as an algorithm of verl. See README.md."""

__version__ = "0.1.0"
