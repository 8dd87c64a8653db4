"""The maths reward: what counts as an answer, and that no answer holds up a run."""

import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from maths_pairs import DIFFERENT, EQUAL

from hpd_verl.tools.rewards import maths
from hpd_verl.tools.rewards.answers import boxed, code_of, without_reasoning
from hpd_verl.tools.rewards.maths import MathsError, compute_score, final_answer
from hpd_verl.tools.rewards.maths_equal import equal

pytest.importorskip("math_verify", reason="needs hpd-verl[evaluation]")

PAGE = Path(__file__).parents[3] / "docs" / "evaluation.md"

RIGHT = [
    (r"So it is \boxed{42}.", "42"),
    (r"\boxed{41}, no: \boxed{42}", "42"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\dfrac{1}{2}}", r"\frac12"),
    (r"\boxed{1/2}", r"\frac{1}{2}"),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}"),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
    (r"\boxed{x^2+2x+1}", r"(x+1)^2"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{5 \text{ cm}}", "5"),
    (r"\boxed{\$18.90}", "18.9"),
    (r"\boxed{1{,}234}", "1234"),
    (r"\boxed{(1, 2)}", "(1,2)"),
    (r"\boxed{\{1, 2\}}", r"\{2, 1\}"),
    (r"\boxed{[0, 1)}", "[0,1)"),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\boxed{-7}", "-7"),
    (r"\boxed{\text{(C)}}", "C"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{90°}", "90"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{50}", r"50\%"),
    (r"\boxed{1\,234\,567}", "1234567"),
    (r"\boxed{1\!234}", "1234"),
    (r"\boxed{1.5e3}", "1500"),
    (r"\boxed{.5}", "0.5"),
    (r"\boxed{ 5 . }", "5"),
    ("It has 2 parts.\n#### 1,200", "1200"),
    ("The answer is 12.", "12"),
    ("答案是 $\\boxed{\uff13}$ 或 \\boxed{3}", "3"),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    (r"\boxed{2} </think> \boxed{3}", "3"),
]
WRONG = [
    (r"\boxed{43}", "42"),
    (r"\boxed{.5}", "5"),
    (r"\boxed{$.50}", "50"),
    (r"\boxed{1 2}", "12"),
    (r"\boxed{3 1/2}", "31/2"),
    (r"\boxed{1\,234}", "235"),
    (r"\boxed{1e}", "1"),
    (r"\boxed{42}, no: \boxed{43}", "42"),
    (r"\boxed{}", "42"),
    (r"\boxed{42", "7"),
    ("", "42"),
    ("   \n", "42"),
    ("I do not know.", "42"),
    (r"<think>\boxed{42}", "42"),
    (r"<think>It is \boxed{42}.</think>", "42"),
    (r"\boxed{\frac{1}{}}", "1"),
    (r"\boxed{}}}{{{\frac}", "1"),
    (r"\boxed{\left(\left(\left(}", "1"),
    ("\\boxed{" + "1+" * 5000 + "1}", "5001"),
    ("\\boxed{" * 2000, "1"),
    ("\ud800\0\u202e🎉", "1"),
    (r"\boxed{x}", "1"),
    (r"\boxed{1, 2}", "1"),
    (r"\boxed{\infty}", "1"),
    (r"\boxed{[1]}", "__import__('os')"),
]


@pytest.mark.slow
def test_answers_that_are_right_and_wrong() -> None:
    cases = [*((*case, 1.0) for case in RIGHT), *((*case, 0.0) for case in WRONG)]
    with ThreadPoolExecutor(2) as pool:  # verl's reward loop calls from threads, where signals do not work
        scores = list(pool.map(lambda case: compute_score("maths", case[0], case[1]), cases))
    found = {case[0]: score for case, score in zip(cases, scores, strict=True) if score != case[2]}
    assert found == {}


def answer_of(text: str) -> str:
    """The whole answer of a pair."""
    return text[5:] if text.startswith("text:") else f"\\boxed{{{text}}}"


