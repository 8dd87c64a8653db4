"""The checkpoint to resume from and the store's folder are looked at before anything starts."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from hpd_verl.checks.folders import check_store
from hpd_verl.checks.resume import check_resume
from hpd_verl.config import HPDConfig
from hpd_verl.errors import Refused
from hpd_verl.run.checkpoint import check_whole, mark_complete


def checkpoint(
    root: Path, ranks: int, step: int = 2, contents: tuple[str, ...] = ("model", "optim", "extra_state")
) -> Path:
    """A complete checkpoint of the lean trainer, of which its files hold nothing."""
    folder = root / f"global_step_{step}"
    folder.mkdir(parents=True)
    for name in contents:
        for rank in range(ranks):
            torch.save({}, folder / f"{name}_world_size_{ranks}_rank_{rank}.pt")
    torch.save({}, folder / "data_0.pt")
    mark_complete(root, step)
    return folder


def resume(root: Path, ranks: int, contents: tuple[str, ...] = ("model", "optimizer", "extra"), **trainer: Any) -> None:
    node = {"default_local_dir": str(root), "resume_mode": "auto", "resume_from_path": None, **trainer}
    check_resume(
        OmegaConf.create(node),
        OmegaConf.create({"load_contents": list(contents)}),
        ranks,
        counted="torchrun's processes",
        folder="",
        contents="data_0.pt",
    )


def test_a_checkpoint_of_as_many_ranks(tmp_path: Path) -> None:
    resume(tmp_path / "none", 2)
    folder = checkpoint(tmp_path, ranks=2)
    resume(tmp_path, 2)
    resume(tmp_path, 2, resume_mode="resume_path", resume_from_path=str(folder))
    resume(tmp_path, 4, resume_mode="disable")


class Planted:
    """What a pickle must not do."""

    def __reduce__(self) -> Any:
        return print, ("planted",)


@pytest.mark.parametrize("mode", ["auto", "resume_path"])
def test_a_file_behind_a_link_is_looked_at(tmp_path: Path, mode: str, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run"
    folder = checkpoint(root, ranks=1)
    (tmp_path / "elsewhere").mkdir()
    (folder / "actor").symlink_to("../../elsewhere")
    (folder / "round").symlink_to(".")
    by_path = str(folder) if mode == "resume_path" else None
    trainer = {"default_local_dir": str(root), "resume_mode": mode, "resume_from_path": by_path}
    check_whole(OmegaConf.create(trainer), "data_0.pt")
    torch.save(Planted(), tmp_path / "elsewhere" / "model_world_size_1_rank_0.pt")
    with pytest.raises(ValueError, match=r"model_world_size_1_rank_0.pt holds code, not only data .*print"):
        check_whole(OmegaConf.create(trainer), "data_0.pt")
    assert "planted" not in capfd.readouterr().out


def test_a_checkpoint_of_other_ranks(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, ranks=1)
    said = f"{folder} was saved by 1 rank, and this run has 2; start it with 1 (torchrun's processes), or export the ch"
    by_path: dict[str, Any] = {"resume_mode": "resume_path", "resume_from_path": str(folder)}
    cases: dict[str, dict[str, Any]] = {
        "trainer.resume_mode=auto": {},
        f"trainer.resume_from_path={folder}": by_path,
    }
    for setting, trainer in cases.items():
        with pytest.raises(Refused) as refused:
            resume(tmp_path, 2, **trainer)
        assert str(refused.value).startswith(f"{setting}: {said}")


def test_contents_that_were_not_saved(tmp_path: Path) -> None:
    checkpoint(tmp_path, ranks=2, contents=("model",))
    resume(tmp_path, 2, contents=("model",))
    with pytest.raises(Refused, match=r"^trainer\.resume_mode=auto: .* holds no optimizer; leave it out of check"):
        resume(tmp_path, 2)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"resume_mode": "resume_path"}, "=None: give the folder of a checkpoint, global_step_N"),
        ({"resume_mode": "resume_path", "resume_from_path": "/a/b"}, "=/a/b: give the folder of a checkpoint, global_"),
        ({"resume_mode": "resume_path", "resume_from_path": "/a/global_step_1"}, "=/a/global_step_1: no such folder;"),
        ({"resume_from_path": "/a/global_step_1"}, "=/a/global_step_1: trainer.resume_mode=auto does not read it; set"),
    ],
)
def test_a_path_that_names_no_checkpoint(trainer: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        resume(tmp_path, 1, **trainer)
    assert str(refused.value).startswith(f"trainer.resume_from_path{message}")


def test_a_store_that_cannot_be(tmp_path: Path) -> None:
    """Its limit above the free disk; a folder that cannot be made. Nothing is left behind."""
    check_store(HPDConfig(teacher_cache="disk", teacher_cache_dir=str(tmp_path / "store"), teacher_cache_max_gib=0.001))
    assert not (tmp_path / "store").exists()
    free = shutil.disk_usage(tmp_path).free >> 30
    store = HPDConfig(
        teacher_cache="disk", teacher_cache_dir=str(tmp_path / "store"), teacher_cache_max_gib=2 * free + 1
    )
    with pytest.raises(
        Refused, match=rf"^algorithm\.hpd\.teacher_cache_max_gib={2 * free + 1}: lets algorithm\.hpd\.te"
    ):
        check_store(store)
    with pytest.raises(Refused, match=r"^algorithm\.hpd\.teacher_cache_dir=/proc/a: cannot be written \(.*\); choose"):
        check_store(HPDConfig(teacher_cache="disk", teacher_cache_dir="/proc/a"))
