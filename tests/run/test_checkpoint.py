"""Only whole checkpoints are resumed from, and old ones go only after the new one is whole."""

import functools
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import main_ppo_config
from omegaconf import DictConfig, OmegaConf
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.ppo.checkpoint_callback import build_checkpoint_callback
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

from hpd_verl.run.checkpoint import (
    ACTOR,
    COMPLETE,
    TRACKER,
    check_whole,
    checkpoint_to_resume,
    checkpoints_to_remove,
    mark_complete,
    mark_incomplete,
    remove,
    save_rows,
    say_changed_rows,
)


def step_dir(root: Path, step: int) -> Path:
    return root / f"global_step_{step}"


def write(root: Path, step: int) -> None:
    """As verl saves, without this plugin: the files, then the tracker."""
    (step_dir(root, step) / "actor").mkdir(parents=True, exist_ok=True)
    (root / TRACKER).write_text(str(step))


def save(root: Path, *steps: int, previous: int | None = None, keep: int | None = None) -> None:
    for step in steps:
        mark_incomplete(root, step, None if previous is None else step_dir(root, previous))
        write(root, step)
        mark_complete(root, step, keep)
        previous = step


def resumed(root: Path) -> int | None:
    """The step to resume from; finding it changes nothing."""
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    found = checkpoint_to_resume(root)
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == before
    return None if found is None else int(found.name.removeprefix("global_step_"))


def test_nothing_saved(tmp_path: Path) -> None:
    assert resumed(tmp_path / "missing") is None


def test_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 5)
    mark_incomplete(tmp_path, 10)
    write(tmp_path, 10)
    assert resumed(tmp_path) == 5


@pytest.mark.parametrize("tracker", ["", "x", "70", None])
def test_without_a_usable_tracker_the_last_completed_is_taken(tmp_path: Path, tracker: str | None) -> None:
    """Torn, of a checkpoint that is not there, or missing."""
    save(tmp_path, 5, 10)
    (tmp_path / TRACKER).unlink()
    if tracker is not None:
        (tmp_path / TRACKER).write_text(tracker)
    assert resumed(tmp_path) == 10


def test_the_tracker_is_obeyed(tmp_path: Path) -> None:
    """Also where it names an older checkpoint than there is, with or without the end of a line."""
    save(tmp_path, 60, 80, 100)
    (tmp_path / TRACKER).write_text("60\n")
    assert resumed(tmp_path) == 60


def test_a_roll_back_goes_on_from_its_own_checkpoints(tmp_path: Path) -> None:
    """Back from 100 to 60: what lay behind 60 is not resumed from, wherever the run is killed."""
    save(tmp_path, 60, 80, 100)
    mark_incomplete(tmp_path, 80, previous=step_dir(tmp_path, 60))
    write(tmp_path, 80)
    assert resumed(tmp_path) == 60
    mark_complete(tmp_path, 80)
    (tmp_path / TRACKER).write_text("")
    assert resumed(tmp_path) == 80
    save(tmp_path, 90, previous=80)
    mark_incomplete(tmp_path, 100, previous=step_dir(tmp_path, 90))
    write(tmp_path, 100)
    assert resumed(tmp_path) == 90


def test_a_copy_is_resumed_like_the_original(tmp_path: Path) -> None:
    """Times and the order of the files do not count."""
    save(tmp_path / "original", 60, 80, 100)
    save(tmp_path / "original", 70, previous=60)
    copy = tmp_path / "copy"
    copy.mkdir()
    for step in (80, 70, 100, 60):
        shutil.copytree(step_dir(tmp_path / "original", step), step_dir(copy, step), copy_function=shutil.copyfile)
    assert resumed(copy) == 70


def test_markers_without_a_number_count_by_their_step(tmp_path: Path) -> None:
    save(tmp_path, 60, 80)
    for step in (60, 80):
        (step_dir(tmp_path, step) / COMPLETE).write_text(str(step))
    (tmp_path / TRACKER).write_text("")
    assert resumed(tmp_path) == 80
    save(tmp_path, 70, previous=60)
    (tmp_path / TRACKER).write_text("")
    assert resumed(tmp_path) == 70
    assert checkpoints_to_remove(tmp_path, 1) == []


