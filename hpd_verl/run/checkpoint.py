"""Which checkpoint to resume from, and which old ones to remove.

verl names the newest checkpoint in a tracker file, which it overwrites in place after the checkpoint's files, and
removes old checkpoints before it writes that name. A run killed meanwhile can leave an empty tracker, a tracker of an
incomplete checkpoint, or no checkpoint at all. Here each complete checkpoint gets a marker file, old ones are removed
only after the new one has its marker, and a run resumes from a marked one:

- from the tracker's checkpoint if it is complete, which allows a roll back by the tracker;
- else from the one completed last, by the markers' count of completions (steps go back in a roll back, and
  times change in a copy);
- with none marked, from the tracker's, as verl would: the run began without this plugin.

The files, beside verl's own: ``global_step_N/complete`` is the marker; ``global_step_N.incomplete`` stands from before
the first file of a save until after the marker, and from before a removal until after it;
``global_step_N/settings.yaml`` are the settings of the run, for the card of an exported model, and
``global_step_N/rows.json`` says which rows it trained on.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.tensor  # its classes are data to torch.load
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

logger = logging.getLogger(__name__)

COMPLETE = "complete"
"""Marker file inside ``global_step_N``: json, ``number`` counts completions, ``limited`` allows the removal."""
INCOMPLETE = ".incomplete"
"""Suffix of the file next to ``global_step_N``: ``saving`` or ``removing``."""
SETTINGS = "settings.yaml"
"""File inside ``global_step_N`` with all settings of the run."""
ROWS = "rows.json"
"""File inside ``global_step_N``: number and fingerprint of the training rows."""
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's tracker file."""

ACTOR = "actor"
"""Folder inside ``global_step_N`` of every checkpoint of main_ppo, next to the marker."""
LEAN = "data_0.pt"
"""File of every checkpoint of the lean trainer, next to the marker."""

_SAVING, _REMOVING = "saving", "removing"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    step: int
    number: int
    """Counts the folder's completed checkpoints, in the order of their completion."""
    limited: bool
    """Saved under a limit to the number of checkpoints, and so to be removed in time."""


_LAST_STEP = 2**53
"""Beyond all steps and counts; what is larger in a file is damage."""

_NUMPY = np.zeros(0).__reduce__()[0]
_DATA_CLASSES: list[Any] = [
    (_NUMPY, "numpy._core.multiarray._reconstruct"),
    (_NUMPY, "numpy.core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"},
]
"""Contents of a checkpoint beyond tensors: the state of numpy's random numbers."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # of syntax, of UTF-8, of depth
        raise ValueError(f"{file.name} is not JSON ({str(error)[:100]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return content


def load_data(file: Path) -> Any:
    """Load a file of ``torch.save`` from a checkpoint, mapped, not read; executes nothing.

    Raises:
        ValueError: it is cut short, damaged, or names code.
    """
    try:
        with torch.serialization.safe_globals(_DATA_CLASSES):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of zip, pickle or torch
        code = re.search(r"GLOBAL ([\w.]+)|(?:class|function|global) ([\w.]+)", str(error))
        if "Weights only" in str(error) or "weights_only" in str(error):
            named = next((name for name in code.groups() if name), "") if code else ""
            raise ValueError(
                f"{file.name} holds code, not only data{f' ({named})' if named else ''}; nothing of it was loaded; "
                "use a checkpoint from a trusted source"
            ) from error
        raise ValueError(
            f"{file.name} cannot be read ({' '.join(str(error).split())[:120]}); copy it again, or use another "
            "checkpoint"
        ) from error


def _folders_in(folder: Path) -> list[Path]:
    """A folder and all below it, also behind links, by which ``glob`` passes; each once."""
    found: set[Path] = set()
    left = [folder.resolve()] if folder.is_dir() else []
    while left:
        each = left.pop()
        if each not in found:
            found.add(each)
            left += [below.resolve() for below in each.iterdir() if below.is_dir()]
    return sorted(found)


def check_pickles(folder: Path, setting: str, pattern: str = "**/*.pt") -> None:
    """Refuse a checkpoint whose files, which verl unpickles without a question, hold more than data.

    Args:
        folder: the checkpoint's, or one in it.
        setting: begins the message.
        pattern: of the files.

    Raises:
        ValueError: the first such file, or one that is damaged.
    """
    folders = _folders_in(folder) if pattern.startswith("**/") else [folder]
    for file in sorted(file for each in folders for file in each.glob(pattern.removeprefix("**/"))):
        try:
            load_data(file)
        except ValueError as error:
            raise ValueError(f"{setting}: {folder.name}: {error}") from error


def _write_atomically(file: Path, text: str, mode: int = 0o666) -> None:
    """Write a file that is whole or not there, with these permissions less the process's umask."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.unlink(missing_ok=True)
    with open(temporary, "w", opener=lambda path, flags: os.open(path, flags, mode)) as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _step_dir(root: Path, step: int) -> Path:
    return root / f"global_step_{step}"


