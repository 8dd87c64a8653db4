"""Only checkpoints written to their end are resumed from."""

from pathlib import Path

from hpd_verl.checkpoint import TRACKER, mark_complete, mark_incomplete, repair_tracker


def save(root: Path, step: int, complete: bool = True) -> None:
    (root / f"global_step_{step}" / "actor").mkdir(parents=True)
    if complete:
        mark_complete(root, step)


def test_nothing_saved(tmp_path: Path) -> None:
    assert repair_tracker(tmp_path / "missing") is None


def test_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10, complete=False)
    (tmp_path / TRACKER).write_text("10")
    assert repair_tracker(tmp_path) == 5
    assert (tmp_path / TRACKER).read_text() == "5"


def test_empty_tracker_is_rewritten(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    (tmp_path / TRACKER).write_text("")
    assert repair_tracker(tmp_path) == 10


def test_tracker_without_any_complete_checkpoint_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 5)
    mark_incomplete(tmp_path, 5)
    (tmp_path / TRACKER).write_text("5")
    assert repair_tracker(tmp_path) is None
    assert not (tmp_path / TRACKER).exists()


def test_checkpoint_without_its_actor_is_passed_over(tmp_path: Path) -> None:
    """verl's retention removes the actor folder of old checkpoints only."""
    save(tmp_path, 5)
    save(tmp_path, 10)
    (tmp_path / "global_step_10" / "actor").rmdir()
    assert repair_tracker(tmp_path) == 5
