"""The journal: what is in it stays, whenever its process ends; what is not is asked for once more."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpd_verl.tools.generation import Answer, Journal, Messages, Sampling, generate_all, open_journal

PROMPTS: list[Messages] = [[{"role": "user", "content": f"{number} \ud800\u2028\n\x00 é 🎉"}] for number in range(5)]


class Echo:
    """Answers with the prompt's text, last prompt first."""

    def __init__(self, identity: Mapping[str, Any] | None = None) -> None:
        self.identity = identity or {"model": "echo"}
        self.asked: list[int] = []

    def answers(
        self, prompts: Sequence[Messages], sampling: Sampling, done: Collection[int] = ()
    ) -> Iterator[tuple[int, list[Answer]]]:
        for position in reversed(range(len(prompts))):
            if position not in done:
                self.asked.append(position)
                text = prompts[position][0]["content"]
                yield position, [Answer(f"{text} {number}", [position, number], "stop") for number in range(sampling.n)]

    def close(self) -> None:
        """Holds nothing."""


SAMPLING = Sampling(n=2)
WANTED = [
    [Answer(f"{messages[0]['content']} {number}", [position, number], "stop") for number in range(2)]
    for position, messages in enumerate(PROMPTS)
]


def run(path: Path, **settings: Any) -> tuple[list[list[Answer]], list[int]]:
    echo = Echo()
    return generate_all(echo, PROMPTS, settings.pop("sampling", SAMPLING), path), echo.asked


def test_answers_by_prompt_and_asked_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal"
    assert run(path) == (WANTED, [4, 3, 2, 1, 0])
    written = path.read_bytes()
    assert run(path) == (WANTED, [])
    assert path.read_bytes() == written


def test_torn_after_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    run(path)
    whole = path.read_bytes()
    lines = [0, *(index + 1 for index, byte in enumerate(whole) if byte == ord("\n"))]  # where each begins
    for length in sorted({*range(0, len(whole), 29), *(end + off for end in lines[:-1] for off in (0, 1))}):
        path.write_bytes(whole[:length])
        answers, asked = run(path)
        assert answers == WANTED
        assert len(asked) == 5 - max(0, sum(end <= length for end in lines) - 2)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("text", [b"no journal", b"no journal\n", b'{"a": 1}\n', b"\x00\xff\n", b"PAR1"])
def test_another_file_is_left_alone(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="no journal of answers; choose another file"):
        run(path)
    assert path.read_bytes() == text


def test_other_settings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    run(path)
    written = path.read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(temperature 1.0 there, 0.5 now; seed 0 there, 7 now\)"):
        run(path, sampling=Sampling(n=2, temperature=0.5, seed=7))
    with pytest.raises(ValueError, match=r"\(model echo there, other now; weights None there, 7 now\)"):
        generate_all(Echo({"model": "other", "weights": 7}), PROMPTS, SAMPLING, path)
    with pytest.raises(ValueError, match=r"\(prompts \w+ there, \w+ now\)"):
        generate_all(Echo(), PROMPTS[::-1], SAMPLING, path)
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"{}", "damaged"),
        (b"\x00" * 20, "damaged"),
        (b'{"position": 4, "answers": []}', "0 answers, expected 2"),
        (b'{"position": 9, "answers": [{"text":"","tokens":[],"finish_reason":"stop"}]}', "1 answers"),
        (b'{"position": "4", "answers": []}', "its position is no number"),
        (b"[1]", "damaged"),
        (b'{"position": true, "answers": []}', "its position is no number"),
        (b'{"position": 1.0, "answers": []}', "its position is no number"),
        (b'{"position": 3, "answers": {}}', "its answers are no list"),
        (b'{"position": 3, "answers": [1, 2]}', "an answer is not finish_reason, text, tokens"),
        (b'{"position": 3, "answers": [{"text":5,"tokens":[],"finish_reason":"stop"}]}', "text is no text"),
        (b'{"position": 3, "answers": [{"text":"","tokens":"ab","finish_reason":"stop"}]}', "no list of numbers"),
        (b'{"position": 3, "answers": [{"text":"","tokens":[1,true],"finish_reason":"stop"}]}', "no list of numbers"),
        (b'{"position": 3, "answers": [{"text":"","tokens":[1.5],"finish_reason":"stop"}]}', "no list of numbers"),
        (
            b'{"position": 3, "answers": [{"text":"","tokens":null,"finish_reason":"eos"}]}',
            "is none of stop, leng",
        ),
        (b'{"position": 3, "answers": [{"text":"","tokens":null,"finish_reason":[]}]}', "is none of stop, leng"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"position": 3, "answers": "\xff\xfe"}', "damaged"),
        (b'{"position": 1' + b"0" * 5000 + b', "answers": []}', "damaged"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, found: str) -> None:
    path = tmp_path / "journal"
    run(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line + b"\n", *lines[3:]]))
    with pytest.raises(ValueError, match=f"journal, line 3: damaged.*{found}|journal, line 3: {found}") as error:
        run(path)
    assert str(error.value).endswith("remove the line")


