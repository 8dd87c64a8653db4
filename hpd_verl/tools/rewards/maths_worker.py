"""Compares maths answers in a separate process, one line of JSON in, one out; ``maths.py`` ends it if it hangs.

A signal as time limit neither works in a thread nor ends a product of huge numbers.
"""

import json
import os
import resource
import signal
import sys
from fractions import Fraction
from pathlib import Path

MEMORY = 1 << 32  # bytes of address space
ALARM = 60  # seconds after which a worker ends by itself, should whoever asked it have been killed meanwhile


def main() -> None:
    """Serve until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # Output of sympy and its parsers is not part of the protocol.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # This folder holds a module with a standard library name; the package is found as by the calling process.
    sys.path[0] = str(Path(__file__).parents[3])
    sys.set_int_max_str_digits(0)  # numbers are compared exactly, and in bounded time
    import latex2sympy2_extended  # noqa: F401
    import math_verify  # noqa: F401 (before the first question, whose time does not count this)

    from hpd_verl.tools.rewards.maths_equal import equal

    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        signal.alarm(ALARM)
        try:
            truth, answer, in_box, tolerance = json.loads(line)
            found = equal(truth, answer, in_box, Fraction(tolerance))
        # The parsers raise errors of every kind on odd LaTeX; such an answer is not equal.
        except Exception:
            found = False
        signal.alarm(0)
        replies.write(f"{json.dumps(found)}\n")
        replies.flush()


if __name__ == "__main__":
    main()
