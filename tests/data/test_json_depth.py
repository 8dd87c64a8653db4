"""What is nested too deeply is refused by its line, before a reader that it would end."""

import json
from pathlib import Path

import pytest

from hpd_verl.data.files import RowRules, check_files
from hpd_verl.data.json_depth import DEEPEST, too_deep

GOOD = json.dumps({"prompt": [{"role": "user", "content": "q [[[" * 100}], "demonstration": 'a \\ " {{{ ' * 100})


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("depth", [DEEPEST, DEEPEST + 1, 100_000])
def test_the_first_line_that_is_too_deep(depth: int, tmp_path: Path) -> None:
    """Of rows, and of a list over several lines; brackets in texts do not count."""
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("\n".join([GOOD, GOOD, nested(depth), GOOD]))
    assert too_deep(str(lines), is_array=False) == (3 if depth > DEEPEST else None)
    array.write_text(f"[\n{GOOD},\n" + "\n".join(nested(depth - 1).replace(":", ":\n").split("\n")) + "]")
    found = too_deep(str(array), is_array=True)
    assert (found is not None) == (depth > DEEPEST)


def test_a_file_that_ends_its_reader_is_refused(tmp_path: Path) -> None:
    rules = RowRules("prompt", (), reads_demonstrations=True, needs_demonstrations=True)
    deep = "[" * 100_000 + "]" * 100_000
    for name, text in {
        "rows.jsonl": f'{GOOD}\n{{"prompt": [], "demonstration": {deep}}}\n',
        "rows.json": f"[{GOOD},\n{deep}]",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"^data\.train_files=.*{name}: line 2 is nested more than 200 deep"):
            check_files("data.train_files", [str(tmp_path / name)], rules)
