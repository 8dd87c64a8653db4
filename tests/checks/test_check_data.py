"""Data files and rows are checked before a run starts: what is wrong is named by file and row, or line."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WORDS, Tiny, make_rows, make_tokenizer, sft_config, write_parquet
from omegaconf import OmegaConf

from hpd_verl.checks.data import check_prompts_fit
from hpd_verl.checks.start import check_sft_run
from hpd_verl.config import HPDConfig
from hpd_verl.data.dataset import HPDDataset
from hpd_verl.data.files import RowRules, check_files
from hpd_verl.objectives import registry

Rows = list[dict[str, Any]]


def data_node(files: Any, **settings: Any) -> Any:
    hpd = {"on_policy_fraction": 0.0, "missing_demonstration": "error", "overlong_demonstration": "truncate"}
    hpd |= {name: settings.pop(name) for name in list(settings) if name in hpd}
    lengths = {"max_prompt_length": 32, "max_response_length": 6, "filter_overlong_prompts": False}
    return OmegaConf.create({"train_files": files, "prompt_key": "prompt", "hpd": hpd} | lengths | settings)


def check(files: Any, is_train: bool = True, **settings: Any) -> int:
    """Check files as data.train_files and return their rows."""
    files = [str(file) for file in files] if isinstance(files, list) else str(files)
    data = data_node(files, **settings)
    rules = RowRules.of(data, HPDConfig.from_config(data.hpd), is_train)
    return sum(file.rows for file in check_files("data.train_files", files, rules))


def jsonl(rows: Rows, file: Path, **lines: str) -> Path:
    """Rows as JSON lines; ``lines`` replaces some, as ``line_3="..."``."""
    texts = [json.dumps(row) for row in rows]
    for name, text in lines.items():
        texts[int(name.removeprefix("line_")) - 1] = text
    file.write_text("\n".join(texts) + "\n")
    return file


def changed(rows: Rows, **columns: Any) -> Rows:
    """The rows with row 3 changed."""
    rows[3] = {**rows[3], **columns}
    return rows


def chats(rows: Rows) -> Rows:
    return [{**row, "demonstration": [{"role": "assistant", "content": row["demonstration"]}]} for row in rows]


def torn(folder: Path) -> Path:
    file = write_parquet(make_rows(8), folder / "torn.parquet")
    file.write_bytes(file.read_bytes()[:-100])
    return file


def empty(folder: Path) -> Path:
    (folder / "empty.parquet").touch()
    return folder / "empty.parquet"


def no_rows(folder: Path) -> Path:
    file = folder / "no_rows.parquet"
    pd.DataFrame(make_rows(2)).iloc[:0].to_parquet(file)
    return file


def blank_lines(folder: Path) -> Path:
    (folder / "blank.jsonl").write_text("\n\n")
    return folder / "blank.jsonl"


def broken_array(folder: Path) -> Path:
    (folder / "array.json").write_text(json.dumps(make_rows(8), indent=1)[:900])
    return folder / "array.json"


def gone_beside_another(folder: Path) -> list[Path]:
    return [write_parquet(make_rows(8), folder / "rows.parquet"), folder / "gone.parquet"]


def other_type(folder: Path) -> list[Path]:
    rows = [{**row, "ability": 3} for row in make_rows(8)]
    return [write_parquet(make_rows(8), folder / "a.parquet"), write_parquet(rows, folder / "b.parquet")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torn, "torn.parquet: not a complete parquet file (Parquet magic bytes not found in footer."),
        (empty, "empty.parquet: the file is empty (0 bytes); write it again, or leave it out"),
        (no_rows, "no_rows.parquet: the file has no rows; write it again, or leave it out"),
        (blank_lines, "blank.jsonl: the file has no rows; write it again, or leave it out"),
        (broken_array, "array.json: line 60 is not JSON (Expecting property name enclosed"),
        (lambda folder: folder / "gone.parquet", "gone.parquet: no such file; give "),
        (gone_beside_another, "gone.parquet: no such file; give "),
        (lambda folder: folder / "gone*.parquet", "gone*.parquet: no such file; give "),
        (lambda folder: folder, ": a folder; give its files, such as "),
        (
            lambda folder: "~/train.parquet",
            "~/train.parquet: the shell does not expand ~ after =; write the whole",
        ),
        (lambda folder: folder / "rows.csv", "rows.csv: verl reads names that end in .parquet, .json or .jsonl; conv"),
        (lambda folder: [], "[]: no files; give parquet, json or jsonl files"),
        (other_type, "b.parquet: its columns do not fit those of "),
        (
            lambda folder: jsonl(make_rows(8), folder / "rows.jsonl", line_5='{"prompt": ['),
            "rows.jsonl: line 5 is not JSON (Expecting value, column 13); correct or remove it",
        ),
        (
            lambda folder: jsonl(make_rows(8), folder / "rows.jsonl", line_5="[1, 2]"),
            "rows.jsonl: row 4 (line 5) is list, expected an object with the columns",
        ),
        (
            lambda folder: jsonl(changed(make_rows(8), prompt="1 plus 2 ?"), folder / "rows.jsonl"),
            "rows.jsonl: row 3 (line 4): prompt is str, expected a chat list",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.train_files=") as refusal:
        check(make(tmp_path))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
def test_what_is_read(kind: str, tmp_path: Path) -> None:
    """Each kind of file; strings and chats as demonstrations; patterns and lists, as verl itself reads them."""
    rows = make_rows(8)
    for name, content in (("a", rows), ("b", rows), ("chats", chats(rows))):
        file = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            write_parquet(content, file)
        elif kind == "jsonl":
            jsonl(content, file)
        else:
            file.write_text(json.dumps(content, indent=1))
    assert check(tmp_path / f"chats.{kind}") == 8
    several = [str(tmp_path / f"[ab].{kind}"), str(tmp_path / f"a.{kind}")]
    assert check(several) == 24
    assert len(HPDDataset(several, make_tokenizer(WORDS), data_node(several))) == 24


def test_json_of_the_datasets_library(tmp_path: Path) -> None:
    """A column of several types, which `datasets` keeps as JSON and writes to parquet as such, is read as it was."""
    rows = make_rows(8)
    rows[3]["prompt"][0]["extra"] = {"a": 1}
    rows[4]["prompt"][0]["extra"] = "text"
    file = jsonl(rows, tmp_path / "rows.jsonl")
    assert check(file) == 8
    datasets.load_dataset("json", data_files=str(file))["train"].to_parquet(str(tmp_path / "rows.parquet"))
    assert check(tmp_path / "rows.parquet") == 8


def user(content: Any, **keys: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **keys}]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"prompt": user(None)}, {}, "message 0 of the prompt (user)'s content is null; write its text, or '' beside"),
        ({"prompt": [*user("1 ?"), CALL]}, {}, "message 1 of the prompt (assistant)'s content is null; write its text"),
        ({"prompt": [{"role": None, "content": "1 ?"}]}, {}, "message 0 of the prompt has role None; write a string"),
        ({"demonstration": None}, {}, "demonstration is null, expected the answer's text; every row needs a demonstr"),
        ({"demonstration": " \u3000\n"}, {}, "demonstration is empty, expected the answer's text; every row needs"),
        (
            {"demonstration": [{**CALL, "tool_calls": [{"function": {"name": "f"}}]}]},
            {},
            "the demonstration's content is null; write its text, or '' beside tool calls",
        ),
        ({"images": ["a.png"]}, {}, "images is not empty; HPD trains on text: remove such rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_rows(columns: dict[str, Any], settings: dict[str, Any], message: str, suffix: str, tmp_path: Path) -> None:
    in_chats = isinstance(columns.get("demonstration"), list)
    rows, file = changed(chats(make_rows(8)) if in_chats else make_rows(8), **columns), tmp_path / f"rows.{suffix}"
    where = "row 3" if suffix == "parquet" else "row 3 (line 4)"
    write_parquet(rows, file) if suffix == "parquet" else jsonl(rows, file)
    with pytest.raises(ValueError, match=r"^data\.train_files=") as refusal:
        check(file, **settings)
    assert f"{file}: {where}: {message}" in str(refusal.value)
    with pytest.raises(ValueError, match=r"^data\.train_files=") as alone:
        HPDDataset(str(file), make_tokenizer(WORDS), data_node(str(file), **settings))
    assert str(alone.value) == str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5, "row 0: message 0 of the prompt (user)'s content is int; write a string"),
        (
            [{"type": "text", "text": "x"}],
            "row 0: message 0 of the prompt (user)'s content is a list of parts (mult",
        ),
    ],
)
def test_content_of_another_type(content: Any, message: str, tmp_path: Path) -> None:
    rows = [{**row, "prompt": user(content)} for row in make_rows(8)]
    with pytest.raises(ValueError, match=r"^data\.train_files=") as refusal:
        check(write_parquet(rows, tmp_path / "rows.parquet"))
    assert message in str(refusal.value)
    mixed = jsonl(changed(make_rows(8), prompt=user(content)), tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"^data\.train_files=") as refusal:
        check(mixed)
    assert message.replace("row 0", "row 3 (line 4)") in str(refusal.value)


MALFORMED = [
    [{"role": "user", "content": "2"}],
    [{"role": "assistant", "content": "2"}, {"role": "assistant", "content": "3"}],
    {"text": "2"},
]


@pytest.mark.parametrize("demonstration", MALFORMED, ids=str)
def test_malformed_demonstrations_are_not_missing(demonstration: Any, tmp_path: Path) -> None:
    """Where the student may answer, null and empty demonstrations are rolled out; a wrong form is refused."""
    file = jsonl(changed(make_rows(8), demonstration=demonstration), tmp_path / "rows.jsonl")
    for missing in ("rollout", "error"):
        with pytest.raises(ValueError, match=r"rows\.jsonl: row 3 \(line 4\): .*demonstration is"):
            check(file, missing_demonstration=missing)
    assert check(file, on_policy_fraction=1.0) == 8
    assert check(file, is_train=False) == 8


@pytest.mark.parametrize("demonstration", [None, "", " ", [{"role": "assistant", "content": ""}]], ids=str)
def test_missing_demonstrations(demonstration: Any, tmp_path: Path) -> None:
    rows = changed(make_rows(8), demonstration=demonstration)
    if isinstance(demonstration, list):
        rows = [{**row, "demonstration": chats([row])[0]["demonstration"]} for row in make_rows(8)]
        rows = changed(rows, demonstration=demonstration)
    file = write_parquet(rows, tmp_path / "rows.parquet")
    assert check(file, missing_demonstration="rollout") == 8
    with pytest.raises(ValueError, match=r"row 3: demonstration is (null|empty)"):
        check(file)


def test_a_bad_row_far_into_a_file(tmp_path: Path) -> None:
    """Rows are numbered over the batches in which a file is read."""
    rows = make_rows(10_000)
    rows[9_876]["prompt"] = user(None)
    with pytest.raises(ValueError, match=r"rows\.parquet: row 9876: message 0 of the prompt \(user\)'s content is"):
        check(write_parquet(rows, tmp_path / "rows.parquet"))


def test_remote_files_are_left_to_the_workers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_parquet(make_rows(8), tmp_path / "rows.parquet")
    with caplog.at_level(logging.INFO):
        assert check([str(file), "hdfs://there/rows.parquet", "s3://there/rows.parquet"]) == 8
    assert "remote: hdfs://there/rows.parquet, s3://there/rows.parquet" in caplog.text


def fit(file: Path, needed_rows: int = 8, max_samples: int = -1, **settings: Any) -> None:
    data = data_node(str(file), **settings)
    hpd = HPDConfig.from_config(data.hpd)
    files = check_files("data.train_files", str(file), RowRules.of(data, hpd, is_train=True))
    check_prompts_fit("data.train_files", files, make_tokenizer(WORDS), data, hpd, needed_rows, max_samples)


def test_overlong_prompts(tmp_path: Path) -> None:
    """Prompts of 9 tokens and one of 10; demonstrations of 2 and 6."""
    file = write_parquet(changed(make_rows(9), prompt=user("1 plus 2 ? ?")), tmp_path / "rows.parquet")
    filtered = {"filter_overlong_prompts": True}
    fit(file, max_prompt_length=10, needed_rows=9, **filtered)
    fit(file, max_prompt_length=9, **filtered)
    with pytest.raises(ValueError, match=r"^data\.max_prompt_length=9: 8 of 9 prompts of data\.train_files stay, 9 "):
        fit(file, max_prompt_length=9, needed_rows=9, **filtered)
    with pytest.raises(ValueError, match=r"^data\.max_prompt_length=9: 4 of 5 prompts .* stay, 8 are needed \(the"):
        fit(file, max_prompt_length=9, max_samples=5, **filtered)
    fit(file, max_prompt_length=9)  # unfiltered, one is cut
    with pytest.raises(ValueError, match=r"^data\.max_prompt_length=8: 0 of 9 prompts .* fit, the others would lose"):
        fit(file, max_prompt_length=8)
    fit(file, overlong_demonstration="drop", needed_rows=9)
    with pytest.raises(ValueError, match=r"^data\.max_response_length=5: .*=drop keeps 3 of 9 rows of data\.train_fil"):
        fit(file, overlong_demonstration="drop", max_response_length=5)


def test_a_prompt_that_the_chat_template_refuses(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(WORDS)
    refusal = "{% if messages[0]['content'] == '' %}{{ raise_exception('say something') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    file = write_parquet(changed(make_rows(8), prompt=user("")), tmp_path / "rows.parquet")
    data = data_node(str(file), max_prompt_length=8)
    files = check_files("data.train_files", str(file), RowRules.of(data, HPDConfig(), is_train=True))
    with pytest.raises(ValueError, match=r"row 3: the student's chat template rejects the chat: say something; "):
        check_prompts_fit("data.train_files", files, tokenizer, data, HPDConfig(), 8, -1)


def test_the_files_of_a_whole_run(tiny: Tiny, tmp_path: Path) -> None:
    """Data, models and checkpoints' folder together, in the lean trainer."""

    def check_run(*overrides: str, **settings: Any) -> None:
        folder = f"trainer.default_local_dir={tmp_path / 'checkpoints'}"
        check_sft_run(sft_config(*tiny.sft, folder, *overrides), **settings)

    check_run()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"^data\.train_batch_size=128: data\.train_files has 64 rows, less than"):
        check_run("data.train_batch_size=128")
    check_run("data.train_batch_size=128", fills_store=True)
    with pytest.raises(ValueError, match=r"^data\.train_batch_size=8: .* has 4 rows with data\.train_max_samples=4, "):
        check_run("data.train_max_samples=4")
    with pytest.raises(ValueError, match=r"^data\.val_files=/gone\.parquet: no such file"):
        check_run("data.val_files=/gone.parquet")
    rows = changed(make_rows(8), demonstration=None)
    validation = write_parquet(rows, tmp_path / "validation.parquet")
    with pytest.raises(ValueError, match=r"^data\.val_files=.*validation\.parquet: row 3: demonstration is null"):
        check_run(f"data.val_files={validation}")
    with pytest.raises(ValueError, match=r"^trainer\.default_local_dir=/proc/a: cannot be written"):
        check_run("trainer.default_local_dir=/proc/a", "trainer.save_freq=-1")
    model = Path(shutil.copytree(tiny.student, tmp_path / "student"))
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^model\.path=.*/student: no weights there"):
        check_run(f"model.path={model}")


