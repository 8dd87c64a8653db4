"""Compares maths answers in a process of its own, a line of JSON for a line of JSON: ``maths.py`` ends it if it hangs.

math-verify's own time limit is a signal: it neither works in a thread nor ends a product of huge numbers.
"""

import json
import os
import resource
import signal
import sys

MEMORY = 1 << 32  # bytes of address space
ALARM = 60  # seconds after which a worker ends by itself, should whoever asked it have been killed meanwhile


def equal(ground_truth: str, answer: str) -> bool:
    """Whether math-verify finds the answer, LaTeX or plain, equal to the ground truth."""
    from math_verify import parse, verify

    wanted = parse(f"\\boxed{{{ground_truth}}}", parsing_timeout=None)
    given = parse(answer, parsing_timeout=None)
    return bool(wanted) and bool(given) and verify(wanted, given, timeout_seconds=None)


def main() -> None:
    """Serve until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # What sympy and its parsers print is not the protocol.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import math_verify  # noqa: F401 (before the first question, whose time does not count this)

    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        signal.alarm(ALARM)
        try:
            found = equal(*json.loads(line))
        # What the parsers raise on odd LaTeX is of every kind; none of it is an equal answer.
        except Exception:
            found = False
        signal.alarm(0)
        replies.write(f"{json.dumps(found)}\n")
        replies.flush()


if __name__ == "__main__":
    main()
