"""The folders that a run writes to: checkpoints, the teacher's store, temporary files."""

import os
import tempfile
from pathlib import Path
from typing import Any

from hpd_verl.config import HPDConfig
from hpd_verl.errors import Refused, require
from hpd_verl.teacher.store.disk import check_space
from hpd_verl.teacher.store.store import DIR_SETTING, GIB


def check_folder(setting: str, folder: Any, what: str) -> Path:
    """Check that a folder can be made and written; nothing is left there.

    Args:
        setting: its name.
        folder: its value.
        what: it is for, in words.

    Returns:
        The folder itself, or the nearest above it that is there.

    Raises:
        ValueError: it cannot.
    """
    require(isinstance(folder, str) and folder != "", setting, folder, f"give a folder for {what}")
    missing = Path(folder).expanduser().absolute()
    existing = missing
    while not os.path.lexists(existing):
        existing = existing.parent
    require(existing.is_dir(), setting, folder, f"{existing} is not a folder; choose another place for {what}")
    try:
        with tempfile.TemporaryDirectory(prefix=".hpd_verl_", dir=existing) as trial:
            inside = Path(trial) / missing.relative_to(existing)
            inside.mkdir(parents=True, exist_ok=True)
            (inside / "trial").write_bytes(b"0")
    except OSError as error:
        raise Refused(
            f"{setting}={folder}: cannot be written ({error.strerror or error}); choose another place for {what}"
        ) from error
    return existing


def check_checkpoint_folder(folder: Any) -> None:
    """Check that the folder ``trainer.default_local_dir`` can be made and written.

    Raises:
        ValueError: it cannot.
    """
    check_folder("trainer.default_local_dir", folder, "checkpoints")


def check_store(hpd: HPDConfig) -> None:
    """Check that the teacher's store can be written, and that its disk holds what the limit allows.

    Raises:
        ValueError: it cannot, or does not.
    """
    folders = [own.teacher_cache_dir for own in hpd.of_each_teacher.values() if own.teacher_cache == "disk"]
    if not folders or not hpd.needs_teacher:
        return
    check_folder(DIR_SETTING, hpd.teacher_cache_dir, "the teacher's store")
    for folder in folders:
        check_space(Path(str(folder)).expanduser(), int(hpd.teacher_cache_max_gib * GIB))


def check_temporary_folders(*variables: str) -> None:
    """Check that the folders for temporary files, which these variables of the environment name, can be written to.

    Raises:
        ValueError: one cannot, or without any of them there is none.
    """
    for variable in variables:
        folder = os.environ.get(variable)
        if folder is not None and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
            found = "cannot be written to" if os.path.isdir(folder) else "no such folder"
            raise ValueError(f"{variable}={folder}: {found}; create it, or unset the variable")
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ValueError(f"TMPDIR=: {error.strerror}; set it to a writable folder") from error
