"""What the commands that write files of rows share."""

import bisect
import itertools
from collections.abc import Mapping
from pathlib import Path


def unfinished(path: Path) -> Path:
    """The name of a file that is being written."""
    return path.with_suffix(".unfinished")


def percentiles(lengths: Mapping[int, int]) -> str:
    """The 50th, 90th, 99th percentile and the longest, of lengths with how many rows have each."""
    ordered = sorted(lengths)
    ranks = list(itertools.accumulate(lengths[length] for length in ordered))
    names = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return ", ".join(f"{name} {ordered[bisect.bisect_left(ranks, share * ranks[-1])]}" for name, share in names.items())
