r"""Parts of a model's answer: what follows its reasoning, its last code block, its last ``\boxed{}``."""

import re
import textwrap
from collections.abc import Collection

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n`]*$|(?<=[ \t:])(`{3,})(?:python|py)3?[ \t\r]*$", re.M | re.I)
"""Of a block's begin, which may stand at the end of a line of text, or of its end."""
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


def without_reasoning(answer: str) -> str:
    """What follows the last ``</think>``; nothing if the reasoning has not ended."""
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
    r"""What the last complete ``\boxed{...}`` holds, braces balanced; None without one."""
    for start in reversed(list(_BOXED.finditer(text))):
        depth, position = 1, start.end()
        for position in range(start.end(), len(text)):
            escaped = text[position - 1] == "\\" and text[position - 2] != "\\"
            depth += 0 if escaped else (text[position] == "{") - (text[position] == "}")
            if depth == 0:
                return text[start.end() : position].strip()
    return None
