"""Untrusted programs run in a sandbox: ``check`` a candidate against tests, or ``run`` a program.

The sandbox is bubblewrap (Debian's package of that name). A program sees Python's own files and numpy, read-only, an
empty ``/tmp`` and ``/dev/shm`` in memory, and nothing else: no network, no other process, no environment, no ``/proc``.
It has limits and a system-call filter, and its children are killed with it. ``guest.py`` runs inside; ``confine.py`` is
the filter.
"""

import contextlib
import errno
import fcntl
import functools
import importlib.util
import io
import json
import marshal
import math
import os
import random
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

_INSIDE = ("plain", "exchange", "comparing", "confine", "guest")
"""Modules that run in the sandbox, each after those that it imports."""
_BOOT = """
import json, marshal, sys, types
settings = json.loads(sys.argv[1])
with open(settings["given"], "rb") as file:
    given = marshal.load(file)
for name, code in given.pop("modules"):
    sys.modules[name] = types.ModuleType(name)
    exec(code, sys.modules[name].__dict__)
sys.modules["hpd_verl.tools.rewards.guest"].main(settings, given)
"""
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
_INODE_BYTES = 1024  # of the kernel's memory for a file without content

Status = Literal["passed", "failed", "timeout", "memory", "output"]


class SandboxError(RuntimeError):
    """No program has run: the sandbox does not work here, or the tests are no program."""


@dataclass(frozen=True)
class Limits:
    """Limits of a program. Beyond them the program is ended or the system call fails."""

    seconds: float = 10.0
    """Wall-clock time of candidate and tests together."""
    memory: int = 1 << 30
    """Bytes of address space of each process, and bytes in memory of all of them and their files together."""
    file_size: int = 1 << 24
    """Bytes of a file and of all of /dev/shm; four times that is all of /tmp."""
    processes: int = 32
    """Processes and threads."""
    output: int = 1 << 20
    """Bytes of standard output and error of ``run``, together."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < 1 << 50:
                raise ValueError(f"Limits.{name}={value}: expected a number above 0")


@dataclass(frozen=True)
class Outcome:
    """Result of a program."""

    status: Status
    """``passed``: all tests of ``check`` passed, or the program of ``run`` ended with exit status 0. Otherwise
    ``failed``, or the limit that it met."""
    message: str = ""
    """Why, in a line."""
    output: str = ""
    """Standard output of ``run``."""
    seconds: float = field(default=0.0, compare=False)
    """Run time in seconds."""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def check(candidate: str, tests: str, *, helper: str = "", function: str = "", limits: Limits | None = None) -> Outcome:
    """Whether a candidate, a Python module, passes tests: statements that use its names and raise if it is wrong.

    Args:
        candidate: the module.
        tests: the statements.
        helper: what tests use of their own, imports and functions: the tests get a copy that no candidate has touched.
        function: the name asked for; needed where Python has one of that name (``sum``) and the tests call others too.
        limits: of all processes.

    Raises:
        SandboxError: the sandbox does not work here, or the tests are no Python program.
    """
    limits = limits or Limits()
    with contextlib.ExitStack() as stack:
        requests, replies, report = (stack.enter_context(_pipe()) for _ in range(3))
        told = stack.enter_context(_file(b""))
        processes = []
        own = {"helper": helper, "function": function}
        for role, given, ends in (
            ("candidate", {"text": candidate}, {"requests": requests.read, "replies": replies.write}),
            (
                "tests",
                {"text": tests, **own},
                {"requests": requests.write, "replies": replies.read, "report": report.write},
            ),
        ):
            processes.append(stack.enter_context(_started(role, given, limits, ends, told)))
        for end in (*requests, *replies, report.write):
            end.close()
        collected, over, seconds = _collect({"report": report.read}, processes, limits)
        if over in ("timeout", "memory"):
            return Outcome(over, _MET[over], seconds=seconds)
        why = os.pread(told, 2000, 0).decode(errors="replace").strip().rpartition("\n")[2]
    started, _, said = collected["report"].decode(errors="replace").partition("\n")
    if not started:
        raise SandboxError(_unusable(why))
    # The tests' process reports whatever the candidate does, unless its own tests end it.
    verdict = json.loads(said) if said else {"status": "failed", "message": "the tests end their own process"}
    if verdict["status"] == "bad_tests":
        raise SandboxError(f"tests={tests[:60]!r}: {verdict['message']}; correct the ground truth")
    if verdict["status"] == "not_started":
        raise SandboxError(_unusable(why))
    return Outcome("passed" if verdict["status"] == "passed" else "failed", verdict["message"], seconds=seconds)


def run(program: str, *, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run a Python program as a script. Success does not mean that it is right: compare its output.

    Raises:
        SandboxError: the sandbox does not work here.
    """
    limits = limits or Limits()
    with contextlib.ExitStack() as stack:
        report, output, errors = (stack.enter_context(_pipe()) for _ in range(3))
        input_ = stack.enter_context(_file(stdin.encode(errors="replace")))
        ends, given = {"report": report.write}, {"text": program}
        process = stack.enter_context(
            _started("program", given, limits, ends, errors.write, stdin=input_, stdout=output.write)
        )
        for pipe in (report, output, errors):
            pipe.write.close()
        read = {"report": report.read, "out": output.read, "err": errors.read}
        # It may have closed all of them and still run.
        collected, over, seconds = _collect(read, [process], limits, until_end=True)
        code = process.poll()
    lines = collected["err"].decode(errors="replace").strip()
    last, text = lines.rpartition("\n")[2][-300:], collected["out"].decode(errors="replace")
    if over is not None:
        return Outcome(over, _MET[over], text, seconds)
    if not collected["report"]:
        raise SandboxError(_unusable(last))
    if code == 0:
        return Outcome("passed", "", text, seconds)
    return Outcome("failed", last or f"exit status {code}", text, seconds)


