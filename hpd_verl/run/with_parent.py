"""Processes that end with the process that started them, however that ends.

    python -m hpd_verl.run.with_parent COMMAND ...

runs a command, and kills it with all that it has started when this program's standard input is closed, or this program
is killed, as Ray kills the children of its actors.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading


def end_with_parent() -> None:
    """Let Linux kill this process when its parent ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main(command: list[str]) -> int:
    """Run a command in a process group of its own until it ends, or standard input does; its exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_parent)

    # Kills the group when the other end of its standard input is closed, with this process.
    end, own = os.pipe()
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", f"import os; os.read(0, 1); os.killpg({child.pid}, {signal.SIGKILL:d})"],
        stdin=end,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(end)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    def wait_for_parent() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock the interpreter's end would wait for
            pass
        kill()

    threading.Thread(target=wait_for_parent, daemon=True).start()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # its id stays its own until its group is killed, too
    kill()
    guard.kill()
    guard.wait()
    os.close(own)
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