def test_a_doubled_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    run(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[1]]))
    with pytest.raises(ValueError, match=r"line 7: damaged .prompt 4 is there twice"):
        run(path)


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    with open_journal(Echo(), PROMPTS, SAMPLING, tmp_path / "journal") as journal:
        journal.append(1, WANTED[1])
        assert list(journal.done) == [1]
        for answers in (WANTED[1], WANTED[0][:1]):
            with pytest.raises(ValueError, match="expected 2 once"):
                journal.append(1, answers)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    program = f"""
import sys, time
from pathlib import Path
from hpd_verl.tools.generation import Journal
with Journal(Path({str(path)!r}), {{}}, 5, 2):
    print("open", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match="another process writes it"):
            Journal(path, {}, 5, 2)
        other.kill()
        other.wait()
        Journal(path, {}, 5, 2).close()


def test_full_disk_keeps_what_was_finished(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    run(path)
    whole = path.read_bytes()
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room in range(1, len(whole), 7):
            path.unlink()
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            with pytest.raises(OSError, match=r"cannot write .*the prompts finished before stay there") as error:
                run(path)
            assert "\n" not in str(error.value)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            left = path.read_bytes()
            assert whole.startswith(left)
            assert left.endswith(b"\n") or not left
            answers, asked = run(path)
            assert answers == WANTED
            assert len(asked) == 5 - max(0, left.count(b"\n") - 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A process that only writes, killed again and again: every run goes on where the last one was."""
    path = tmp_path / "journal"
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_journal import Echo
from hpd_verl.tools.generation import Sampling, generate_all
prompts = [[{{"role": "user", "content": "x" * 2000}}] for _ in range(20_000)]
print("ready", flush=True)
generate_all(Echo(), prompts, Sampling(n=2), Path({str(path)!r}))
"""
    seen: list[bytes] = []
    for moment in (0.0, 0.1, 0.25):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            deadline = time.monotonic() + 60
            while not path.exists() or path.stat().st_size <= len(b"".join(seen)) + 1000:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(moment)
            os.kill(process.pid, signal.SIGKILL)
        now = path.read_bytes()
        assert now.startswith(b"".join(seen)), "what was there stays"
        seen = [line for line in now.splitlines(keepends=True) if line.endswith(b"\n")]
        positions = [json.loads(line)["position"] for line in seen[1:]]
        assert positions == list(range(19_999, 19_999 - len(positions), -1))


def test_no_prompts(tmp_path: Path) -> None:
    assert generate_all(Echo(), [], SAMPLING, tmp_path / "journal") == []


def test_a_generator_that_gives_less(tmp_path: Path) -> None:
    class Lazy(Echo):
        def answers(
            self, prompts: Sequence[Messages], sampling: Sampling, done: Collection[int] = ()
        ) -> Iterator[tuple[int, list[Answer]]]:
            return iter([(0, WANTED[0])])

    with pytest.raises(RuntimeError, match="4 of 5 prompts have no answers"):
        generate_all(Lazy(), PROMPTS, SAMPLING, tmp_path / "journal")


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"n": 0}, "n=0: expected 1 or more"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": 0}, "top_k=0: expected -1 for all"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"seed": -1}, "seed=-1"),
        ({"n": 2, "temperature": 0.0}, "n=2: greedy answers"),
    ],
)
def test_sampling_out_of_range(changed: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        Sampling(**changed)
