r"""Parts of a model's answer: what follows its reasoning, its last code block, its last ``\boxed{}``."""

import re
import textwrap
import unicodedata
from collections.abc import Collection

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n`]*$|(?<=[ \t:])(`{3,})(?:python|py)3?[ \t\r]*$", re.M | re.I)
"""Of a block's begin, which may stand at the end of a line of text, or of its end."""
_BRACE = re.compile(r"\\{1,4}+(boxed|fbox)\s*+\{|\\.|[{}]", re.S)
_BETWEEN = re.compile(
    r"[\s$.]*(?:,|;|\\(?:text|mbox)\{\s*(?:and|or|,)\s*\}|,?\s*\b(?:and|or)\b|[和或及、,])[\s$,]*"
    r"(?:\\(?:quad|qquad|[,;:! ])\s*)*(?:[a-zA-Z](?:_\w)?\s*(?:=|is)\s*)?[\s$]*"
)


def without_reasoning(answer: str) -> str:
    """The text after the last ``</think>``; empty if the reasoning has not ended."""
    _, end, rest = answer.rpartition("</think>")
    if end:
        return rest
    return "" if "<think>" in answer else answer


def code_of(answer: str, names: Collection[str] = ()) -> str:
    """The last fenced code block, or the whole answer if it has none.

    A block that has no end is taken to the answer's end. One that is indented as a whole, as in a list, is not after.

    Args:
        answer: reasoning and all.
        names: of functions, classes or variables; the last block that defines one of them is preferred.
    """
    text, blocks, start, mark = without_reasoning(answer), [], None, ""
    for fence in _FENCE.finditer(text):
        if start is None:
            start, mark = fence.end() + 1, fence[1] or fence[2]
        elif fence[0].strip().rstrip(mark[0]) == "" and len(fence[0].strip()) >= len(mark):
            blocks.append(text[start : fence.start()])
            start = None
    if start is not None:
        blocks.append(text[start:])
    if not blocks:
        return text
    blocks = [textwrap.dedent(block) for block in blocks]
    either = "|".join(map(re.escape, names))
    definition = re.compile(rf"^[ \t]*(?:(?:async +)?def|class) +({either})\b|^({either})[ \t]*=(?!=)", re.M)
    return ([block for block in blocks if names and definition.search(block)] or blocks)[-1]


def boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}``, braces balanced; None without one.

    Boxes that only "and", "or" or a comma parts are one answer, of several items: ``\boxed{3} and \boxed{4}`` holds
    "3, 4". Takes time in proportion to the text.
    """
    last = None
    items: list[str] = []
    for start, inside, end in sorted(_boxes(text), reverse=True):
        if last is None:
            items = [text[inside : end - 1].strip()]
        elif end > last:  # around the one that is taken
            continue
        elif last > end + 80 or _BETWEEN.fullmatch(text, end, last) is None:
            break
        else:
            content = text[inside : end - 1].strip()
            if unicodedata.normalize("NFKC", content) != unicodedata.normalize("NFKC", items[-1]):
                items.append(content)
        last = start
    return ", ".join(reversed(items)) if items else None


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Of each complete box where it begins, where its content does, and its end."""
    found: list[tuple[int, int, int]] = []
    open_braces: list[re.Match[str] | None] = []
    for token in _BRACE.finditer(text):
        if token[1]:
            open_braces.append(token)
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces and (opened := open_braces.pop()) is not None:
            found.append((opened.start(), opened.end(), token.end()))
    return found