def test_columns_of_one_name(tmp_path: Path) -> None:
    texts = pa.array(["1"] * 8)
    prompts = pa.array([user("1 ?")] * 8)
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_arrays([prompts, texts, texts], ["prompt", "demonstration", "demonstration"]), file)
    with pytest.raises(ValueError, match=r"rows\.parquet: 2 columns are named 'demonstration'; keep one"):
        check(file)
    twice = '{"prompt": [{"role": "user", "content": "1"}], "demonstration": "1", "demonstration": "2"}'
    with pytest.raises(ValueError, match=r"rows\.jsonl: row 2 \(line 3\): 2 columns are named 'demonstration'"):
        check(jsonl(make_rows(8), tmp_path / "rows.jsonl", line_3=twice))


@pytest.mark.parametrize("value", ["2026-01-31", "2026-01-31 10:00:00"])
def test_dates_in_the_place_of_texts(value: str, tmp_path: Path) -> None:
    """As columns of dates, and as texts that readers of JSON take for dates."""
    wrong = "is a date (2026-01-31"
    for columns, where in (({"demonstration": value}, "demonstration"), ({"prompt": user(value)}, "(user)'s content")):
        file = jsonl([{**row, **columns} for row in make_rows(8)], tmp_path / "rows.jsonl")
        with pytest.raises(ValueError, match=r"^data\.train_files=.*take texts for dates$") as refusal:
            check(file)
        assert f"row 0 (line 1): {'message 0 of the prompt ' if 'prompt' in columns else ''}{where} {wrong}" in str(
            refusal.value
        )
    dates = [{**row, "demonstration": pd.Timestamp(value)} for row in make_rows(8)]
    with pytest.raises(ValueError, match=r"row 0: demonstration is a date \(2026-01-31"):
        check(write_parquet(dates, tmp_path / "rows.parquet"))


