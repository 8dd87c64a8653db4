"""What cannot be compiled runs uncompiled, the same, and the log says so once. Nothing here generates code."""

import logging
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_head import VOCABULARY, Case, configured
from torch import Tensor

from hpd_verl.head import compiling
from hpd_verl.head.bodies import Biases, Form, Rows, statistics
from hpd_verl.head.features import HiddenFeatures, teacher_features
from hpd_verl.head.output_head import Scaling
from hpd_verl.head.passes import Passes

pytestmark = pytest.mark.unit
word = ""


@pytest.fixture(autouse=True)
def nothing_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_given_up", set())
    monkeypatch.setattr(compiling, "_compiled", {})


def test_switched_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By torch's own switch: one line for the objective, one for the teacher's sums; no random number is used up."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    case = Case(config=configured("fkl", token_chunk_size=9))
    arguments = (case.teacher_hidden, case.teacher_head(), case.labels, 1.0, 6)
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            plain, gradients = case.run_with_gradients()
            found, others = case.run_with_gradients(teacher=teacher_features(*arguments, compiled=True), compiled=True)
            for gradient, other in zip([plain.loss, *gradients], [found.loss, *others], strict=True):
                torch.testing.assert_close(other, gradient)
    assert torch.equal(torch.get_rng_state(), before)
    off = "cannot be compiled (torch.compile is switched off, as by TORCHDYNAMO_DISABLE=1)"
    cost = "runs operation by operation, at about 10 times the memory traffic"
    assert caplog.messages == [f"the teacher's log-sum-exp: {off}; {cost}", f"objective fkl: {off}; {cost}"]


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Its error is named, for the teacher's sums within an objective's statistic too."""

    def fail(graph: Any, inputs: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(compiling, "_counted_inductor", fail)
    case = Case(config=configured("akl", token_chunk_size=9))
    bare = HiddenFeatures(case.teacher_hidden, case.teacher_head(), 1.0)
    with caplog.at_level(logging.WARNING):
        loss = case.run(teacher=bare, compiled=True).loss
    torch.testing.assert_close(loss, case.run(teacher=bare).loss)
    teacher, objective = caplog.messages
    assert teacher.startswith("the teacher's log-sum-exp: cannot be compiled (")
    assert objective.startswith("objective akl: cannot be compiled (")
    assert "OSError: no space left" in objective


def of_the_module(form: Any, rows: Tensor, others: Any) -> Tensor:
    return rows * len(word)


def test_code_that_reads_what_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compilation for each of its values, until torch refuses; never an old value."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(compiling, "_counted_inductor", lambda graph, inputs: graph)
    rows = torch.ones(3, 2)
    with torch._dynamo.config.patch(recompile_limit=2):
        for value in ("ab", "abc"):
            monkeypatch.setattr(f"{__name__}.word", value)
            assert torch.equal(compiling.run_compiled(of_the_module, "form", rows, ()), rows * len(value))
        monkeypatch.setattr(f"{__name__}.word", "abcd")
        with pytest.raises(compiling.NotCompilable):
            compiling.run_compiled(of_the_module, "form", rows, ())


def test_few_rows_are_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a form that is given up the second pass takes over from the first, as where none is compiled."""
    form = Form(Scaling(torch.float64))
    compiling.give_up(form, "this test", compiling.NotCompilable("made up"))
    index = torch.arange(3)
    rows = Rows(torch.randn(3, VOCABULARY, dtype=torch.float64), index, index > 0, torch.zeros(3))
    assert Passes(form, Biases(), compiled=True).read(rows)[1] is not None


def test_a_part_of_impossible_tokens_beside_a_huge_logit() -> None:
    """Its mass is 0, and so is what it adds to the entropy."""
    logits = torch.full((1, VOCABULARY + 64), -math.inf)
    logits[0, 3] = 3e38
    found = statistics(Scaling(torch.float32), logits, None)
    assert found.entropy.item() == 0.0
    assert found.log_sum_exp.item() == pytest.approx(3e38)


def test_one_token_is_sampled() -> None:
    case = Case()
    with pytest.raises(ValueError, match="uniforms: 2 numbers a token, and one token is sampled"):
        case.run(uniforms=case.uniforms.repeat(1, 2))


def test_a_step_takes_its_memory_from_the_one_before() -> None:
    """A CPU's buffers of one step are not given back to the system and fetched anew, page by page."""
    program = """
import resource, torch
from hpd_verl.head.output_head import keep_freed_memory
keep_freed_memory(torch.device("cpu"))
for step in range(6):
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [torch.zeros(1 << 18) for _ in range(8)]
    del buffers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert int(done.stdout) < 200  # of 2048 pages
