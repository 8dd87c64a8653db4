"""``hpd-verl``: the list of commands, what is no command, and each command's own help."""

import subprocess
import sys

import pytest

from hpd_verl.command import COMMANDS, main


def call(words: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of ``hpd-verl`` with these words, in this process."""
    monkeypatch.setattr(sys, "argv", ["hpd-verl", *words])
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_lists_the_commands(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call([word], monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: hpd-verl COMMAND ..."
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)


def test_what_is_no_command_ends_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known = "choose export, fill-store, generate, plan, report"
    for words, found in (
        ([], "hpd-verl: no command"),
        (["exprot", "--help"], "hpd-verl exprot: no such command"),
        (["--out"], "hpd-verl --out: no such command"),
        ([""], "hpd-verl: no command"),
    ):
        assert call(words, monkeypatch) == 2
        assert capsys.readouterr().err == f"Error: {found}; {known}\n"


def test_each_command_has_its_own_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Told by the name that was typed, and a flag or setting of each; all in this process."""
    telling = {
        "export": "--overwrite",
        "fill-store": "teacher_cache_dir",
        "generate": "--min_reward",
        "plan": "--json",
        "report": "--metrics",
    }
    for name in COMMANDS:
        assert call([name, "--help"], monkeypatch) in (0, None)
        said = capsys.readouterr().out
        assert telling.pop(name) in said
        if name != "fill-store":  # Hydra's help
            assert said.startswith(f"usage: hpd-verl {name} ")
    assert not telling


def test_the_list_imports_nothing_else() -> None:
    program = "import sys, hpd_verl.command as c; c.usage(); print(sorted({'torch', 'verl', 'numpy'} & {*sys.modules}))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert run.stdout == "[]\n", run.stderr
