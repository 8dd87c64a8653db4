"""Resuming only from checkpoints that were written to their end.

verl names the newest checkpoint in a tracker file, which it overwrites in place after the checkpoint's files. A run
killed meanwhile can leave an empty tracker or one whose checkpoint is not whole. Each complete checkpoint therefore
gets a marker file, and before resuming the tracker is set to the newest marked one.
"""

import os
import re
from pathlib import Path

COMPLETE = "complete"
"""Marker file inside ``global_step_N``."""
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's tracker file."""


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    with open(temporary, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _step_dir(root: Path, step: int) -> Path:
    return root / f"global_step_{step}"


def mark_incomplete(root: Path, step: int) -> None:
    """Take the marker off a checkpoint that is about to be written again."""
    (_step_dir(root, step) / COMPLETE).unlink(missing_ok=True)


def mark_complete(root: Path, step: int) -> None:
    """Mark a checkpoint whose files are all written, and name it in the tracker."""
    _write_atomically(_step_dir(root, step) / COMPLETE, str(step))
    _write_atomically(root / TRACKER, str(step))


def complete_steps(root: Path, contents: str = "actor") -> list[int]:
    """Steps of the checkpoints that are whole, ascending.

    Args:
        root: folder of the checkpoints.
        contents: what must be in a checkpoint's folder beside the marker.
    """
    steps = []
    for folder in root.glob("global_step_*"):
        match = re.fullmatch(r"global_step_(\d+)", folder.name)
        # verl's max_actor_ckpt_to_keep removes the actor folder of old checkpoints and leaves the rest.
        if match and (folder / COMPLETE).is_file() and (folder / contents).exists():
            steps.append(int(match.group(1)))
    return sorted(steps)


def repair_tracker(root: Path, contents: str = "actor") -> int | None:
    """Make the tracker name the newest complete checkpoint; remove it if there is none. Arguments as above.

    Returns:
        The step to resume from, or None to start from the beginning.
    """
    steps = complete_steps(root, contents)
    if not steps:
        (root / TRACKER).unlink(missing_ok=True)
        return None
    _write_atomically(root / TRACKER, str(steps[-1]))
    return steps[-1]