def _incomplete(root: Path, step: int) -> Path:
    return root / f"global_step_{step}{INCOMPLETE}"


def _read_marker(folder: Path, step: int) -> Checkpoint | None:
    """The marker's content, None without one. A damaged marker counts by its step."""
    try:
        content = read_json(folder / COMPLETE)
    except FileNotFoundError:
        return None
    except ValueError:
        content = {}
    number, limited = content.get("number"), content.get("limited")
    if type(number) is not int or not 0 <= number < _LAST_STEP or type(limited) is not bool:
        return Checkpoint(step, number=step, limited=False)
    return Checkpoint(step, number=number, limited=limited)


def _write_marker(checkpoint: Checkpoint, root: Path) -> None:
    content = {"number": checkpoint.number, "limited": checkpoint.limited}
    _write_atomically(_step_dir(root, checkpoint.step) / COMPLETE, json.dumps(content))


def _marked(root: Path) -> list[Checkpoint]:
    found = []
    for folder in root.glob("global_step_*"):
        match = re.fullmatch(r"global_step_(0|[1-9][0-9]{0,14})", folder.name)
        marker = _read_marker(folder, int(match.group(1))) if match else None
        if marker is not None:
            found.append(marker)
    return sorted(found, key=lambda checkpoint: (checkpoint.number, checkpoint.step))


def complete_checkpoints(root: Path, contents: str = ACTOR) -> list[Checkpoint]:
    """The checkpoints that are whole, in the order of their completion.

    Args:
        root: folder of the checkpoints.
        contents: what must be in a checkpoint's folder beside the marker.
    """
    return [checkpoint for checkpoint in _marked(root) if (_step_dir(root, checkpoint.step) / contents).exists()]


def mark_incomplete(root: Path, step: int, previous: Path | None = None) -> None:
    """Mark a checkpoint as incomplete before it is written, for the first time or again.

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

    Interpolations stay as they are, and values from the environment are written as their interpolation.

    Args:
        root: folder of the checkpoints.
        step: the checkpoint's.
        config: all settings.
    """
    settings = _without_secrets(OmegaConf.to_container(config, resolve=False, enum_to_str=True))
    text = yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    _write_atomically(_step_dir(root, step) / SETTINGS, text, mode=0o600)


