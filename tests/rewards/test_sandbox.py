"""The sandbox: hostile programs are contained and fail, honest ones pass, and nothing runs without it unasked."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import pytest
from honest import HONEST

from hpd_verl.rewards import guest
from hpd_verl.rewards.code import compute_score
from hpd_verl.rewards.sandbox import Limits, Outcome, SandboxError, check, run

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(seconds=1.5, memory=1 << 28, file_size=1 << 20)
needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs Debian's package bubblewrap")


class Host:
    """What a hostile program would harm: a file, a server, this process and its environment."""

    def __init__(self, folder: Path) -> None:
        self.canary = folder / "canary.txt"
        self.canary.write_text("canary")
        self.before = self.canary.stat()
        self.reached = 0
        self.listening = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)]
        self.port = self.listening[0].getsockname()[1]
        self.listening[1].bind(("127.0.0.1", self.port))
        for name in (f"\0hpd-{self.port}", str(folder / "socket")):
            self.listening.append(socket.socket(socket.AF_UNIX))
            self.listening[-1].bind(name)
            self.listening[-1].listen()
        (folder / "socket").chmod(0o777)
        for each in self.listening:
            threading.Thread(target=self._wait, args=(each,), daemon=True).start()

    def _wait(self, listening: socket.socket) -> None:
        while True:
            try:
                listening.recv(1) if listening.type == socket.SOCK_DGRAM else listening.accept()
            except OSError:
                return
            self.reached += 1

    def fill(self, program: str) -> str:
        for name, value in (
            ("canary", self.canary),
            ("folder", self.canary.parent),
            ("pid", os.getpid()),
            ("port", self.port),
            ("repository", ROOT),
            ("python", os.path.realpath(sys.executable)),
        ):
            program = program.replace(f"{{{name}}}", str(value))
        return program


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("HPD_TEST_SECRET", "secret")
    host = Host(tmp_path)
    yield host
    for each in host.listening:
        each.close()


def descendants() -> set[int]:
    """Processes that descend from this one."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in found | {os.getpid()}} - found:
        found |= more
    return found


def of_strangers() -> list[str]:
    """Processes of the users that programs become, where root runs them."""
    listed = subprocess.run(["ps", "-eo", "uid=,pid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if 61184 <= int(line.split()[0]) < 61184 + 4096]


@needs_bubblewrap
@pytest.mark.slow
def test_hostile_programs_are_contained(host: Host) -> None:
    """Every one fails, in time; afterwards nothing of the host is changed, reached, killed or still running."""
    table = hostile.table()
    before, interpreter = descendants(), Path(os.path.realpath(sys.executable)).stat()
    assert check(hostile.RIGHT, hostile.TESTS, limits=Limits()).passed  # these tests can be passed

    def outcome(each: hostile.Hostile) -> tuple[Outcome, float]:
        start = time.monotonic()
        found = check(host.fill(each.whole), each.tests, limits=LIMITS)
        return found, time.monotonic() - start

    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(table, pool.map(outcome, table.values()), strict=True))
    assert len(table) >= 100
    assert {name: found for name, (found, _) in outcomes.items() if found.passed} == {}
    assert {name: seconds for name, (_, seconds) in outcomes.items() if seconds > LIMITS.seconds + 60} == {}
    after = host.canary.stat()
    assert host.canary.read_text() == "canary"
    assert (after.st_mode, after.st_nlink, after.st_mtime_ns) == (
        *(host.before.st_mode, host.before.st_nlink),
        host.before.st_mtime_ns,
    )
    assert sorted(path.name for path in host.canary.parent.iterdir()) == ["canary.txt", "socket"]
    assert Path(os.path.realpath(sys.executable)).stat().st_size == interpreter.st_size
    assert host.reached == 0
    assert descendants() - before == set()
    assert os.getuid() != 0 or of_strangers() == []


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@needs_bubblewrap
@pytest.mark.slow
def test_honest_programs_pass() -> None:
    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(HONEST, pool.map(lambda each: check(*each), HONEST.values()), strict=True))
        wrong = list(pool.map(lambda each: check(each[0], each[1] + "\nassert False"), list(HONEST.values())[:5]))
    assert {name: outcome for name, outcome in outcomes.items() if not outcome.passed} == {}
    assert [outcome.status for outcome in wrong] == ["failed"] * 5


