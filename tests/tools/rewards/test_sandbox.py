"""The sandbox: hostile programs are contained and fail, honest ones pass, and nothing runs without it unasked."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hostile
import pytest
from honest import HELPED, HONEST, LISTED, SCRIPTS

from hpd_verl.tools.rewards import confine, guest, sandbox
from hpd_verl.tools.rewards.code import compute_score, outcome_of
from hpd_verl.tools.rewards.sandbox import Limits, Outcome, SandboxError, check, run

ROOT = Path(__file__).resolve().parents[3]
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
        own = {"helper": each.helper, "function": each.function}
        found = check(host.fill(each.whole), each.tests, **own, limits=LIMITS)
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
    programs = {**HONEST, **HELPED, **LISTED}

    def outcome(each: tuple[str, ...]) -> Outcome:
        program, tests, *own = each
        helper, function = own or ("", "")
        return check(program, tests, helper=helper, function=function)

    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(programs, pool.map(outcome, programs.values()), strict=True))
        wrong = list(pool.map(lambda each: check(each[0], each[1] + "\nassert False"), list(HONEST.values())[:5]))
    assert {name: found.message for name, found in outcomes.items() if not found.passed and name not in LISTED} == {}
    assert [name for name in LISTED if outcomes[name].passed] == []  # the page lists too many
    assert [found.status for found in wrong] == ["failed"] * 5


@needs_bubblewrap
@pytest.mark.slow
def test_results_of_another_shape_match_nothing() -> None:
    """All comparisons in one run for each result: one that holds would end it."""
    empty = hostile.SHAPES[:5]
    for shape in hostile.SHAPES:
        comparisons = [*hostile.OF_WHOLE_ARRAYS, *(hostile.OF_EMPTY_ONES if shape in empty else ())]
        program = f"import numpy as np\ndef solve(x):\n    return {shape}"
        tests = "import numpy as np\nheld = []\n" + "".join(
            f"try:\n    assert {each}\n    held.append({each!r})\nexcept Exception:\n    pass\n" for each in comparisons
        )
        outcome = check(program, f"{tests}assert not held, held")
        assert (shape, outcome.status, outcome.message) == (shape, "passed", "")
    right = check(program.replace(shape, "np.array([4.0])"), "import numpy as np\nassert np.allclose(solve(2), [4.0])")
    assert right.passed


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
    # Closing its output does not end a program early, nor does it make it wait, nor go on beyond its time.
    assert run("import os\nos.closerange(0, 9)\nos._exit(0)").status == "passed"
    closed = run("import os\nos.closerange(0, 64)\nwhile True: pass", limits=Limits(seconds=1))
    assert (closed.status, len(closed.message) < 100) == ("timeout", True)
    assert run("import os\nos.kill(os.getpid(), 9)").status == "failed"
    assert run("\0").status == "failed"
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda each: run(each[0], stdin=each[1]), SCRIPTS))
    found = [
        (program, outcome.status, outcome.output.strip())
        for (program, *_), outcome in zip(SCRIPTS, outcomes, strict=True)
    ]
    assert found == [(program, "passed", printed) for program, _, printed in SCRIPTS]


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
    helper = "def twice(x):\n    return 2 * x\n"
    row = {"preamble": helper, "entry_point": "f"}
    assert compute_score("humaneval", "def f(x):\n    return twice(x) // 2", "assert twice(f(2)) == 4", row) == 1.0
    deceit = "def twice(x):\n    return 4\ndef f(x):\n    return 0"
    assert compute_score("humaneval", deceit, "assert twice(f(2)) == twice(2)\nassert twice(f(3)) == 6", row) == 0.0


SOLUTION = "class Solution:\n    def f(self, a: List[int], b: int) -> List[int]:\n        return %s"
CALLED = [
    (
        SOLUTION % "[x + b for x in a]",
        {"inputs": ["[1, 2]\n3", "[]\n1\n"], "outputs": ["[4, 5]", "[]"], "fn_name": "f"},
    ),
    (SOLUTION % "tuple(x + b for x in a)", {"inputs": [[[1, 2], 3]], "outputs": [[4, 5]], "fn_name": "f"}),
    (
        "def f(a):\n    return {'x': None, 'y': a}",
        {"inputs": ["true"], "outputs": ['{"x": null, "y": true}'], "fn_name": "f"},
    ),
    ("def sum(a):\n    return 7", {"inputs": ["1"], "outputs": ["7"], "fn_name": "sum"}),
    ("print(input(), input())", {"inputs": ["1\n2", ["1", "2"]], "outputs": ["1 2", ["1 2"]]}),
    ("print(input())\nprint(2)", {"inputs": ["1"], "outputs": [["1", "2"]]}),
]
"""Answers, and inputs and outputs that they are right for."""
NOT_CALLED = [
    SOLUTION % "[x - b for x in a]",
    SOLUTION % "None",
    SOLUTION % "print([x + b for x in a])",
    "def g(a, b):\n    return [4, 5]",
    "class Own(list):\n    def __eq__(self, other):\n        return True\ndef f(a, b):\n    return Own()",
]


@needs_bubblewrap
@pytest.mark.slow
def test_inputs_and_outputs_of_functions_and_scripts() -> None:
    for answer, cases in CALLED:
        assert outcome_of(f"```python\n{answer}\n```", json.dumps(cases)).passed, answer
    cases = CALLED[0][1]
    for answer in NOT_CALLED:
        assert outcome_of(f"```python\n{answer}\n```", json.dumps(cases)).status == "failed", answer
    later = '"""Doc."""\nfrom __future__ import annotations\ndef f(a: int | None):\n    return a'
    assert outcome_of(later, "assert f(1) == 1", {"preamble": "import math\n"}).passed


@pytest.mark.parametrize(
    "cases",
    [
        {"inputs": ["x"], "outputs": ["1"], "fn_name": "f"},
        {"inputs": [1], "outputs": ["1"], "fn_name": "f"},
        {"inputs": ["1"], "outputs": ["1"], "fn_name": "f()"},
        {"inputs": "1", "outputs": "1"},
        {"inputs": [{"a": 1}], "outputs": ["1"]},
        {"inputs": [[[1, 2]]], "outputs": ["1"]},
    ],
)
def test_inputs_and_outputs_of_other_forms_are_refused(cases: dict[str, Any]) -> None:
    with pytest.raises(SandboxError, match=r"^ground_truth: .*") as caught:
        outcome_of("def f(a):\n    return a", json.dumps(cases))
    assert "\n" not in str(caught.value)


@needs_bubblewrap
@pytest.mark.slow
def test_the_time_is_that_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPD_SANDBOX_SECONDS", "1.5")
    slow = "import time\nx = input()\ntime.sleep(0.6)\nprint(x)"
    two, four = ('{"inputs": [%s], "outputs": [%s]}' % ((", ".join(['"1"'] * n),) * 2) for n in (2, 4))
    assert outcome_of(slow, two).passed
    start = time.monotonic()
    assert outcome_of(slow, four).status == "timeout"
    assert time.monotonic() - start < 30


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
        ("assert globals()['P'](1).x == eval('f(len([1]))')", (["P", "f"], [])),
        ("x = f(1)\nassert x == [y for y in x]", (["f"], [])),
        ("assert set(f(1)) == set([1])", (["f"], [])),
        ("assert abs(sum(1, 2) - 3) < 1", (["sum"], [])),
        ("assert abs(abs(1)) == 1", ([], [])),
        ("assert len([1]) == sum([1])", ([], [])),
        ("def check(add):\n    assert add(1) == 1\ncheck(add)", (["add"], [])),
        ("def check():\n    f = 1\n    assert g(f) == 1\nassert f(1) == 1\ncheck()", (["f", "g"], [])),
    ],
)
def test_names_that_tests_ask_for(text: str, names: tuple[list[str], list[str]]) -> None:
    """A candidate never stands in for what its tests compare with."""
    assert guest.asked_names(text) == names


@pytest.mark.unit
@pytest.mark.parametrize("machine", confine.MACHINES)
def test_what_the_filter_refuses(machine: str) -> None:
    """By a reading of its instructions: also of the processor that this machine does not have."""
    about = confine.MACHINES[machine]
    program = list(struct.iter_unpack("=HBBI", confine.filter_of(about)))

    def action(number: int, *args: int, architecture: int = about.audit) -> int:
        data = struct.pack(
            "=iIQ6Q", number - (1 << 32) * (number >> 31), architecture, 0, *args, *[0] * (6 - len(args))
        )
        at = value = 0
        while True:
            code, if_true, if_false, operand = program[at]
            at += 1
            if code == 0x06:
                return int(operand)
            if code == 0x20:
                value = struct.unpack_from("=I", data, operand)[0]
                continue
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: value & operand != 0}[code]
            at += if_true if holds else if_false

    allow, error, kill = 0x7FFF0000, 0x50000, 0x80000000
    x86 = machine == "x86_64"
    for name, numbers in confine.REFUSED.items():
        if (number := numbers[about.column]) is not None:
            assert action(number) == error | errno.EPERM, name
    read, mmap, futex, fork = (0, 9, 202, 57) if x86 else (63, 222, 98, 220)
    assert {action(each) for each in (read, mmap, futex, fork)} == {allow}
    socket_, pair, clone, ioctl = (41, 53, 56, 16) if x86 else (198, 199, 220, 29)
    assert action(socket_, 1) == action(pair, 1) == allow
    families = [*range(2, 50), (1 << 32) + 2]
    assert {action(each, family) for each in (socket_, pair) for family in families} == {error | errno.EAFNOSUPPORT}
    assert action(clone, 0x3D0F00) == action(clone, 17) == allow  # a thread, a process
    new = [1 << bit for bit in (17, 25, 26, 27, 28, 29, 30)]
    assert {action(clone, flag | 17) for flag in new} == {error | errno.EPERM}
    assert {action(each) for each in (435, 451, 470)} == {error | errno.ENOSYS}
    assert action(ioctl, 0, 0x5412) == error | errno.EPERM
    assert action(ioctl, 0, 0x5401) == allow
    assert {action(each) for each in (0x40000000 + read, 0xFFFFFFFF)} == {error | errno.EPERM}
    others = {0x40000003, 0x40000028, 0xC000003E, 0xC00000B7} - {about.audit}
    assert {action(read, architecture=each) for each in others} == {kill}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (1, "asm-generic/unistd.h")],
    ids=["x86_64", "aarch64"],
)
def test_numbers_of_system_calls_are_the_kernels(column: int, header: str) -> None:
    file = Path("/usr/include", header)
    if not file.exists():
        pytest.skip("needs the kernel's headers (Debian's linux-libc-dev)")
    known = {name: int(number) for name, number in re.findall(r"__NR(?:3264)?_(\w+) (\d+)", file.read_text())}
    mine = {name: numbers[column] for name, numbers in confine.REFUSED.items() if name in known}
    assert len(mine) > 55
    assert {name: (number, known[name]) for name, number in mine.items() if number != known[name]} == {}


@pytest.mark.unit
def test_each_sandbox_has_a_user_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks: another process of this machine finds a number in use as this one does."""
    first = 4000000000  # no sandbox's
    monkeypatch.setattr(sandbox, "_USERS", 4)
    with contextlib.ExitStack() as stack:
        mine = {stack.enter_context(sandbox._user(first)) for _ in range(3)}
        code = (
            "from hpd_verl.tools.rewards import sandbox\nsandbox._USERS = 4\n"
            f"with sandbox._user({first}) as number: print(number)"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert mine | {int(other.stdout)} == {first + each for each in range(4)}
        stack.enter_context(sandbox._user(first))
        with pytest.raises(SandboxError, match="all of 4 users"), sandbox._user(first):
            pass
    with sandbox._user(first) as number, sandbox._user(None) as nobody:
        assert number in mine | {int(other.stdout)}
        assert nobody is None


@needs_bubblewrap
@pytest.mark.slow
def test_whoever_runs_programs_may_have_closed_its_descriptors() -> None:
    program = WITHOUT + (
        "import os\nkept = os.dup(1)\nos.closerange(0, 3)\n"
        "found = check('def f(x):\\n    return x', 'assert f(1) == 1')\n"
        "os.write(kept, found.status.encode())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert found.stdout == "passed"


WITHOUT = "from hpd_verl.tools.rewards.sandbox import Limits, check\n"


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


FORGERY = """
import glob, os, signal
won = False
for way in glob.glob('/proc/[0-9]*/fd/*'):
    try:
        if int(way.split('/')[2]) != os.getpid() and os.readlink(way).startswith('pipe:'):
            descriptor = os.open(way, os.O_WRONLY | os.O_NONBLOCK)
            os.write(descriptor, b'started\\n{"status": "passed", "message": ""}')
    except OSError:
        pass
for process in glob.glob('/proc/[0-9]*'):
    for file, flags in ('environ', os.O_RDONLY), ('mem', os.O_RDWR):
        try:
            if int(process[6:]) not in (os.getpid(), 1) and os.read(os.open(f'{process}/{file}', flags), 1):
                won = True
        except OSError:
            pass
try:
    open('CANARY', 'w')
    won = True
except OSError:
    pass
try:
    os.kill(PID, 0)
    won = True
except OSError:
    pass
def f(x):
    return 1 if won else 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_namespaces", [True, False])
def test_reports_cannot_be_forged_without_the_sandbox_either(with_namespaces: bool, tmp_path: Path) -> None:
    """By a search for pipes, memory and files of others; without namespaces it is Landlock that hides them."""
    tools, canary = tmp_path / "bin", tmp_path / "canary"
    tools.mkdir()
    if with_namespaces:
        (tools / "unshare").symlink_to(shutil.which("unshare") or pytest.skip("needs unshare"))
    program = (
        f"import os\nforgery = {FORGERY!r}.replace('CANARY', {str(canary)!r}).replace('PID', str(os.getpid()))\n"
        "for candidate in (forgery, 'def f(x):\\n    return x'):\n"
        "    print(check(candidate, 'assert f(1) == 1', limits=Limits(seconds=20)).status)\n"
    )
    found = without_bubblewrap(program, HPD_UNSANDBOXED="1", PATH=str(tools))
    if "Landlock" in found.stderr:
        pytest.skip("the kernel has no Landlock: nothing runs")
    assert found.stdout.split() == ["failed", "passed"], found.stderr
    assert not canary.exists()


@needs_bubblewrap
@pytest.mark.slow
def test_users_that_are_not_root(tmp_path: Path) -> None:
    """The other way into the sandbox, by a user namespace, with an interpreter that everybody may read."""
    python = Path("/usr/bin/python3.11")
    if os.getuid() == 0 and not python.exists():
        pytest.skip("needs a python3.11 that other users may run")
    copy = tmp_path / "package"
    shutil.copytree(ROOT / "hpd_verl/tools/rewards", copy / "hpd_verl/tools/rewards")
    for name in ("hpd_verl", "hpd_verl/tools"):
        (copy / name / "__init__.py").write_text("")
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
    sandboxed = {pid for pid in started if b"hpd_verl.tools.rewards.guest" in command(pid)}
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in sandboxed) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in sandboxed if Path(f"/proc/{pid}").exists()] == []
    assert len(started) >= 5