def test_a_run_that_began_without_the_plugin_is_left_to_verl(tmp_path: Path) -> None:
    write(tmp_path, 40)
    assert resumed(tmp_path) == 40
    assert (tmp_path / TRACKER).read_text() == "40"
    save(tmp_path, 50, previous=40)
    assert resumed(tmp_path) == 50
    assert checkpoints_to_remove(tmp_path, 1) == []


def test_a_first_save_that_was_killed_is_no_checkpoint_of_verl(tmp_path: Path) -> None:
    mark_incomplete(tmp_path, 5)
    write(tmp_path, 5)
    assert resumed(tmp_path) is None
    (tmp_path / TRACKER).write_text("")
    assert resumed(tmp_path) is None


def test_checkpoint_without_its_actor_is_passed_over(tmp_path: Path) -> None:
    """verl's own retention removes the actor folder of old checkpoints only."""
    save(tmp_path, 5, 10)
    (step_dir(tmp_path, 10) / "actor").rmdir()
    assert resumed(tmp_path) == 5


def test_what_is_removed(tmp_path: Path) -> None:
    """Checkpoints saved under a limit, but for the last completed; nothing else, whatever its step."""
    write(tmp_path, 1)
    save(tmp_path, 10, keep=-1)  # verl's other word for no limit
    save(tmp_path, 20, previous=10)
    save(tmp_path, 60, 80, 100, keep=2, previous=20)
    mark_incomplete(tmp_path, 95, step_dir(tmp_path, 100))  # killed
    write(tmp_path, 95)
    save(tmp_path, 70, keep=2, previous=60)  # rolled back
    (tmp_path / "global_step_5_mine").mkdir()
    assert checkpoints_to_remove(tmp_path, None) == checkpoints_to_remove(tmp_path, 0) == []
    assert checkpoints_to_remove(tmp_path, 4) == []
    old = checkpoints_to_remove(tmp_path, 2)
    assert {folder.name for folder in old} == {"global_step_80", "global_step_100"}
    remove(old)
    left = {folder.name for folder in tmp_path.glob("global_step_*")}
    assert left == {
        *(f"global_step_{step}" for step in (1, 10, 20, 60, 70, 95)),
        "global_step_5_mine",
        "global_step_95.incomplete",
    }
    assert resumed(tmp_path) == 70


