"""What the teacher reads in place of a batch's prompts, by rows of the package's data set and of others."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Tiny, main_ppo_config
from transformers import AutoTokenizer
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn, get_dataset_class
from verl.workers.config import HFModelConfig

from hpd_verl.checks.start import check_main_ppo
from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.ppo.teacher_columns import TeacherColumns

SYSTEM = {"role": "system", "content": "be brief"}
VERLS_OWN = "data.custom_cls.path=null"
"""verl's data set, as one of a user."""
TEMPLATE = 'data.teacher_prompt_template="{demonstration} {prompt} {answer}"'


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def rows_of(of_teacher: list[Any] | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"prompt": [user("2 + 2")], "demonstration": "4"},
        {"prompt": [SYSTEM, user("3 + 1 + 1")], "demonstration": "5"},
        {"prompt": [user("1")], "demonstration": "1"},
    ]
    for number, row in enumerate(rows):
        row["reward_model"] = {"style": "rule", "ground_truth": row["demonstration"]}
        if of_teacher is not None:
            row["teacher_prompt"] = of_teacher[number]
    return rows


def taken(tiny: Tiny, file: Path, *overrides: str, pipeline: str = "one_pass") -> TeacherColumns:
    """The columns of one batch, of all rows of the file."""
    config = main_ppo_config(*tiny.main_ppo, f"data.train_files={file}", "data.max_prompt_length=64", *overrides)
    student = HFModelConfig(path=str(tiny.student))
    data = get_dataset_class(config.data)(
        data_files=str(file), tokenizer=AutoTokenizer.from_pretrained(tiny.student), config=config.data
    )
    hpd = HPDConfig.from_config(config.algorithm.hpd).model_copy(update={"pipeline": pipeline})
    columns = TeacherColumns.of(config, hpd, student)
    batch = collate_fn([data[index] for index in range(len(data))])
    batch["uid"] = np.array([f"1r{index}" for index in range(len(data))], dtype=object)
    columns.take(tu.get_tensordict(batch), list(batch["uid"]))
    return columns


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(of_teacher: list[Any] | None) -> Path:
        file = tmp_path / "rows.parquet"
        pd.DataFrame(rows_of(of_teacher)).to_parquet(file)
        return file

    return write


CHATS = [[SYSTEM, user("2 + 2 is 4")], [user("5")], [user("1 and 1"), SYSTEM, user("more")]]


@pytest.mark.parametrize(
    ("of_teacher", "settings"),
    [([CHATS[0], None, CHATS[2]], (TEMPLATE,)), (None, ())],
    ids=["column_and_template", "neither"],
)
def test_rows_of_another_data_set_have_their_teachers_prompts(
    tiny: Tiny, written: Any, of_teacher: list[Any] | None, settings: tuple[str, ...]
) -> None:
    file, keys = written(of_teacher), ["1r0_0_0", "1r1_0_0", "1r2_0_0"]
    own, other = taken(tiny, file, *settings), taken(tiny, file, VERLS_OWN, *settings)
    assert own.names == other.names == ([fields.TEACHER_PROMPTS] if of_teacher or settings else [])
    for name in own.names:
        of_own, of_other = own.of_keys(keys)[name].unbind(), other.of_keys(keys)[name].unbind()
        assert len({tuple(each.tolist()) for each in of_own}) == 3
        assert [each.tolist() for each in of_other] == [each.tolist() for each in of_own]


@pytest.mark.parametrize(
    ("of_teacher", "settings", "refusal"),
    [
        ([CHATS[0], None, CHATS[2]], (), r"^row 1r1: teacher_prompt is null, expected a chat"),
        (None, ('data.teacher_prompt_template="{hint}"',), r"^row 1r0: hint is null, and data.teacher_prompt_template"),
    ],
)
def test_a_row_of_another_data_set_without_a_chat_is_refused(
    tiny: Tiny, written: Any, of_teacher: list[Any] | None, settings: tuple[str, ...], refusal: str
) -> None:
    with pytest.raises(ValueError, match=refusal):
        taken(tiny, written(of_teacher), VERLS_OWN, *settings)


def test_a_staged_teacher_is_not_given_prompts_that_it_would_not_read(tiny: Tiny, written: Any) -> None:
    with pytest.raises(ValueError, match=r"^algorithm.hpd.pipeline=staged: .*data.teacher_prompt_key"):
        taken(tiny, written(CHATS), VERLS_OWN, pipeline="staged")
    config = main_ppo_config(*tiny.main_ppo, VERLS_OWN, TEMPLATE, "algorithm.hpd.pipeline=staged")
    with pytest.raises(ValueError, match=r"^algorithm.hpd.pipeline=staged: .*data.teacher_prompt_template"):
        check_main_ppo(config)  # in the driver, where no file is read
