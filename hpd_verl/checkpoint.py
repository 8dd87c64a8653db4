"""Which checkpoint to resume from, and which old ones to remove.

verl names the newest checkpoint in a tracker file, which it overwrites in place after the checkpoint's files, and
removes old checkpoints before it writes that name. A run killed meanwhile can leave an empty tracker, one whose
checkpoint is not whole, or no checkpoint at all. Here each complete checkpoint gets a marker file, old ones are removed
only after the new one has its marker, and a run resumes from what is marked:

- from the tracker's checkpoint if it is complete, so that a roll back by the tracker is obeyed;
- else from the one that was completed last, by the markers' count of completions (steps go back in a roll back, and
  times change in a copy);
- with none marked, from the tracker's, as verl would: the run began without this plugin.

The files, beside verl's own: ``global_step_N/complete`` is the marker; ``global_step_N.incomplete`` stands from before
the first file of a save until after the marker, and from before a removal until after it;
``global_step_N/settings.yaml`` are the settings of the run, for the card of an exported model, and
``global_step_N/rows.json`` says which rows it trained on.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

logger = logging.getLogger(__name__)

COMPLETE = "complete"
"""Marker file inside ``global_step_N``: json, ``number`` counts completions, ``limited`` allows the removal."""
INCOMPLETE = ".incomplete"
"""Suffix of the file beside ``global_step_N``: ``saving`` or ``removing``."""
SETTINGS = "settings.yaml"
"""File inside ``global_step_N`` with all settings of the run."""
ROWS = "rows.json"
"""File inside ``global_step_N``: number and fingerprint of the training rows."""
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's tracker file."""

