"""docs/troubleshooting.md quotes messages that the code has."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTES = [
    quote
    for bold in re.findall(r"^\*\*`.*?`\*\*[^:\n]*:", PAGE, re.MULTILINE)
    for quote in re.findall(r"`(.+?)`", bold)
]


def texts() -> list[str]:
    """All texts of the package, joined ones whole, with what is filled in left out."""
    found = []
    for file in (ROOT / "hpd_verl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_there_are_quotes() -> None:
    assert len(QUOTES) > 15


@pytest.mark.parametrize("quote", QUOTES)
def test_the_code_says_so(quote: str) -> None:
    assert any(quote in text for text in texts()), quote
