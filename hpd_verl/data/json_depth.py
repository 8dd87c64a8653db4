"""Depth of nested JSON. pyarrow and pandas, which read data files, crash the process if it is too deep."""

import re

DEEPEST = 200
"""Lists and objects within each other in a data file; chats with tool calls have ten."""

_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|([\[{])|([\]}])', re.DOTALL)


def too_deep(file: str, is_array: bool) -> int | None:
    """The first line that is nested deeper than ``DEEPEST``, or None.

    Args:
        file: of JSON.
        is_array: it is one list, over all its lines; else each line is a row of its own.
    """
    depth = 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not is_array and line.count(b"[") + line.count(b"{") <= DEEPEST:
                continue
            depth = depth if is_array else 0
            for token in _TOKEN.finditer(line):
                depth += (token[1] is not None) - (token[2] is not None)
                if depth > DEEPEST:
                    return number
    return None
