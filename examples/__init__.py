"""Scripts and recipes, run from the root of a checkout. Not part of the wheel."""