_SAVING, _REMOVING = "saving", "removing"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    step: int
    number: int
    """Counts the folder's completed checkpoints, in the order of their completion."""
    limited: bool
    """Saved under a limit to the number of checkpoints, and so to be removed in time."""


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    with open(temporary, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _step_dir(root: Path, step: int) -> Path:
    return root / f"global_step_{step}"


def _incomplete(root: Path, step: int) -> Path:
    return root / f"global_step_{step}{INCOMPLETE}"


def _read_marker(folder: Path, step: int) -> Checkpoint | None:
    """What the marker says, None without one. A marker that holds no json object counts by its step."""
    try:
        content = json.loads((folder / COMPLETE).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return Checkpoint(step, number=step, limited=False)
    return Checkpoint(step, number=int(content["number"]), limited=bool(content["limited"]))


def _write_marker(checkpoint: Checkpoint, root: Path) -> None:
    content = {"number": checkpoint.number, "limited": checkpoint.limited}
    _write_atomically(_step_dir(root, checkpoint.step) / COMPLETE, json.dumps(content))


def _marked(root: Path) -> list[Checkpoint]:
    found = []
    for folder in root.glob("global_step_*"):
        match = re.fullmatch(r"global_step_(\d+)", folder.name)
        marker = _read_marker(folder, int(match.group(1))) if match else None
        if marker is not None:
            found.append(marker)
    return sorted(found, key=lambda checkpoint: (checkpoint.number, checkpoint.step))


def complete_checkpoints(root: Path, contents: str = "actor") -> list[Checkpoint]:
    """The checkpoints that are whole, in the order of their completion.

    Args:
        root: folder of the checkpoints.
        contents: what must be in a checkpoint's folder beside the marker.
    """
    return [checkpoint for checkpoint in _marked(root) if (_step_dir(root, checkpoint.step) / contents).exists()]


def mark_incomplete(root: Path, step: int, previous: Path | None = None) -> None:
    """Say that a checkpoint is about to be written, for the first time or again.

    Args:
        root: folder of the checkpoints.
        step: the checkpoint's.
        previous: the checkpoint that the run wrote last or went on from. From here on it counts as the last completed
            one, so that after a roll back the abandoned ones behind it are not resumed from.
    """
    root.mkdir(parents=True, exist_ok=True)
    _write_atomically(_incomplete(root, step), _SAVING)
    marked = _marked(root)
    if previous is not None and previous.parent.resolve() == root.resolve():
        for checkpoint in marked[:-1]:
            if _step_dir(root, checkpoint.step).name == previous.name:
                _write_marker(replace(checkpoint, number=marked[-1].number + 1), root)
    (_step_dir(root, step) / COMPLETE).unlink(missing_ok=True)


def mark_complete(root: Path, step: int, keep: int | None = None) -> None:
    """Mark a checkpoint whose files are all written, and name it in the tracker.

    Args:
        root: folder of the checkpoints.
        step: the checkpoint's.
        keep: verl's limit to the number of checkpoints; with one, ``checkpoints_to_remove`` may name this one.
    """
    limited = keep is not None and keep > 0
    number = 1 + max((checkpoint.number for checkpoint in _marked(root)), default=0)
    _write_marker(Checkpoint(step, number, limited), root)
    _write_atomically(root / TRACKER, str(step))
    _incomplete(root, step).unlink(missing_ok=True)


def save_settings(root: Path, step: int, config: DictConfig) -> None:
    """Write a run's settings into its checkpoint.

    Args:
        root: folder of the checkpoints.
        step: the checkpoint's.
        config: all settings.
    """
    _write_atomically(_step_dir(root, step) / SETTINGS, OmegaConf.to_yaml(config, resolve=True))


def save_rows(root: Path, step: int, rows: Mapping[str, Any]) -> None:
    """Write what a run trains on into its checkpoint.

    Args:
        root: folder of the checkpoints.
        step: the checkpoint's.
        rows: their fingerprint, with their number as ``rows``.
    """
    _write_atomically(_step_dir(root, step) / ROWS, json.dumps(rows))


def say_changed_rows(folder: Path, rows: Mapping[str, Any]) -> None:
    """Warn where a run goes on with other rows than its checkpoint's; nothing for one that does not say its rows.

    Args:
        folder: the checkpoint.
        rows: as of ``save_rows``, of this run.
    """
    try:
        before = json.loads((folder / ROWS).read_text())
    except (FileNotFoundError, ValueError):
        return
    if before == dict(rows):
        return
    found = (
        f"{rows['rows']} rows, {before['rows']} when it was saved"
        if rows["rows"] != before["rows"]
        else f"{rows['rows']} rows as when it was saved, but other ones or in another order"
    )
    logger.warning(
        "resuming from %s with other training data: %s. Their order is drawn anew: in this epoch some rows come twice "
        "and others not at all. To train on each once, start anew (another trainer.default_local_dir)",
        folder,
        found,
    )


def _tracked_step(root: Path) -> int | None:
    """The tracker's step, None without a tracker or with a torn one."""
    try:
        return int((root / TRACKER).read_text())
    except (FileNotFoundError, ValueError):
        return None


def is_incomplete(folder: Path) -> bool:
    """Whether a checkpoint is known not to be whole: its saving or its removal was interrupted, or goes on."""
    return folder.with_name(folder.name + INCOMPLETE).exists() and not (folder / COMPLETE).is_file()


def checkpoint_to_resume(root: Path, contents: str = "actor") -> Path | None:
    """The checkpoint that a run in ``root`` goes on from, None to start from the beginning. Changes nothing.

    Args:
        root: folder of the checkpoints.
        contents: what must be in a checkpoint's folder beside the marker.
    """
    tracked, complete = _tracked_step(root), complete_checkpoints(root, contents)
    if tracked is not None and tracked in [checkpoint.step for checkpoint in complete]:
        return _step_dir(root, tracked)
    if complete:
        chosen = _step_dir(root, complete[-1].step)
        logger.warning("%s names no complete checkpoint; the last complete one is %s", root / TRACKER, chosen.name)
        return chosen
    if tracked is not None and _step_dir(root, tracked).exists() and not _incomplete(root, tracked).exists():
        logger.warning("%s has no marker of this plugin: taken as verl's tracker names it", _step_dir(root, tracked))
        return _step_dir(root, tracked)
    if (root / TRACKER).exists():
        logger.warning("%s names no whole checkpoint, and there is none: starting from the beginning", root / TRACKER)
    return None


def checkpoints_to_remove(root: Path, keep: int | None, contents: str = "actor") -> list[Path]:
    """Checkpoints beyond a limit: all that were saved under one, but for the ``keep`` completed last.

    Removals that were interrupted are named again. What was saved without a limit, or not by this plugin, is never
    named, nor what a killed save left.

    Args:
        root: folder of the checkpoints, the newest of them complete.
        keep: verl's limit; None or less than 1 for none.
        contents: what must be in a checkpoint's folder beside the marker.
    """
    if keep is None or keep < 1:
        return []
    complete = complete_checkpoints(root, contents)
    surplus = [_step_dir(root, checkpoint.step) for checkpoint in complete[:-keep] if checkpoint.limited]
    interrupted = [
        file.with_name(file.name.removesuffix(INCOMPLETE))
        for file in root.glob(f"global_step_*{INCOMPLETE}")
        if file.read_text() == _REMOVING
    ]
    return surplus + interrupted


def remove(folders: list[Path]) -> None:
    """Remove checkpoints; killed at any moment, each is either complete or known to be a removal to finish.

    A file that cannot be removed is logged, and tried again after the next checkpoint.
    """
    for folder in folders:
        incomplete = folder.with_name(folder.name + INCOMPLETE)
        _write_atomically(incomplete, _REMOVING)
        (folder / COMPLETE).unlink(missing_ok=True)
        if remove_files(folder):
            incomplete.unlink(missing_ok=True)


def remove_files(folder: Path) -> bool:
    """Remove a folder if it is there, whoever else removes it too; whether it is gone."""
    try:
        while folder.exists():
            with contextlib.suppress(FileNotFoundError):  # another process of this machine was faster
                shutil.rmtree(folder)
    except OSError as error:
        logger.warning("old checkpoint %s stays: %s", folder, error)
        return False
    return True


def check_resume_path(trainer: DictConfig) -> None:
    """Refuse to resume from a checkpoint that is known not to be whole.

    Args:
        trainer: verl's node ``trainer``.

    Raises:
        ValueError: the one that ``trainer.resume_from_path`` names was not written, or is removed, to its end.
    """
    path = OmegaConf.select(trainer, "resume_from_path")
    if trainer.resume_mode != "resume_path" or not isinstance(path, str) or not path.strip("/"):
        return
    folder = Path(path).absolute()
    if is_incomplete(folder):
        raise ValueError(
            f"trainer.resume_from_path={path}: this checkpoint is not whole, its saving or removal was interrupted; "
            f"choose one whose folder holds a file named {COMPLETE}"
        )
