"""Programs that nobody has read run in a sandbox: ``check`` a candidate against tests, or ``run`` a program.

The sandbox is bubblewrap (Debian's package of that name). A program sees Python's own files and numpy, read-only, an
empty ``/tmp`` in memory, and nothing else: no network, no other process, no environment, no ``/proc``. It has limits,
and what it started is killed with it. ``guest.py`` is the part that runs inside.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

GUEST = Path(__file__).with_name("guest.py").read_text()
UNSANDBOXED = "HPD_UNSANDBOXED"
"""Environment variable: 1 lets programs run without bubblewrap."""
ENVIRONMENT = {
    "HOME": "/tmp",
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""All that a program sees of an environment."""

START_SECONDS = 60.0
"""Until the sandbox is there."""

_TICK = 0.1  # seconds between two looks at the memory of all processes
_runs = itertools.count()

Status = Literal["passed", "failed", "timeout", "memory", "output"]


class SandboxError(RuntimeError):
    """No program has run: the sandbox does not work here, or the tests are no program."""


@dataclass(frozen=True)
class Limits:
    """What a program may take. Beyond it, the program is ended or the system call fails."""

    seconds: float = 10.0
    """Wall-clock time of candidate and tests together."""
    memory: int = 1 << 30
    """Bytes of address space of each process, and resident bytes of all of them together."""
    file_size: int = 1 << 24
    """Bytes of a file; four times that is all of /tmp."""
    processes: int = 16
    """Processes and threads."""
    output: int = 1 << 20
    """Bytes of standard output and error of ``run``, together."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < 1 << 50:
                raise ValueError(f"Limits.{name}={value}: expected a number above 0")


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    status: Status
    """``passed``: all tests of ``check`` passed, or the program of ``run`` ended with exit status 0. Otherwise
    ``failed``, or the limit that it met."""
    message: str = ""
    """Why, in a line."""
    output: str = ""
    """Standard output of ``run``."""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def check(candidate: str, tests: str, *, limits: Limits | None = None) -> Outcome:
    """Whether a candidate, a Python module, passes tests: statements that use its names and raise where it is wrong.

    Raises:
        SandboxError: the sandbox does not work here, or the tests are no Python program.
    """
    limits = limits or Limits()
    with contextlib.ExitStack() as stack:
        requests, replies, report = (stack.enter_context(_pipe()) for _ in range(3))
        told = stack.enter_context(tempfile.TemporaryFile())
        processes = []
        for role, text, ends in (
            ("candidate", candidate, {"requests": requests.read, "replies": replies.write}),
            ("tests", tests, {"requests": requests.write, "replies": replies.read, "report": report.write}),
        ):
            processes.append(stack.enter_context(_started(role, text, limits, ends, told)))
        for pipe in (requests, replies):
            pipe.close()
        os.close(report.write.detach())
        collected, over = _collect({"report": report.read}, processes, limits)
        if over in ("timeout", "memory"):
            return Outcome(over, _MET[over])
        told.seek(0)
        why = told.read(2000).decode(errors="replace").strip().rpartition("\n")[2]
    started, _, said = collected["report"].decode(errors="replace").partition("\n")
    if not started:
        raise SandboxError(_unusable(why))
    # The tests' process reports whatever the candidate does, unless its own tests end it.
    verdict = json.loads(said) if said else {"status": "failed", "message": "the tests end their own process"}
    if verdict["status"] == "bad_tests":
        raise SandboxError(f"tests={tests[:60]!r}: {verdict['message']}; correct the ground truth")
    if verdict["status"] == "not_started":
        raise SandboxError(_unusable(why))
    return Outcome("passed" if verdict["status"] == "passed" else "failed", verdict["message"])


def run(program: str, *, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run a Python program as a script. That it ended well says nothing of what it did: compare its output.

    Raises:
        SandboxError: the sandbox does not work here.
    """
    limits = limits or Limits()
    with contextlib.ExitStack() as stack:
        report, output, errors = (stack.enter_context(_pipe()) for _ in range(3))
        given = stack.enter_context(_file(stdin))
        process = stack.enter_context(
            _started("program", program, limits, {"report": report.write}, errors.write, given, output.write)
        )
        for pipe in (report, output, errors):
            os.close(pipe.write.detach())
        ends = {"report": report.read, "out": output.read, "err": errors.read}
        collected, over = _collect(ends, [process], limits)
        code = process.wait(timeout=5) if over is None else None
    lines = collected["err"].decode(errors="replace").strip()
    last, text = lines.rpartition("\n")[2][-300:], collected["out"].decode(errors="replace")
    if over is not None:
        return Outcome(over, _MET[over], text)
    if not collected["report"]:
        raise SandboxError(_unusable(last))
    return Outcome("passed", "", text) if code == 0 else Outcome("failed", last or f"exit status {code}", text)