@pytest.mark.slow
def test_pairs_by_kind() -> None:
    tables = ((EQUAL, 1.0), (DIFFERENT, 0.0))
    cases = [(*pair, score) for table, score in tables for pairs in table.values() for pair in pairs]
    with ThreadPoolExecutor(2) as pool:
        scores = list(pool.map(lambda case: compute_score("maths", answer_of(case[0]), case[1]), cases))
    assert [case for case, score in zip(cases, scores, strict=True) if score != case[2]] == []
    assert len(cases) > 350


@pytest.mark.slow
def test_the_rules_of_the_page_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (equal|different)", PAGE.read_text(), re.M)
    assert len(rows) > 20
    found = {row: compute_score("", answer_of(row[0]), row[1]) for row in rows}
    assert [row for row, score in found.items() if score != (row[2] == "equal")] == []


def spellings(value: Fraction) -> list[str]:
    """Ways to write a number above one."""
    over, under = value.numerator, value.denominator
    whole, rest = divmod(over, under)
    found = [
        f"{over}/{under}",
        rf"\frac{{{over}}}{{{under}}}",
        rf"\dfrac{{{7 * over}}}{{{7 * under}}}",
        rf"{over:,}/{under}",
    ]
    if rest:
        found += [rf"{whole}\frac{{{rest}}}{{{under}}}", f"{whole} {rest}/{under}", rf"{whole} + {rest}/{under}"]
    else:
        found += [
            f"{whole:,}",
            f"{whole}.00",
            rf"{whole}\text{{ cm}}",
            rf"{whole}\%",
            f"{whole} apples",
            f"x = {whole}",
        ]
    if under in (2, 4, 5, 8, 10):
        found += [f"{over / under}", rf"\${over / under}0", f"{Fraction(over, 10 * under).__float__()}e1"]
    return found


def test_spellings_of_one_number_are_equal_and_of_another_are_not() -> None:
    """Against Python's fractions."""
    draw = random.Random(0)
    wrong = []
    for _ in range(150):
        value = Fraction(draw.randint(20, 30_000), draw.choice((1, 2, 3, 4, 5, 7, 8, 10)))
        other = value + Fraction(draw.choice((1, -1)), draw.choice((1, 10**9)) * value.denominator)
        truth = draw.choice(spellings(value)[:3])
        wrong += [(each, truth) for each in spellings(value) if not equal(truth, each)]
        wrong += [(each, truth) for each in spellings(other) if equal(truth, each)]
    assert wrong == []


@pytest.mark.slow
def test_a_tolerance_of_the_row() -> None:
    """A decimal stands for what it does not equal only where the row says how near."""
    info: dict[str, Any] = {"tolerance": 0.001, "index": 3}
    pairs = [
        ("0.333", r"\frac13"),
        ("1.414", r"\sqrt2"),
        ("3.1416", r"\pi"),
        ("2.9999", "3"),
        (r"33.3334\%", r"33.3333\%"),
    ]
    for answer, truth in [*pairs, ("(0.333, 1)", r"(1/3, 1)")]:
        assert [compute_score("", f"\\boxed{{{answer}}}", truth, each) for each in (info, None)] == [1.0, 0.0]
    for answer, truth in [("0.33", r"\frac13"), ("1.4", r"\sqrt2"), ("4", "3"), ("x", "y"), ("C", "B")]:
        assert compute_score("", f"\\boxed{{{answer}}}", truth, info) == 0.0
    assert compute_score("", r"\boxed{0.333}", "1/3", {"tolerance": None}) == 0.0  # of a column that others fill
    for bad in (-1, "near", float("nan"), float("inf"), True):
        with pytest.raises(MathsError, match=r"^extra_info.tolerance=.*: expected a number, 0 or more$"):
            compute_score("", r"\boxed{1}", "2", {"tolerance": bad})


def test_boxes_are_found_in_time_in_proportion_to_the_text() -> None:
    start = time.monotonic()
    for text in (
        "\\boxed{" * 100_000,
        "\\" * 700_000,
        "\\boxed " * 90_000,
        "{" * 700_000,
        "\\boxed{" * 50_000 + "}" * 50_000,
    ):
        boxed(text)
    boxed("\\boxed{1}, " * 60_000)
    assert time.monotonic() - start < 10  # 0.6 seconds; hours if it were quadratic