_MET: dict[Status, str] = {
    "timeout": "it ran past its time",
    "memory": "its processes took more memory than allowed",
    "output": "it wrote more than allowed",
}


class _Pipe(NamedTuple):
    read: io.FileIO
    write: io.FileIO


@contextlib.contextmanager
def _pipe() -> Iterator[_Pipe]:
    """Two ends; one that is closed earlier is closed once."""
    read, write = map(_raised, os.pipe())
    with io.FileIO(read, "r") as reader, io.FileIO(write, "w") as writer:
        yield _Pipe(reader, writer)


def _raised(descriptor: int) -> int:
    """A descriptor above the standard ones, which a caller may have closed and a child has for itself."""
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[int]:
    """A descriptor of a nameless file with this content, at its start."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        descriptor = _raised(os.dup(file.fileno()))
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _user(first: int | None) -> Iterator[int | None]:
    """The number of a user that no other sandbox of this machine has; None where ``first`` is.

    Processes are counted by user. An abstract socket's name is held as long as this sandbox runs, whatever happens to
    this process.
    """
    if first is None:
        yield None
        return
    start = random.SystemRandom().randrange(_USERS)
    for number in (first + (start + step) % _USERS for step in range(_USERS)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as held:
            try:
                held.bind(f"\0hpd-verl-sandbox-user-{number}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            yield number
            return
    raise SandboxError(_unusable(f"all of {_USERS} users have a sandbox running"))


_PACKAGES = ("hpd_verl", "hpd_verl.tools", "hpd_verl.tools.rewards")


@functools.cache
def _modules() -> list[tuple[str, Any]]:
    """Names and code of what runs inside."""
    names = {name: f"hpd_verl.tools.rewards.{name}" for name in _INSIDE}
    texts = {full: Path(__file__).with_name(f"{name}.py").read_text() for name, full in names.items()}
    packages = [(name, compile("__path__ = []", name, "exec")) for name in _PACKAGES]
    return packages + [(full, compile(text, full, "exec")) for full, text in texts.items()]


@contextlib.contextmanager
def _started(
    role: str,
    given: dict[str, str],
    limits: Limits,
    ends: dict[str, io.FileIO],
    errors: Any,
    stdin: Any = subprocess.DEVNULL,
    stdout: Any = subprocess.DEVNULL,
) -> "Iterator[subprocess.Popen[bytes]]":
    """A process of ``guest.py`` in its sandbox; at the end it is killed with all that it started."""
    way = _isolation()
    # Text may hold halves of characters, which a program's file could not.
    texts = {name: text.encode(errors="replace").decode() for name, text in given.items()}
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(_file(marshal.dumps({"modules": _modules(), **texts})))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        descriptors = {name: end.fileno() for name, end in ends.items()}
        settings = {
            "role": role,
            "given": program,
            "packages": way.packages,
            "user": stack.enter_context(_user(way.first_user)),
            "limits": _resource_limits(limits),
            "writable": None if way.sandboxed else folder,
            "hidden": way.hidden,
            **descriptors,
        }
        sizes = {"{tmp}": str(4 * limits.file_size), "{shm}": str(limits.file_size)}
        interpreter = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", _BOOT, json.dumps(settings)]
        process = subprocess.Popen(
            [*(sizes.get(word, word) for word in way.words), *interpreter],
            cwd=folder,
            env=ENVIRONMENT if way.sandboxed else {**ENVIRONMENT, "HOME": folder, "TMPDIR": folder},
            stdin=stdin,
            stdout=stdout,
            # The candidate's output is ignored; bubblewrap's tells why it does not start.
            stderr=errors,
            pass_fds=(program, *descriptors.values()),
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
        # Kernel memory of a process: pinned pages, timers and signals, queues.
        "RLIMIT_MEMLOCK": 1 << 16,
        "RLIMIT_SIGPENDING": 1024,
        "RLIMIT_MSGQUEUE": 0,
    }


def _collect(
    ends: dict[str, io.FileIO], processes: "list[subprocess.Popen[bytes]]", limits: Limits, until_end: bool = False
) -> tuple[dict[str, bytes], Status | None, float]:
    """What comes from these until all are closed, or until a limit is met; which one; and how long it took.

    Time counts from the first word of ``report``, because a busy machine is not the program's fault.

    Args:
        ends: of pipes.
        processes: whose memory is looked at.
        limits: which are met.
        until_end: wait for the processes too.
    """
    start = time.monotonic()
    deadline, started = start + START_SECONDS, False
    collected = {name: bytearray() for name in ends}
    with selectors.DefaultSelector() as selector:
        for name, end in ends.items():
            selector.register(end.fileno(), selectors.EVENT_READ, name)
        next_look = start + _TICK
        over: Status | None = None
        while over is None:
            now = time.monotonic()
            if not started and collected["report"]:
                start, deadline, started = now, now + limits.seconds, True
            if not selector.get_map() and not (until_end and any(each.poll() is None for each in processes)):
                break
            if now >= deadline and not started:
                raise SandboxError(_unusable(f"it has not started within {START_SECONDS:g} seconds"))
            if now >= deadline:
                over = "timeout"
            elif now >= next_look:
                over = "memory" if _in_memory(processes, limits.memory) > limits.memory else None
                next_look = time.monotonic() + _TICK
            if not selector.get_map():
                time.sleep(0.005)
                continue
            for key, _ in selector.select(max(0.0, min(deadline, next_look) - now)):
                part = os.read(key.fd, 1 << 16)
                collected[key.data] += part
                if not part:
                    selector.unregister(key.fd)
            if sum(map(len, collected.values())) > limits.output:
                over = "output"
    return {name: bytes(part) for name, part in collected.items()}, over, time.monotonic() - start


def _in_memory(processes: "list[subprocess.Popen[bytes]]", limit: int) -> int:
    """Bytes in memory of these, all that descends from them and the files in their ``/tmp`` and ``/dev/shm``.

    What ends meanwhile counts nothing. What processes share is counted once, which takes long to find out, where the
    sum is above the limit.
    """
    waiting, found, pages, files, seen = [process.pid for process in processes], [], 0, 0, {None, _device("/tmp")}
    while waiting:
        # Without CONFIG_PROC_CHILDREN in the kernel the limit of each process remains.
        with contextlib.suppress(OSError, IndexError, ValueError):
            found.append(Path("/proc", str(waiting.pop())))
            pages += int((found[-1] / "statm").read_text().split()[1])
            for children in found[-1].glob("task/*/children"):
                waiting += map(int, children.read_text().split())
            for folder in (found[-1] / "root/tmp", found[-1] / "root/dev/shm"):
                if (device := _device(str(folder))) not in seen:
                    seen.add(device)
                    about = os.statvfs(folder)
                    files += (about.f_blocks - about.f_bfree) * about.f_frsize
                    files += (about.f_files - about.f_ffree) * _INODE_BYTES
    resident = pages * os.sysconf("SC_PAGE_SIZE")
    return files + (resident if resident + files <= limit else sum(map(_proportional, found)))


def _proportional(process: Path) -> int:
    """Bytes in memory of a process, its part of what it shares; 0 if it has ended."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        try:
            lines = (process / "smaps_rollup").read_text().splitlines()
            return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except PermissionError:
            return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _device(folder: str) -> int | None:
    """The device of a folder; None if it does not exist or is closed to this user."""
    with contextlib.suppress(OSError):
        return os.stat(folder).st_dev
    return None