_MET: dict[Status, str] = {
    "timeout": "it ran past its time",
    "memory": "its processes took more memory than allowed",
    "output": "it wrote more than allowed",
}


class _End:
    """One end of a pipe, closed once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def fileno(self) -> int:
        assert self._descriptor is not None
        return self._descriptor

    def detach(self) -> int:
        descriptor = self.fileno()
        self._descriptor = None
        return descriptor

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self.detach())


class _Pipe:
    def __init__(self) -> None:
        self.read, self.write = map(_End, os.pipe())

    def close(self) -> None:
        self.read.close()
        self.write.close()


def _pipe() -> contextlib.closing[_Pipe]:
    return contextlib.closing(_Pipe())


@contextlib.contextmanager
def _file(text: str) -> Iterator[IO[bytes]]:
    """A nameless file with this text, at its start."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode(errors="replace"))
        file.seek(0)
        yield file


@contextlib.contextmanager
def _started(
    role: str,
    text: str,
    limits: Limits,
    ends: dict[str, _End],
    errors: Any,
    stdin: Any = subprocess.DEVNULL,
    stdout: Any = subprocess.DEVNULL,
) -> "Iterator[subprocess.Popen[bytes]]":
    """A process of ``guest.py`` in its sandbox; at the end it is killed with all that it started."""
    prefix, packages, user = _isolation()
    with _file(text) as program, tempfile.TemporaryDirectory() as folder:
        descriptors = {name: end.fileno() for name, end in ends.items()}
        settings = {
            "role": role,
            "text": program.fileno(),
            "packages": packages,
            "user": None if user is None else user + (64 * os.getpid() + next(_runs)) % 4096,
            "limits": _resource_limits(limits),
            **descriptors,
        }
        sized = [word.replace("{tmp}", str(4 * limits.file_size)) for word in prefix]
        interpreter = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", GUEST, json.dumps(settings)]
        process = subprocess.Popen(
            [*sized, *interpreter],
            cwd=folder,
            env=ENVIRONMENT,
            stdin=stdin,
            stdout=stdout,
            # What the candidate writes is nobody's; what bubblewrap writes says why it does not start.
            stderr=errors,
            pass_fds=(program.fileno(), *descriptors.values()),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            # The group of a process that has not been waited for is still its own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _resource_limits(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_AS": limits.memory,
        "RLIMIT_FSIZE": limits.file_size,
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_CPU": math.ceil(limits.seconds) + 1,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }


def _collect(
    ends: dict[str, _End], processes: "list[subprocess.Popen[bytes]]", limits: Limits
) -> tuple[dict[str, bytes], Status | None]:
    """What comes from these until all are closed, or until a limit is met, and which.

    Time counts from the first word of ``report``: a machine that is busy is no fault of a program's.
    """
    deadline, started = time.monotonic() + START_SECONDS, False
    collected = {name: bytearray() for name in ends}
    with selectors.DefaultSelector() as selector:
        for name, end in ends.items():
            selector.register(end.fileno(), selectors.EVENT_READ, name)
        next_look = time.monotonic() + _TICK
        over: Status | None = None
        while selector.get_map() and over is None:
            now = time.monotonic()
            if not started and collected["report"]:
                deadline, started = now + limits.seconds, True
            if now >= deadline and not started:
                raise SandboxError(_unusable(f"it has not started within {START_SECONDS:g} seconds"))
            if now >= deadline:
                over = "timeout"
            elif now >= next_look:
                over = "memory" if _resident(processes) > limits.memory else None
                next_look = time.monotonic() + _TICK
            for key, _ in selector.select(max(0.0, min(deadline, next_look) - now)):
                part = os.read(key.fd, 1 << 16)
                collected[key.data] += part
                if not part:
                    selector.unregister(key.fd)
            if sum(map(len, collected.values())) > limits.output:
                over = "output"
    return {name: bytes(part) for name, part in collected.items()}, over


def _resident(processes: "list[subprocess.Popen[bytes]]") -> int:
    """Bytes in memory of these and all that descends from them; 0 of what ends meanwhile."""
    waiting, pages = [process.pid for process in processes], 0
    while waiting:
        # Without CONFIG_PROC_CHILDREN in the kernel the limit of each process remains.
        with contextlib.suppress(OSError, IndexError, ValueError):
            folder = Path("/proc", str(waiting.pop()))
            pages += int((folder / "statm").read_text().split()[1])
            for children in folder.glob("task/*/children"):
                waiting += map(int, children.read_text().split())
    return pages * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _isolation() -> tuple[list[str], str, int | None]:
    """What stands before a command, the folder of numpy in there, and the first of the users to become, if root.

    Raises:
        SandboxError: bubblewrap does not work, and ``HPD_UNSANDBOXED`` is not set.
    """
    spec = importlib.util.find_spec("numpy")
    numpy = Path(next(iter(spec.submodule_search_locations or ("",)))) if spec is not None else None
    why = _bubblewrap_fails(prefix := _bubblewrap(numpy))
    if why is None:
        return prefix, "/packages", _FIRST_USER if os.getuid() == 0 else None
    if os.environ.get(UNSANDBOXED) != "1":
        raise SandboxError(_unusable(why))
    return _namespaces(), str(numpy.parent) if numpy is not None else "", None


_FIRST_USER = 61184  # and 4095 more: numbers that belong to nobody, so that processes are counted run by run


def _bubblewrap(numpy: Path | None) -> list[str]:
    """bubblewrap and its flags, up to the command; ``{tmp}`` stands for the size of /tmp."""
    words = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session", "--unshare-ipc", "--unshare-pid"]
    words += ["--unshare-net", "--unshare-uts", "--unshare-cgroup-try", "--cap-drop", "ALL"]
    if os.getuid() == 0:
        # Root's processes are not counted by RLIMIT_NPROC, and another user could not mount what only root may read.
        words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        words += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    stdlib, base = Path(sysconfig.get_path("stdlib")), Path(sys.base_prefix)
    read_only = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    read_only += [str(base / "lib"), str(stdlib), os.path.realpath(sys.executable)]
    # The folders that bubblewrap makes by itself are closed to other users.
    parents = {parent for path in (*read_only, "/dev/null", "/packages/numpy") for parent in Path(path).parents}
    for folder in sorted(parents - {Path("/")}):
        words += ["--perms", "0755", "--dir", str(folder)]
    for path in dict.fromkeys(read_only):
        words += ["--ro-bind-try", path, path]
    for packages in (stdlib / "site-packages", Path("/usr/lib/python3/dist-packages")):
        if packages.is_dir():
            words += ["--tmpfs", str(packages)]
    for package in (numpy, numpy.with_name("numpy.libs")) if numpy is not None else ():
        words += ["--ro-bind-try", str(package), f"/packages/{package.name}"]
    words += ["--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"]
    # The last one is of the root alone: /tmp stays writable.
    words += ["--perms", "1777", "--size", "{tmp}", "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    return words


def _bubblewrap_fails(prefix: list[str]) -> str | None:
    """Why bubblewrap with these flags does not run Python; None if it does."""
    words = [word.replace("{tmp}", "65536") for word in prefix]
    if not os.path.isabs(words[0]):
        return "the command bwrap is not found"
    command = [*words, os.path.realpath(sys.executable), "-I", "-S", "-c", "import json, sys; sys.exit(7)"]
    try:
        found = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if found.returncode == 7 else found.stderr.strip().rpartition("\n")[2] or "it does not run Python"


def _namespaces() -> list[str]:
    """``unshare`` without network and with processes of its own, where it works; nothing otherwise."""
    own_user = [] if os.getuid() == 0 else ["--user", "--map-current-user"]
    words = [shutil.which("unshare") or "", *own_user, "--net", "--pid", "--fork", "--kill-child=SIGKILL"]
    try:
        command = [*words, os.path.realpath(sys.executable), "-I", "-S", "-c", ""]
        works = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    return words if works else []


def _unusable(why: str) -> str:
    return (
        f"bubblewrap: {why or 'it does not start'}; install Debian's package bubblewrap where user namespaces are "
        f"allowed, or set {UNSANDBOXED}=1 to run programs that nobody has read with nothing but limits around them"
    )