@pytest.mark.slow
def test_what_hangs_is_wrong_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sympy's numbers nor its parsers hold up a thread, and the next answer is compared as ever."""
    monkeypatch.setattr(maths, "SECONDS", 1.0)
    hanging = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{(10^{10^{9}})!}", r"\boxed{\sum_{n=1}^{10^{10}} \frac{1}{n^2}}"]
    assert compute_score("maths", r"\boxed{\frac{2}{4}}", "1/2") == 1.0
    start = time.monotonic()
    scores: list[float] = []
    threads = [threading.Thread(target=lambda t=text: scores.append(compute_score("", t, "7"))) for text in hanging]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == [0.0] * 3
    assert time.monotonic() - start < 25  # a second each, and workers that start anew
    monkeypatch.setattr(maths, "SECONDS", 5.0)
    assert compute_score("maths", r"\boxed{\frac{2}{4}}", "1/2") == 1.0


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = maths._Workers()
    assert workers.equal("1/2", r"\boxed{\frac{2}{4}}")
    workers._idle[0].process.kill()
    workers._idle[0].process.wait()
    assert workers.equal("1/2", r"\boxed{\frac{2}{4}}")
    workers.end()
    assert workers._idle == []
    broken = tmp_path / "worker.py"
    broken.write_text("import no_such_module")
    monkeypatch.setattr(maths, "_WORKER", str(broken))
    with pytest.raises(MathsError, match="install hpd-verl"):
        workers.equal("1/2", "1/2")


@pytest.mark.parametrize("truth", ["", "  ", None])
def test_no_ground_truth_is_an_error(truth: str | None) -> None:
    with pytest.raises(MathsError, match="empty"):
        compute_score("maths", "1", truth)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["maths", "code"])
def test_verl_finds_the_reward_functions(name: str) -> None:
    from verl.utils.import_utils import load_extern_object

    file = Path(maths.__file__).with_name(f"{name}.py")
    for path in (f"pkg://hpd_verl.tools.rewards.{name}", str(file)):
        function = load_extern_object(module_path=path, object_name="compute_score")
        assert function(data_source="", solution_str="", ground_truth="1", extra_info=None, more=1) == 0.0


def test_parts_of_an_answer() -> None:
    assert boxed(r"a \boxed{1} b \boxed{\frac{1}{2}} c") == r"\frac{1}{2}"
    assert boxed(r"\boxed{\{1\}}") == r"\{1\}"
    assert boxed(r"\boxed{1} \boxed{2") == "1"
    assert boxed("none") is None
    assert boxed(r"\boxed{3} and $\boxed{4}$") == "3, 4"
    assert boxed(r"\boxed{3}, so \boxed{4}") == "4"
    assert boxed(r"\boxed{\boxed{3}}") == "3"
    assert boxed(r"\\boxed{3}") == "3"  # as JSON escapes it
    assert without_reasoning("<think>a</think>b</think>c") == "c"
    assert final_answer("####") == ("", False)
    assert final_answer("x" * 5000) == ("x" * 2000, False)


@pytest.mark.parametrize(
    ("answer", "name", "code"),
    [
        ("```python\na\n```", None, "a\n"),
        ("```\na\n```\ntext\n```py\nb\n```", None, "b\n"),
        ("```python\ndef f(): pass\n```\n```\nf()\n```", "f", "def f(): pass\n"),
        ("```python\ndef f(): pass\n```\n```\nf()\n```", None, "f()\n"),
        ("~~~\na\n~~~", None, "a\n"),
        ("````\na\n```\nb\n````", None, "a\n```\nb\n"),
        ("1. It is:\n   ```python\n   a\n     b\n   ```", None, "a\n  b\n"),
        ("It is: ```python\na\n```\nDone.", None, "a\n"),
        ("```python\nf = 1\n```\n```\nf == 2\n```", "f", "f = 1\n"),
        ("```python\nclass f:\n  x\n```\n```\nf()\n```", "f", "class f:\n  x\n"),
        ("```python\ncut", None, "cut"),
        ("```", None, ""),
        ("", None, ""),
        ("no block", None, "no block"),
        ("<think>```\na\n```</think>none", None, "none"),
    ],
)
def test_code_of_an_answer(answer: str, name: str | None, code: str) -> None:
    assert code_of(answer, [name] if name else []) == code
