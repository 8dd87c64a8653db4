"""What the plugin imports beside verl's modules: after them, in order, once, and errors end the process."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpd_verl.plugin import BESIDE, import_beside

THEIRS = "import beside_log\nbeside_log.seen.append('theirs')\nwhole = True\n"
OURS = "import sys, beside_log\nbeside_log.seen.append((__name__, hasattr(sys.modules['beside_theirs'], 'whole')))\n"


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What modules ``beside_theirs``, ``beside_one`` and ``beside_two`` say when they are imported."""
    for name, text in (
        ("log", "seen = []\n"),
        ("theirs", THEIRS),
        ("one", OURS),
        ("two", OURS),
        ("bad", "raise ImportError('no such part')\n"),
    ):
        (tmp_path / f"beside_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import beside_log

    yield beside_log.seen
    for name in [name for name in sys.modules if name.startswith("beside_")]:
        del sys.modules[name]


def test_ours_are_imported_after_the_whole_module_in_order_and_once(seen: list[object]) -> None:
    import_beside("beside_theirs", "beside_two", "beside_one")
    import_beside("beside_theirs", "beside_one")
    assert seen == []
    import beside_theirs

    assert seen == ["theirs", ("beside_two", True), ("beside_one", True)]
    # As tools expect them.
    assert beside_theirs.__spec__.loader.get_source("beside_theirs") == THEIRS
    del sys.modules["beside_theirs"]
    import beside_theirs

    assert seen[3:] == ["theirs"]


def test_a_module_that_is_there_already(seen: list[object]) -> None:
    import beside_theirs  # noqa: F401

    import_beside("beside_theirs", "beside_one")
    assert seen == ["theirs", ("beside_one", True)]


@pytest.mark.parametrize("there_already", [False, True])
def test_an_error_ends_the_process_where_others_would_swallow_it(
    there_already: bool, seen: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> None:
        try:
            import beside_theirs  # noqa: F401
        except Exception as error:  # as a library does for what is optional
            pytest.fail(f"taken for an absence: {error}")

    if there_already:
        load()
    with pytest.raises(SystemExit, match="could not register with verl: no such part") as ended:  # noqa: PT012
        import_beside("beside_theirs", "beside_bad")
        load()
    assert "VERL_USE_EXTERNAL_PLUGINS=none" in str(ended.value.code)
    assert "beside_bad.py" in capsys.readouterr().err


def test_all_that_is_registered_is_there() -> None:
    """Each pair in this process: both names exist, and ours is in once theirs is."""
    import importlib

    for module, ours in BESIDE.items():
        importlib.import_module(module)
        assert set(ours) <= sys.modules.keys()