@needs_bubblewrap
@pytest.mark.slow
def test_a_script_by_its_output() -> None:
    outcome = run("name = input()\nprint('hello', name)\nimport sys\nprint(sys.stdin.read())", stdin="you\nrest")
    assert outcome == Outcome("passed", "", "hello you\nrest\n")
    assert run("1 / 0") == Outcome("failed", "ZeroDivisionError: division by zero")
    assert run("print('x')\nraise SystemExit(3)") == Outcome("failed", "exit status 3", "x\n")
    endless = run("while True:\n    print('a' * 99)")
    assert endless.status == "output"
    assert len(endless.output) < 1 << 21
    assert run("while True: pass", limits=Limits(seconds=1)).status == "timeout"
    # Closing its output does not end a program early, nor does it make it wait.
    assert run("import os\nos.closerange(0, 9)\nos._exit(0)").status == "passed"
    assert run("import os\nos.kill(os.getpid(), 9)").status == "failed"
    assert run("\0").status == "failed"


@needs_bubblewrap
@pytest.mark.slow
def test_reward_of_code() -> None:
    tests = "assert f(2) == 4\nassert f(3) == 9\n"
    right, wrong = "def f(x):\n    return x * x\n", "def f(x):\n    return x + x\n"
    for answer, score in (
        (f"Here:\n```python\n{right}```\nIt multiplies.", 1.0),
        (f"```\n{wrong}```\nBetter:\n```py\n{right}```", 1.0),
        (f"```python\n{right}```\nWorse:\n```python\n{wrong}```", 0.0),
        (f"<think>```python\n{wrong}```</think>```python\n{right}```", 1.0),
        (f"<think>```python\n{right}```", 0.0),
        (f"```python\n{right}", 1.0),  # cut before its end
        (right, 1.0),
        ("I cannot.", 0.0),
        ("", 0.0),
    ):
        assert compute_score("mbpp", answer, tests) == score, answer
    used = f"```python\n{right}```\nUse it:\n```python\nprint(f(2))\n```"
    assert compute_score("humaneval", used, tests, {"entry_point": "f"}) == 1.0
    before = {"preamble": "import math\n", "entry_point": "f"}
    assert compute_score("humaneval", "def f(x):\n    return math.prod([x, x])", tests, before) == 1.0
    cases = '{"inputs": ["2\\n", "3\\n"], "outputs": ["4", "9"]}'
    assert compute_score("scripts", "```python\nprint(int(input()) ** 2)\n```", cases) == 1.0
    assert compute_score("scripts", "```python\nprint(int(input()) ** 2)\nexit()\n```", cases) == 1.0
    assert compute_score("scripts", "```python\nprint(4)\n```", cases) == 0.0


@pytest.mark.parametrize("tests", ["", "  \n", "def (", "{1: 2", '{"inputs": [1], "outputs": []}', '{"inputs": []}'])
def test_bad_ground_truth_is_an_error_and_no_score(tests: str) -> None:
    if shutil.which("bwrap") is None and not tests.startswith(("{", " ")) and tests:
        pytest.skip("needs Debian's package bubblewrap")
    with pytest.raises(SandboxError) as caught:
        compute_score("mbpp", "def f(x):\n    return x", tests)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("assert f(1) == 2", (["f"], [])),
        ("import math\ndef check(candidate):\n    assert abs(candidate(1)) == 1\ncheck(g)", (["g"], [])),
        ("assert sum(1, 2) == 3", (["sum"], [])),
        ("assert queue(1, 2) == 3", (["queue"], [])),
        ("assert len(f(1)) == sum([1])", (["f"], [])),
        ("assert math.isclose(f(1), 1)", (["f"], ["math"])),
        ("x = f(1)\nassert x == [y for y in x]", (["f"], [])),
        ("assert set(f(1)) == set([1])", (["f"], [])),
    ],
)
def test_names_that_tests_ask_for(text: str, names: tuple[list[str], list[str]]) -> None:
    """A candidate never stands in for what its tests compare with."""
    assert guest.asked_names(text) == names


WITHOUT = "from hpd_verl.rewards.sandbox import Limits, check\n"


