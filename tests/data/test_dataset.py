"""Rows are checked where they are read; overlong demonstrations are dropped or refused as set."""

from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS, make_rows, make_tokenizer, write_parquet
from omegaconf import OmegaConf

from hpd_verl.data import fields
from hpd_verl.data.dataset import HPDDataset
from hpd_verl.objectives import registry


def read(file: Path | str, files_are_checked: bool = False, **hpd: Any) -> HPDDataset:
    config = OmegaConf.create(
        {
            "train_files": str(file),
            "files_are_checked": files_are_checked,
            "prompt_key": "prompt",
            "max_prompt_length": 32,
            "max_response_length": 6,
            "filter_overlong_prompts": False,
            "hpd": {
                "on_policy_fraction": 0.0,
                "missing_demonstration": "error",
                "overlong_demonstration": "truncate",
                **hpd,
            },
        }
    )
    return HPDDataset(str(file), make_tokenizer(WORDS), config)


def change(rows: list[dict[str, Any]], **columns: Any) -> list[dict[str, Any]]:
    """The rows with row 3 changed."""
    rows[3] = {**rows[3], **columns}
    return rows


def test_rows_are_read(tmp_path: Path) -> None:
    assert len(read(write_parquet(make_rows(8), tmp_path / "rows.parquet"))) == 8


def test_numbers_of_rows_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of columns too that verl gives another content in its rows, and only for training."""
    monkeypatch.setattr(registry, "OBJECTIVES", dict(registry.OBJECTIVES))
    needs = {"row.index", "row.uid", "row.is_rollout"}
    (tmp_path / "of_rows.py").write_text(
        "from hpd_verl.objectives import objective\n"
        f"@objective('of_rows', over='token', returns='loss', needs={needs})\n"
        "def of_rows(log_probs, context):\n"
        "    return -log_probs.student_label * context.row['index']\n"
    )
    rows = [{**row, "index": number % 3 == 0, "uid": number / 8} for number, row in enumerate(make_rows(8))]
    data = read(write_parquet(rows, tmp_path / "rows.parquet"), objective=f"{tmp_path}/of_rows.py:of_rows")
    for number in range(8):
        wanted = {fields.row_number("index"): float(number % 3 == 0), fields.row_number("uid"): number / 8}
        assert data.numbers(number) == wanted
        assert {name: data[number][name] for name in wanted} == wanted
    data.row_columns = []
    assert data.numbers(3) == {}


def test_demonstration_as_chat_list(tmp_path: Path) -> None:
    rows = [{**row, "demonstration": [{"role": "assistant", "content": row["demonstration"]}]} for row in make_rows(8)]
    assert len(read(write_parquet(rows, tmp_path / "rows.parquet"))) == 8


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"demonstration": None}, "row 3: demonstration is null"),
        ({"demonstration": "  "}, "row 3: demonstration is empty"),
        ({"prompt": None}, "row 3: prompt is null, expected a chat list"),
        ({"prompt": []}, "row 3: prompt is an empty list, expected a chat list"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    file = write_parquet(change(make_rows(8), **columns), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        read(file)
    assert len(read(file, files_are_checked=True)) == 8, "rows are checked once, by a run's start"


def test_what_the_start_could_not_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this machine has the file, for the start may have been on another one; and what it would have fetched."""
    with pytest.raises(
        ValueError, match=r"^data\.train_files=.*none\.parquet: no such file; give existing parquet, json"
    ):
        read(tmp_path / "none.parquet", files_are_checked=True)
    bad = write_parquet(change(make_rows(8), demonstration=None), tmp_path / "bad.parquet")
    monkeypatch.setattr("verl.utils.fs.copy_to_local", lambda src, **settings: str(bad))
    with pytest.raises(ValueError, match="row 3: demonstration is null"):
        read("hdfs://place/rows.parquet", files_are_checked=True)


def test_prompt_that_is_text_is_refused(tmp_path: Path) -> None:
    rows = [{**row, "prompt": "1 plus 2 ?"} for row in make_rows(8)]
    with pytest.raises(ValueError, match="row 0: prompt is str, expected a chat list"):
        read(write_parquet(rows, tmp_path / "rows.parquet"))


def test_missing_column_needs_rollouts(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "demonstration"} for row in make_rows(8)]
    file = write_parquet(rows, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="no column 'demonstration'"):
        read(file)
    assert len(read(file, on_policy_fraction=1)) == 8
    assert len(read(file, missing_demonstration="rollout")) == 8


def test_overlong_demonstrations(tmp_path: Path) -> None:
    """Six tokens with the turn's end fit; one more does not."""
    file = write_parquet(change(make_rows(8), demonstration="1 plus 2 is 3 ."), tmp_path / "rows.parquet")
    assert len(read(file)) == 8
    dropping = read(file, overlong_demonstration="drop")
    assert len(dropping) == 7
    assert dropping.dropped_demonstrations == 1
    with pytest.raises(ValueError, match="row 3: demonstration has 7 tokens"):
        read(file, overlong_demonstration="error")
