"""A row is read as it was written: parquet and JSON give the same chats, and the trainers the same tokens."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import WORDS, make_rows, make_tokenizer
from omegaconf import OmegaConf

from hpd_verl.data.dataset import HPDDataset
from hpd_verl.data.row import tools_of


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


ROWS: list[dict[str, Any]] = [
    {
        "prompt": [
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "", "tool_calls": [call(a=1, b=[{"c": 2}])]},
            {"role": "tool", "content": "2"},
        ],
        "demonstration": [{"role": "assistant", "content": "3", "reasoning_content": "4"}],
        "tools": [tool("f", a={"type": "number"})],
    },
    {
        "prompt": [{"role": "user", "content": "1"}],
        "demonstration": [{"role": "assistant", "content": "", "tool_calls": [call(city="5"), call()]}],
        "tools": [tool("g", city={"type": "string"}), tool("h")],
    },
    {"prompt": [{"role": "user", "content": "1"}], "demonstration": [{"role": "assistant", "content": "6"}]},
]


def read(rows: list[dict[str, Any]], file: Path, template: str | None = None, **settings: Any) -> HPDDataset:
    frame = pd.DataFrame(rows)
    frame.to_parquet(file) if file.suffix == ".parquet" else file.write_text("\n".join(map(json.dumps, rows)))
    config = OmegaConf.create(
        {
            "train_files": str(file),
            "max_prompt_length": 32,
            "max_response_length": 32,
            "filter_overlong_prompts": False,
            "filter_overlong_prompts_workers": 1,
            "hpd": {"on_policy_fraction": 0.0, "missing_demonstration": "error", "overlong_demonstration": "truncate"},
            **settings,
        }
    )
    tokenizer = make_tokenizer(WORDS)
    tokenizer.chat_template = template or tokenizer.chat_template
    return HPDDataset(str(file), tokenizer, config)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_what_the_columns_add_is_left_out(name: str, tmp_path: Path) -> None:
    dataset = read(ROWS, tmp_path / name)
    for index, written in enumerate(ROWS):
        row, item = dataset.row(index), dataset[index]
        assert (row["prompt"], row["demonstration"]) == (written["prompt"], written["demonstration"])
        assert tools_of(row["tools"]) == written.get("tools")
        assert (item["raw_prompt"], item["demonstration"]) == (written["prompt"], written["demonstration"])
        assert tools_of(item["tools"]) == written.get("tools")


def test_nulls_of_json_stay_in_calls(tmp_path: Path) -> None:
    """Where the objects of JSON differ they are kept as they are; a message's null key is as one that is not there."""
    rows = [{**ROWS[0], "demonstration": [{"role": "assistant", "content": "1", "name": None, "tool_calls": calls}]}
            for calls in ([call(a=None)], [call(b=1)])]  # fmt: skip
    (message,) = read(rows, tmp_path / "rows.jsonl").row(0)["demonstration"]
    assert message == {"role": "assistant", "content": "1", "tool_calls": [call(a=None)]}


def test_json_text_of_tools_and_calls(tmp_path: Path) -> None:
    """In parquet too it keeps what was written, nulls as well."""
    calls, tools = [call(a=None)], [tool("f", a={"default": None})]
    answer = {"role": "assistant", "content": "", "tool_calls": json.dumps(calls)}
    rows = [{**ROWS[2], "demonstration": [answer], "tools": json.dumps(tools)}, {**ROWS[2], "tools": None}]
    dataset = read(rows, tmp_path / "rows.parquet")
    assert dataset.row(0)["demonstration"] == [{**answer, "tool_calls": calls}]
    assert tools_of(dataset.row(0)["tools"]) == tools
    assert [tools_of(dataset[index]["tools"]) for index in (0, 1)] == [tools, None]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tools", "f(x)", "tools is text that is not JSON"),
        ("tools", '{"name": "f"}', "tools is dict, expected a list of JSON schemas"),
        (
            "demonstration",
            [{"role": "assistant", "content": "", "tool_calls": "f(x)"}],
            "the demonstration's tool_calls is str, ex",
        ),
        (
            "prompt",
            [{"role": "user", "content": "1", "tool_calls": "[1]"}],
            "message 0 of the prompt (user)'s tool_calls is list",
        ),
    ],
)
@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_wrong_forms_are_named(name: str, column: str, value: Any, message: str, tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "1", "tool_calls": None}], "demonstration": ROWS[2]["demonstration"]}
    row["tools"] = None
    where = "row 1" if name == "rows.parquet" else "row 1 (line 2)"
    with pytest.raises(ValueError, match=re.escape(f"{name}: {where}: {message}")):
        read([row, {**row, column: value}], tmp_path / name)


def test_prompts_are_measured_with_their_tools(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As they are trained; a prompt that the template refuses is left out, which is said with its words."""
    template = (
        "{% for tool in tools or [] %}{{ tool.function.name }} 1 2 3 4 {% endfor %}"
        "{% if messages[0].content == '9' %}{{ raise_exception('not nine') }}{% endif %}"
        "{% for m in messages %}<turn> {{ m.role }} {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<turn> assistant {% endif %}"
    )
    rows: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": content}], "demonstration": "1", "tools": tools}
        for content, tools in (("1", None), ("1", [tool("f")]), ("9", None))
    ]
    rows.append({**rows[0], "prompt": [*rows[0]["prompt"], {"role": "assistant", "content": "1 2"}]})
    settings: dict[str, Any] = {"filter_overlong_prompts": True}
    assert len(read(rows, tmp_path / "rows.jsonl", template, max_prompt_length=11, **settings)) == 3
    assert "dropped 1 of 4 rows, whose prompts the chat template rejects; the first, row 2: the" in caplog.text
    assert "rejects the chat: not nine" in caplog.text
    kept = read(rows, tmp_path / "rows.jsonl", template, max_prompt_length=8, **settings)
    assert [row["prompt"] for row in kept.rows()] == [rows[0]["prompt"], rows[3]["prompt"]]


def test_the_fingerprint_tells_other_rows_and_another_order(tmp_path: Path) -> None:
    rows = make_rows(8)
    same = read(rows, tmp_path / "a.parquet").fingerprint
    assert same == read(rows, tmp_path / "b.jsonl").fingerprint
    assert same["rows"] == 8
    assert read(rows[:7], tmp_path / "c.parquet").fingerprint["rows"] == 7
    assert read([*rows[1:], rows[0]], tmp_path / "d.parquet").fingerprint["sha256"] != same["sha256"]


def test_the_fingerprint_tells_other_numbers_that_an_objective_reads(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from hpd_verl.objectives import objective\n\n\n"
        "@objective('by_weight', over='token', needs={'row.weight'}, returns='loss')\n"
        "def by_weight(log_probs, context):\n"
        '    """The label, weighted by its row."""\n'
        "    return -context.row['weight'] * log_probs.student_label\n"
    )
    hpd = {
        "on_policy_fraction": 0.0,
        "missing_demonstration": "error",
        "overlong_demonstration": "truncate",
        "objective": f"{tmp_path / 'own.py'}:by_weight",
    }
    first, other = (
        read([{**row, "weight": weight} for row in make_rows(8)], tmp_path / f"{weight}.parquet", hpd=hpd).fingerprint
        for weight in (1.0, 2.0)
    )
    assert first["rows"] == other["rows"]
    assert first["sha256"] != other["sha256"]
