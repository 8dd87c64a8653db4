"""The date of prompts, for chat templates that write today's date.

Stored rows are found by their tokens; with another date in the prompts none would be found. So a run writes one date,
and a run with a store on disk the date of the store's first run.
"""

import logging
from datetime import date
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from hpd_verl.config import HPDConfig
from hpd_verl.data.chat_template import DATE_KWARG, KWARGS_SETTING, parse_date
from hpd_verl.engine.ranks import on_rank_zero
from hpd_verl.teacher.store.store import DIR_SETTING

logger = logging.getLogger(__name__)

DATE_FILE = "prompt_date"
"""File in a store's folder: the date in its prompts, as 2026-01-31."""


def fix_prompt_date(data: DictConfig, hpd: HPDConfig, chat_template: Any) -> None:
    """Set the date that the chat template writes, where it writes one; all ranks together.

    Args:
        data: verl's ``data`` node, whose ``apply_chat_template_kwargs`` get the date unless they have one.
        hpd: the algorithm's settings.
        chat_template: the student's, one or several by name.

    Raises:
        ValueError: the store's folder cannot be written to.
    """
    if DATE_KWARG not in str(chat_template):
        return
    given = (data.get("apply_chat_template_kwargs") or {}).get(DATE_KWARG)
    folder = None
    if hpd.teacher_cache == "disk" and hpd.needs_teacher:
        folder = Path(str(hpd.teacher_cache_dir)).expanduser()
    chosen = on_rank_zero(lambda: _date(given, folder))
    with open_dict(data):
        data.apply_chat_template_kwargs = {**(data.get("apply_chat_template_kwargs") or {}), DATE_KWARG: chosen}


def _date(given: str | None, folder: Path | None) -> str:
    """The date of the setting, of the store, or today's; says which."""
    setting = f"+{KWARGS_SETTING}.{DATE_KWARG}"
    if given is not None:
        parse_date(given)
    begun = given if folder is None else _begun(folder, given)
    if given is not None:
        if begun != given:
            logger.warning(
                "%s=%s: the store %s has prompts of the date %s; its rows do not match and are stored again",
                setting,
                given,
                folder,
                begun,
            )
        return given
    if begun is not None:
        logger.warning(
            "the student's chat template writes today's date: prompts get %s, the date of the store %s; %s=DATE "
            "sets another",
            begun,
            folder,
            setting,
        )
        return begun
    today = date.today().isoformat()
    logger.warning(
        "the student's chat template writes today's date: all prompts of this run get %s; to keep it in later runs, "
        "set %s=%s",
        today,
        setting,
        today,
    )
    return today


def _begun(folder: Path, given: str | None) -> str:
    """The date of a store's prompts, which its first run writes down."""
    file = folder / DATE_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(file, "x") as stream:
            stream.write(given or date.today().isoformat())
    except FileExistsError:
        pass
    except OSError as error:
        raise ValueError(
            f"{DIR_SETTING}={folder}: cannot be written to ({error.strerror}); give a folder that every rank can "
            "create and write to"
        ) from error
    text = file.read_text().strip()
    try:
        parse_date(text)
    except ValueError:
        raise ValueError(
            f"{DIR_SETTING}={folder}: its {DATE_FILE} holds no date ({text!r}); delete that file"
        ) from None
    return text
