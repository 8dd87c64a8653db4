"""Prompts of a template that writes today's date get one date a run, and one a store."""

import logging
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hpd_verl.config import HPDConfig
from hpd_verl.teacher.prompt_date import DATE_FILE, fix_prompt_date

DATED = "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}"
TODAY = date.today().isoformat()


def chosen(folder: Path | None, template: str = DATED, **kwargs: Any) -> str | None:
    store = (
        {} if folder is None else {"teacher_cache": "disk", "teacher_cache_dir": str(folder), "pipeline": "one_pass"}
    )
    data = OmegaConf.create({"apply_chat_template_kwargs": {"enable_thinking": False, **kwargs}})
    OmegaConf.set_struct(data, True)
    fix_prompt_date(data, HPDConfig(**store), template)
    assert data.apply_chat_template_kwargs.enable_thinking is False
    return data.apply_chat_template_kwargs.get("strftime_now")


def test_without_a_store_it_is_the_day_of_the_start(caplog: pytest.LogCaptureFixture) -> None:
    assert chosen(None, "{{ messages[0].content }}") is None
    assert not caplog.text
    assert chosen(None) == TODAY
    assert f"set +data.apply_chat_template_kwargs.strftime_now={TODAY}" in caplog.text


def test_a_store_keeps_the_date_of_its_first_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = tmp_path / "store"
    assert chosen(store) == TODAY
    (store / DATE_FILE).write_text("2020-01-02")  # begun on another day
    assert chosen(store) == "2020-01-02"
    assert f"prompts get 2020-01-02, the date of the store {store}" in caplog.text


def test_the_date_of_the_setting_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert chosen(tmp_path, strftime_now="2021-03-04") == "2021-03-04"
        assert not caplog.text
        assert chosen(tmp_path) == "2021-03-04"
        assert chosen(tmp_path, strftime_now="2022-03-04") == "2022-03-04"
    assert "has prompts of the date 2021-03-04; its rows do not match" in caplog.text
    with pytest.raises(ValueError, match=r"^data\.apply_chat_template_kwargs\.strftime_now=now: not a date"):
        chosen(tmp_path, strftime_now="now")


def test_a_folder_that_cannot_keep_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^algorithm\.hpd\.teacher_cache_dir=/proc/a: cannot be written to"):
        chosen(Path("/proc/a"))
    (tmp_path / DATE_FILE).write_text("torn")
    with pytest.raises(ValueError, match=r"its prompt_date holds no date \('torn'\); delete that file"):
        chosen(tmp_path)