def test_resuming_by_path_from_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    mark_incomplete(tmp_path, 10)
    write(tmp_path, 10)
    write(tmp_path, 15)  # by verl alone
    for step in (5, 15):
        check_whole(trainer_node(f"{step_dir(tmp_path, step)}/"), ACTOR)
    message = (
        f"trainer.resume_from_path={step_dir(tmp_path, 10)}: this checkpoint is incomplete, its saving or removal "
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_whole(trainer_node(str(step_dir(tmp_path, 10))), ACTOR)


def trainer_node(path: str) -> Any:
    return OmegaConf.create({"resume_mode": "resume_path", "resume_from_path": path})


# ------------------------------ kills ------------------------------


class Workers:
    """The actor's workers as the driver sees them: files, and the retention of verl's checkpoint manager."""

    def __init__(self) -> None:
        self.manager = object.__new__(BaseCheckpointManager)
        self.manager.previous_saved_paths = []

    def save_checkpoint(self, local_path: str, _: str | None, step: int, max_ckpt_to_keep: int | None) -> None:
        self.manager.ensure_checkpoint_capacity(max_ckpt_to_keep)
        os.makedirs(local_path, exist_ok=True)
        for rank in range(2):
            Path(local_path, f"model_{rank}.pt").write_text(str(step))
        self.manager.register_checkpoint(local_path, max_ckpt_to_keep)

    def remove_checkpoints(self, folders: list[str]) -> None:
        assert not any(Path(folder).exists() for folder in folders)


@functools.cache
def composed() -> DictConfig:
    """What a save reads of main_ppo's settings: it writes all that are there, which takes longer than the rest."""
    config = main_ppo_config()
    actor = OmegaConf.masked_copy(config.actor_rollout_ref.actor, ["checkpoint"])
    node = OmegaConf.create({"trainer": config.trainer, "actor_rollout_ref": {"actor": actor}})
    OmegaConf.resolve(node)
    return node


def trainer_in(root: Path, keep: int) -> Any:
    """main_ppo's trainer, as far as it saves."""
    from hpd_verl.ppo.trainer import HPDTrainer

    config = composed()
    config.trainer.default_local_dir = str(root)
    config.trainer.max_actor_ckpt_to_keep = keep
    trainer = object.__new__(HPDTrainer)
    trainer.__dict__ |= {
        "config": config,
        "use_critic": False,
        "trainer_mode": "sync",
        "actor_rollout_wg": Workers(),
        "train_dataloader": StatefulDataLoader([1, 2, 3]),
        "checkpoint_callback": build_checkpoint_callback(config),
        "previous_checkpoint": None,
        "train_dataset": [1, 2, 3],
        "_held": None,
    }
    return trainer


def save_step(trainer: Any, step: int) -> None:
    trainer.global_steps = step
    trainer._save_checkpoint()


_FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def killed_at(event: int, trainer: Any, step: int) -> bool:
    """Save in a child that is killed at its n-th change of a file; whether it came that far."""
    child = os.fork()
    if child == 0:
        seen = SimpleNamespace(count=0)

        def kill(name: str, arguments: tuple[Any, ...]) -> None:
            if name not in _FILE_EVENTS or (name == "open" and "r" in str(arguments[1])):
                return
            seen.count += 1
            if seen.count == event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        try:
            save_step(trainer, step)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_a_resume_with_other_rows_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, rows = tmp_path / "global_step_2", {"rows": 16, "sha256": "a"}
    folder.mkdir()
    say_changed_rows(folder, rows)  # of a checkpoint that does not say its rows
    save_rows(tmp_path, 2, rows)
    say_changed_rows(folder, rows)
    assert not caplog.text
    say_changed_rows(folder, {"rows": 24, "sha256": "b"})
    assert f"resuming from {folder} with other training data: 24 rows, 16 when it was saved. They" in caplog.text
    say_changed_rows(folder, {"rows": 16, "sha256": "b"})
    assert "16 rows as when it was saved, but other ones or in another order. They are shuffled again" in caplog.text


@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_any_moment_of_a_save(tmp_path: Path, keep: int) -> None:
    """There is always a whole checkpoint to resume from, the last or the new one, and old ones go in the end."""
    event, found = 0, set()
    root = tmp_path / "checkpoints"
    while True:
        event += 1
        trainer = trainer_in(root, keep)
        for step in (10, 20):
            save_step(trainer, step)
        killed = killed_at(event, trainer, 30)
        folder = checkpoint_to_resume(root)
        assert folder is not None, f"nothing to resume from after a kill at change {event}"
        step = int(folder.name.removeprefix("global_step_"))
        found.add(step)
        assert [file.read_text() for file in sorted((folder / "actor").iterdir())] == [str(step)] * 2
        torch.load(folder / "data.pt", weights_only=False)

        again = trainer_in(root, keep)
        again.previous_checkpoint = folder
        for step in (40, 50):
            save_step(again, step)
        marked = {file.parent.name for file in root.glob(f"global_step_*/{COMPLETE}")}
        assert marked == {f"global_step_{step}" for step in (40, 50)[-keep:]}
        left = {folder.name for folder in root.glob("global_step_*") if not folder.name.endswith(".tmp")} - marked
        assert left <= {"global_step_30", "global_step_30.incomplete"}  # a save without its end
        shutil.rmtree(root)
        if not killed:
            break
    assert found == {20, 30}
    assert event > 10
