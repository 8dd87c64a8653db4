"""A user's own objective, from the text of CONTRIBUTING.md."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hpd_verl.config import HPDConfig
from hpd_verl.head.distillation_head import distillation_head
from hpd_verl.head.output_head import OutputHead
from hpd_verl.objectives import registry

ROOT = Path(__file__).resolve().parents[2]


def documented_objective() -> str:
    """The example of CONTRIBUTING.md."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    return example


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example in a file; what it registers is gone after the test."""
    monkeypatch.setattr(registry, "OBJECTIVES", dict(registry.OBJECTIVES))
    file = tmp_path / "cross_entropy.py"
    file.write_text(documented_objective())
    return f"{file}:smoothed_label"


def test_the_example_is_short() -> None:
    assert len([line for line in documented_objective().splitlines() if line.strip()]) <= 8


def test_the_example_is_label_smoothing(own_file: str) -> None:
    """Alone, without a teacher, and in a mixture: loss and gradient are those of torch's cross-entropy."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8).double().requires_grad_(), torch.randn(11, 8).double()
    labels = torch.arange(6)

    def run(objective: Any) -> torch.Tensor:
        config = HPDConfig(objective=objective, smoothed_label={"smoothing": 0.2})
        assert not config.needs_teacher
        return distillation_head(
            hidden=hidden,
            head=OutputHead(weight, 11),
            labels=labels,
            uniforms=torch.empty(6, 0, dtype=torch.float64),
            token_scale=torch.full((6,), 1 / 6),
            is_rollout=torch.zeros(6, dtype=torch.bool),
            teacher=None,
            objectives=config.objectives,
            chunk_size=4,
        ).loss

    logits = hidden @ weight.T
    plain = torch.nn.functional.cross_entropy(logits, labels)
    smoothed = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    for found, wanted in ((run(own_file), smoothed), (run({own_file: 2.0, "sft": 0.5}), 2 * smoothed + 0.5 * plain)):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
        (gradient,) = torch.autograd.grad(found, hidden)
        (expected,) = torch.autograd.grad(wanted, hidden, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_a_parameter_outside_its_bounds_is_named(own_file: str) -> None:
    with pytest.raises(ValueError, match=r"^algorithm\.hpd\.smoothed_label\.smoothing=1: give a number of at least 0"):
        HPDConfig(objective=own_file, smoothed_label={"smoothing": 1})
