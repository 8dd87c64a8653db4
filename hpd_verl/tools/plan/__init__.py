"""What a run needs, before it starts: memory, time and disk, from the models' config.json alone (docs/planner.md)."""