@pytest.mark.parametrize("other", [{}, {"extra": [{"a": 1}, 3]}], ids=["one type", "several types"])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_half_a_character(suffix: str, other: dict[str, Any], tmp_path: Path) -> None:
    """Refused by its row; `datasets` leaves it out of a file with a column of several types."""
    rows = [
        {**row, **{key: values[index % 2] for key, values in other.items()}} for index, row in enumerate(make_rows(8))
    ]
    rows = changed(rows, prompt=user("1 \ud83d ?"), demonstration="1 \U0001f600")
    file = tmp_path / f"rows.{suffix}"
    file.write_text("\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    where = "row 3 (line 4)" if suffix == "jsonl" else "row 3"
    with pytest.raises(ValueError, match="lone surrogate: half of a character") as refusal:
        check(file)
    assert f"{file}: {where} holds \\ud83d" in str(refusal.value)
    rows[3]["prompt"] = user("1 \U0001f600 ?")
    file.write_text("\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    assert check(file) == 8


def test_a_template_that_refuses_all_prompts_is_quoted(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(WORDS)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    file = write_parquet(make_rows(8), tmp_path / "rows.parquet")
    data = data_node(str(file), filter_overlong_prompts=True)
    files = check_files("data.train_files", str(file), RowRules.of(data, HPDConfig(), is_train=True))
    with pytest.raises(
        ValueError, match=r"row 0: the student's chat template rejects the chat: System role not suppor"
    ):
        check_prompts_fit("data.train_files", files, tokenizer, data, HPDConfig(), 8, -1)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"demonstration": [{"role": "assistant", "content": "1", "reasoning_content": "2"}]},
            "the student's chat template ignores the demonstration's reasoning_content; rename it",
        ),
        (
            {"demonstration": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]},
            "the student's chat template ignores the demonstration's tool_calls; rename it",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "the student's chat template ignores the row's tools; remove them",
        ),
        (
            {
                "prompt": [
                    *user("1 ?"),
                    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
                ]
            },
            "the prompt's last message is a tool call of the assistant",
        ),
    ],
    ids=["reasoning", "calls", "tools", "begun"],
)
def test_rows_that_the_template_cannot_write_are_found_behind_others(
    suffix: str, columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """One such row behind the first batch's."""
    rows = chats(make_rows(200))
    rows[150] |= columns
    file = tmp_path / f"rows.{suffix}"
    write_parquet(rows, file) if suffix == "parquet" else jsonl(rows, file)
    where = "row 150" if suffix == "parquet" else "row 150 (line 151)"
    with pytest.raises(ValueError, match=r"^data\.train_files=") as refusal:
        fit(file)
    assert f"{file}: {where}: {message}" in str(refusal.value)


OF_NUMBERS = """
from hpd_verl.objectives import objective

@objective("numbered", over="token", returns="loss", needs={"row.weight", "row.is_rollout"})
def numbered(log_probs, context):
    return -log_probs.student_label * context.row["weight"]
"""


def test_numbers_that_objectives_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row has one, of any numeric type; a file without the column is refused by its columns."""
    monkeypatch.setattr(registry, "OBJECTIVES", dict(registry.OBJECTIVES))
    (tmp_path / "numbered.py").write_text(OF_NUMBERS)
    objective = f"{tmp_path}/numbered.py:numbered"

    def weighed(*weights: Any) -> Rows:
        return [{**row, "weight": weights[index % len(weights)]} for index, row in enumerate(make_rows(8))]

    def checked(rows: Rows, is_train: bool = True) -> int:
        total = 0
        for file in (write_parquet(rows, tmp_path / "rows.parquet"), jsonl(rows, tmp_path / "rows.jsonl")):
            data = data_node(str(file))
            rules = RowRules.of(data, HPDConfig(objective=objective), is_train)
            total += sum(each.rows for each in check_files("data.train_files", str(file), rules))
        return total

    for weights in ((0.5, 1.0), (1, 2), (True, False)):
        assert checked(weighed(*weights)) == 16
    assert checked(make_rows(8), is_train=False) == 16
    with pytest.raises(ValueError, match=r"no column 'weight', which an objective needs \(row.weight\), there are "):
        checked(make_rows(8))
    for rows, found in (
        (weighed("heavy"), r"row 0: weight is heavy; an objective needs a finite number there"),
        (changed(weighed(0.5), weight=None), r"row 3: weight is (nan|None); an objective needs a finite number"),
        (changed(weighed(0.5), weight=float("inf")), r"row 3: weight is inf; an objective needs a finite number"),
    ):
        with pytest.raises(ValueError, match=found):
            checked(rows)
