"""The checkpoint that a run resumes from: complete, and saved by as many ranks."""

import re
from pathlib import Path

from omegaconf import DictConfig

from hpd_verl.errors import require
from hpd_verl.run.checkpoint import check_whole, checkpoint_to_resume

_KINDS = {"model": "model", "optimizer": "optim", "extra": "extra_state"}
"""Contents of a checkpoint, and how verl's files of each begin."""


def _chosen(trainer: DictConfig, contents: str, auto_takes_path: bool) -> tuple[str, str | None, Path | None]:
    """The setting that names the checkpoint, its value, and the checkpoint; None to start from the beginning."""
    setting, path = "trainer.resume_from_path", trainer.resume_from_path
    if trainer.resume_mode == "resume_path" or (trainer.resume_mode == "auto" and path is not None and auto_takes_path):
        require(
            isinstance(path, str) and re.search(r"global_step_\d+/*$", path) is not None,
            setting,
            path,
            "give the folder of a checkpoint, global_step_N",
        )
        require(Path(path).is_dir(), setting, path, "no such folder; give a checkpoint's folder, global_step_N")
        return setting, path, Path(path).absolute()
    require(
        path is None,
        setting,
        path,
        f"trainer.resume_mode={trainer.resume_mode} does not read it; set trainer.resume_mode=resume_path",
    )
    if trainer.resume_mode == "disable":
        return setting, None, None
    root = Path(trainer.default_local_dir).absolute()
    return "trainer.resume_mode", "auto", checkpoint_to_resume(root, contents) if root.is_dir() else None


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def check_resume(
    trainer: DictConfig,
    checkpoint: DictConfig,
    ranks: int,
    counted: str,
    folder: str,
    contents: str,
    auto_takes_path: bool = False,
) -> None:
    """Check the checkpoint that a run would resume from.

    Args:
        trainer: verl's node ``trainer``.
        checkpoint: verl's node of the checkpoint's contents.
        ranks: of the run.
        counted: what sets their number.
        folder: within a checkpoint, where the student is.
        contents: what must be in a checkpoint beside its marker.
        auto_takes_path: resume_mode=auto reads trainer.resume_from_path.

    Raises:
        Refused: there is none where one is named, another number of ranks saved it, or what is to be loaded was not
            saved.
        ValueError: it is not whole, or a file of it would run as code.
    """
    check_whole(trainer, contents)
    setting, value, found = _chosen(trainer, contents, auto_takes_path)
    if found is None:
        return
    files = [file.name for file in (found / folder).glob("*_world_size_*_rank_*.pt")]
    saved_by = sorted({int(name.split("_world_size_")[1].split("_")[0]) for name in files})
    if not saved_by:  # of another machine's disk, which the workers see
        return
    require(
        ranks in saved_by,
        setting,
        value,
        f"{found} was saved by {_ranks(saved_by[0])}, and this run has {ranks}; start it with {saved_by[0]} "
        f"({counted}), or export the checkpoint (hpd-verl export) and train that model with another "
        "trainer.default_local_dir",
    )
    for content in map(str, checkpoint.load_contents):
        start = f"{_KINDS.get(content, '')}_world_size_{ranks}_"
        require(
            content not in _KINDS or any(name.startswith(start) for name in files),
            setting,
            value,
            f"{found} holds no {content}; leave it out of checkpoint.load_contents",
        )