def without_bubblewrap(program: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a program that finds no bubblewrap."""
    variables = {"PATH": "/nowhere", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", WITHOUT + program], env=variables, capture_output=True, text=True)


@pytest.mark.slow
def test_nothing_runs_without_the_sandbox_unasked(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    found = without_bubblewrap(f"check({f'open({str(mark)!r}, 1)'!r}, 'f(1)')")
    last = found.stderr.strip().splitlines()[-1]
    assert found.returncode == 1
    assert "bubblewrap" in last
    assert "HPD_UNSANDBOXED=1" in last
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("with_namespaces", [True, False])
def test_limits_hold_without_the_sandbox_too(with_namespaces: bool, tmp_path: Path) -> None:
    program = (
        "limits = Limits(seconds=2, memory=1 << 28, file_size=1 << 20)\n"
        "for candidate in (\n"
        "    'def f(x):\\n    return x', 'def f(x):\\n    return -1', 'while True: pass',\n"
        "    'x = [0]\\nwhile True: x += x',\n"
        "    'import os\\ndef f(x):\\n    return x if \"HPD_TEST_SECRET\" in os.environ else 0',\n"
        "    'import os\\nos._exit(0)', 'import os, time\\nif os.fork() == 0:\\n    os.setsid()\\n    time.sleep(7)',\n"
        '    \'open("x", "wb").write(bytes(1 << 22))\',\n'
        "): print(check(candidate, 'assert f(1) == 1', limits=limits).status)\n"
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    if with_namespaces:
        (tools / "unshare").symlink_to(shutil.which("unshare") or pytest.skip("needs unshare"))
    found = without_bubblewrap(program, HPD_UNSANDBOXED="1", HPD_TEST_SECRET="secret", PATH=str(tools))
    assert found.stdout.split()[:2] == ["passed", "failed"], found.stderr
    assert found.stdout.split()[2] == "timeout"
    assert set(found.stdout.split()[3:]) <= {"failed", "memory"}


@needs_bubblewrap
@pytest.mark.slow
def test_users_that_are_not_root(tmp_path: Path) -> None:
    """The other way into the sandbox, by a user namespace, with an interpreter that everybody may read."""
    python = Path("/usr/bin/python3.11")
    if os.getuid() == 0 and not python.exists():
        pytest.skip("needs a python3.11 that other users may run")
    copy = tmp_path / "package"
    shutil.copytree(ROOT / "hpd_verl/rewards", copy / "hpd_verl/rewards")
    (copy / "hpd_verl/__init__.py").write_text("")
    for folder in (copy, *tmp_path.parents[:3], tmp_path):
        folder.chmod(0o755)
    program = WITHOUT + (
        "limits = Limits(seconds=3, memory=1 << 28)\n"
        "right = '\\ndef f(x):\\n    return x'\n"
        "for candidate in ('', 'import os\\nassert os.getuid() != 65534', 'while True: pass',\n"
        "    'import os\\nwhile True: os.fork()',\n"
        "    'open(\"/x\", \"w\")', 'import os\\nos.setuid(0)', 'import os\\nassert os.listdir(\"/home\")'):\n"
        "    print(check(candidate + right, 'assert f(1) == 1', limits=limits).status)\n"
    )
    user = {"user": 1234, "group": 1234, "extra_groups": []} if os.getuid() == 0 else {}
    found = subprocess.run(
        [str(python) if os.getuid() == 0 else sys.executable, "-c", program],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(copy), "TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        cwd="/",
        **user,  # type: ignore[call-overload]
    )
    if "bubblewrap:" in found.stderr:
        pytest.skip(f"no user namespaces here: {found.stderr.strip().splitlines()[-1]}")
    assert found.stdout.split() == ["passed", "failed", "timeout", *["failed"] * 4], found.stderr


@needs_bubblewrap
@pytest.mark.slow
def test_a_killed_run_leaves_nothing() -> None:
    """Whoever runs a program may be killed at any time: the sandbox ends with it."""
    program = WITHOUT + "print('go', flush=True)\ncheck('while True: pass', 'f(1)', limits=Limits(seconds=60))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        started: set[int] = set()
        deadline = time.monotonic() + 60
        while len(started := descendants()) < 5 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    sandboxed = {pid for pid in started if b"serve(" in command(pid)}
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in sandboxed) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in sandboxed if Path(f"/proc/{pid}").exists()] == []
    assert len(started) >= 5