class _Way(NamedTuple):
    """How programs are isolated."""

    words: list[str]
    """Prefix of a command."""
    packages: str
    """The folder of numpy in there."""
    first_user: int | None
    """The first of the users to become, if root."""
    sandboxed: bool
    """By bubblewrap."""
    hidden: bool
    """By namespaces of this user's own: no other process can be looked into."""


@functools.cache
def _isolation() -> _Way:
    """How programs are isolated here.

    Raises:
        SandboxError: bubblewrap does not work, and ``HPD_UNSANDBOXED`` is not set.
    """
    spec = importlib.util.find_spec("numpy")
    numpy = Path(next(iter(spec.submodule_search_locations or ("",)))) if spec is not None else None
    why = _bubblewrap_fails(words := _bubblewrap(numpy))
    if why is None:
        return _Way(words, "/packages", _FIRST_USER if os.getuid() == 0 else None, True, True)
    if os.environ.get(UNSANDBOXED) != "1":
        raise SandboxError(_unusable(why))
    words = _namespaces()
    return _Way(words, str(numpy.parent) if numpy is not None else "", None, False, "--user" in words)


_FIRST_USER, _USERS = 61184, 4096  # numbers that belong to nobody, so that processes are counted run by run


def _bubblewrap(numpy: Path | None) -> list[str]:
    """bubblewrap and its flags, up to the command; ``{tmp}`` and ``{shm}`` stand for sizes."""
    words = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session", "--unshare-ipc", "--unshare-pid"]
    words += ["--unshare-net", "--unshare-uts", "--unshare-cgroup-try", "--cap-drop", "ALL"]
    if os.getuid() == 0:
        # Root's processes are not counted by RLIMIT_NPROC, and another user could not mount what only root may read.
        words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        words += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    stdlib, base = Path(sysconfig.get_path("stdlib")), Path(sys.base_prefix)
    read_only = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    read_only += [str(base / "lib"), str(stdlib), os.path.realpath(sys.executable)]
    # The folders that bubblewrap makes by itself are closed to other users.
    parents = {parent for path in (*read_only, "/dev/shm/x", "/packages/numpy") for parent in Path(path).parents}
    for folder in sorted(parents - {Path("/")}):
        words += ["--perms", "0755", "--dir", str(folder)]
    for path in dict.fromkeys(read_only):
        words += ["--ro-bind-try", path, path]
    for packages in (stdlib / "site-packages", Path("/usr/lib/python3/dist-packages")):
        if packages.is_dir():
            words += ["--tmpfs", str(packages)]
    for package in (numpy, numpy.with_name("numpy.libs")) if numpy is not None else ():
        words += ["--ro-bind-try", str(package), f"/packages/{package.name}"]
    time_zones = importlib.util.find_spec("tzdata")
    if time_zones is not None and time_zones.submodule_search_locations:
        words += ["--ro-bind-try", time_zones.submodule_search_locations[0], "/packages/tzdata"]
    words += ["--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"]
    # The last one is of the root alone: /tmp stays writable.
    words += ["--perms", "1777", "--size", "{shm}", "--tmpfs", "/dev/shm"]
    words += ["--perms", "1777", "--size", "{tmp}", "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    return words


def _bubblewrap_fails(prefix: list[str]) -> str | None:
    """Why bubblewrap with these flags does not run Python; None if it does."""
    words = [{"{tmp}": "65536", "{shm}": "65536"}.get(word, word) for word in prefix]
    if not os.path.isabs(words[0]):
        return "the command bwrap is not found"
    command = [*words, os.path.realpath(sys.executable), "-I", "-S", "-c", "import json, sys; sys.exit(7)"]
    try:
        found = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it does not run Python: {type(error).__name__}"
    return None if found.returncode == 7 else found.stderr.strip().rpartition("\n")[2] or "it does not run Python"


def _namespaces() -> list[str]:
    """``unshare`` without network and with its own processes, if it works; else nothing."""
    own_user = [] if os.getuid() == 0 else ["--user", "--map-current-user"]
    words = [shutil.which("unshare") or "", *own_user, "--net", "--pid", "--fork", "--kill-child=SIGKILL"]
    try:
        command = [*words, os.path.realpath(sys.executable), "-I", "-S", "-c", ""]
        works = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    return words if works else []


def _unusable(why: str) -> str:
    why = " ".join(why.split())[:300] or "it does not start"
    if os.environ.get(UNSANDBOXED) == "1":
        return f"{UNSANDBOXED}=1: {why}; run programs on a machine where bubblewrap works"
    return (
        f"bubblewrap: {why}; install Debian's package bubblewrap where user namespaces are allowed, or set "
        f"{UNSANDBOXED}=1 to run programs that nobody has read with nothing but limits around them"
    )