_from_environment: dict[str, str] = {}
"""Values from the environment, and their interpolations."""
_SECRET = re.compile(r"KEY|TOKEN(?!IZ)|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
"""Names of variables whose values are secrets, however they came into the settings."""
_SHORT = 6
"""A shorter value is masked only if it is the whole setting."""


def remember_environment() -> None:
    """Remember values of ``${oc.env:...}`` from here on, because verl resolves the settings before a run saves them."""

    def remembering(key: str, *default: Any) -> Any:
        value = oc.env(key, *default)
        if key in os.environ:
            _from_environment[os.environ[key]] = f"${{oc.env:{key}}}"
        return value

    OmegaConf.register_new_resolver("oc.env", remembering, replace=True)


def _without_secrets(settings: Any) -> Any:
    """Settings in which values of the environment are the interpolations that give them."""
    secrets = {value: f"${{oc.env:{name}}}" for name, value in os.environ.items() if value and _SECRET.search(name)}
    masks = sorted((secrets | _from_environment).items(), key=lambda mask: -len(mask[0]))

    def mask(found: Any) -> Any:
        if isinstance(found, dict):
            return {key: mask(value) for key, value in found.items()}
        if isinstance(found, list):
            return [mask(value) for value in found]
        if found is None or isinstance(found, int | float) or found == "":
            return found
        found = str(found)
        for value, name in masks:
            if found == value:
                return name
            if len(value) >= _SHORT and "${" not in found:
                found = found.replace(value, name)
        return found

    return mask(settings)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings in a checkpoint, None without the file; this machine's environment is not read.

    References from one setting to another (``${data.seed}``) are followed; all other interpolations stay as they are.

    Args:
        folder: ``global_step_N``.

    Raises:
        ValueError: they are damaged.
    """
    try:
        content = yaml.load((folder / SETTINGS).read_bytes(), Loader=_Loader)
        if not isinstance(content, dict) or not content:
            raise ValueError("no settings of a run")
        settings: dict[str, Any] = _with_references(content, content, itertools.count())
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:120]) from error
    return settings


_Loader, _Dumper = (getattr(yaml, f"CSafe{kind}", getattr(yaml, f"Safe{kind}")) for kind in ("Loader", "Dumper"))
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def _with_references(found: Any, settings: dict[str, Any], counted: Iterator[int]) -> Any:
    """A setting's value, with the plain values that it refers to in place of the references."""
    if next(counted) > 100_000:  # aliases of aliases
        raise ValueError("it holds more settings than a run has")
    if isinstance(found, dict):
        return {key: _with_references(value, settings, counted) for key, value in found.items()}
    if isinstance(found, list):
        return [_with_references(value, settings, counted) for value in found]
    for _ in range(10):
        match = _REFERENCE.fullmatch(found) if isinstance(found, str) else None
        if match is None:
            break
        target: Any = settings
        for name in match[1].split("."):
            target = target.get(name, found) if isinstance(target, dict) else found
        if isinstance(target, dict | list):
            break
        found = target
    return found


def save_rows(root: Path, step: int, rows: Mapping[str, Any]) -> None:
    """Write what a run trains on into its checkpoint.

    Args:
        root: folder of the checkpoints.
        step: the checkpoint's.
        rows: their fingerprint, with their number as ``rows``.
    """
    _write_atomically(_step_dir(root, step) / ROWS, json.dumps(rows))


def say_changed_rows(folder: Path, rows: Mapping[str, Any]) -> None:
    """Warn if a run resumes with other rows than its checkpoint's; not for a checkpoint without recorded rows.

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
        "resuming from %s with other training data: %s. They are shuffled again: in this epoch some rows come twice "
        "and others not at all. To train on each once, start again with another trainer.default_local_dir",
        folder,
        found,
    )


def _tracked_step(root: Path) -> int | None:
    """The tracker's step, None without a tracker or with a torn one."""
    try:
        step = int((root / TRACKER).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return step if 0 <= step < _LAST_STEP else None


def is_incomplete(folder: Path) -> bool:
    """Whether a checkpoint is marked incomplete: its saving or removal was interrupted, or is in progress."""
    return folder.with_name(folder.name + INCOMPLETE).exists() and not (folder / COMPLETE).is_file()


def checkpoint_to_resume(root: Path, contents: str = ACTOR, says: bool = True) -> Path | None:
    """The checkpoint that a run in ``root`` resumes from, None to start from the beginning. Changes nothing.

    Args:
        root: folder of the checkpoints.
        contents: what must be in a checkpoint's folder beside the marker.
        says: log where the tracker is not followed.
    """
    warn = logger.warning if says else logger.debug
    tracked, complete = _tracked_step(root), complete_checkpoints(root, contents)
    if tracked is not None and tracked in [checkpoint.step for checkpoint in complete]:
        return _step_dir(root, tracked)
    if complete:
        chosen = _step_dir(root, complete[-1].step)
        warn("%s names no complete checkpoint; the last complete one is %s", root / TRACKER, chosen.name)
        return chosen
    if tracked is not None and _step_dir(root, tracked).exists() and not _incomplete(root, tracked).exists():
        warn("%s has no marker of this plugin: taken as verl's tracker names it", _step_dir(root, tracked))
        return _step_dir(root, tracked)
    if (root / TRACKER).exists():
        warn("%s names no complete checkpoint, and there is no other: starting from the beginning", root / TRACKER)
    return None


def checkpoints_to_remove(root: Path, keep: int | None, contents: str = ACTOR) -> list[Path]:
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


def check_whole(trainer: DictConfig, contents: str) -> None:
    """Refuse to resume from a checkpoint that is known not to be whole, or that holds more than data.

    Args:
        trainer: verl's node ``trainer``.
        contents: what must be in a checkpoint's folder beside the marker.

    Raises:
        ValueError: the checkpoint to resume from was not written, or is removed, to its end; or a file of it on this
            machine would run as code.
    """
    path = OmegaConf.select(trainer, "resume_from_path")
    if trainer.resume_mode == "resume_path" and isinstance(path, str) and path.strip("/"):
        folder = Path(path).absolute()
        if is_incomplete(folder):
            raise ValueError(
                f"trainer.resume_from_path={path}: this checkpoint is incomplete, its saving or removal was "
                f"interrupted; choose one with a file named {COMPLETE}"
            )
        check_pickles(folder, f"trainer.resume_from_path={path}")
    elif trainer.resume_mode == "auto" and OmegaConf.select(trainer, "default_local_dir"):
        root = Path(trainer.default_local_dir).absolute()
        found = checkpoint_to_resume(root, contents, says=False) if root.is_dir() else None
        if found is not None:
            check_pickles(found, f"trainer.default_local_dir={trainer.default_local_dir}")
