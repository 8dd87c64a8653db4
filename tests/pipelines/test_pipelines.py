"""The two pipelines on one rank, through the interface that they share, as benchmarks/step.py drives them."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny
from omegaconf import open_dict
from verl.utils import tensordict_utils as tu
from verl.utils.metric import reduce_metrics

from hpd_verl.config import HPDConfig
from hpd_verl.pipelines.choice import PIPELINES
from hpd_verl.pipelines.one_pass import OnePassDriver
from hpd_verl.pipelines.staged import StagedDriver

ROOT = Path(__file__).resolve().parents[2]
Take = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def take_step(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, process_group: None) -> Iterator[Take]:
    """Take one step of an implementation of the benchmark on a student of its own; returns its metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import step

        def take(name: str, **settings: Any) -> dict[str, float]:
            paths = {"student": tiny.student, "teacher": tiny.teacher, "data": tiny.train}
            config = step.compose_config(argparse.Namespace(**paths, rows=4, longest=32))
            with open_dict(config):
                config.algorithm.hpd.update(settings)
            steps = step.Steps(config, 4, 32, tmp_path_factory.mktemp("store"))
            output = getattr(steps, name)()()
            return reduce_metrics(tu.get(output, "metrics"))

        yield take


def test_both_have_the_same_loss_and_gradient(take_step: Take) -> None:
    one_pass, staged = (take_step(name) for name in ("one_pass", "staged"))
    for name in ("hpd/loss", "grad_norm"):
        assert staged[name] == pytest.approx(one_pass[name], rel=2e-4)
    assert staged["grad_norm"] > 0


def test_what_a_driver_asks_of_the_update() -> None:
    """Nothing in one pass; staged its weights and, for several updates of more than a likelihood, old log-probs."""
    assert [(name, pipeline.driver) for name, pipeline in PIPELINES.items()] == [
        ("one_pass", OnePassDriver),
        ("staged", StagedDriver),
    ]
    hpd, sft = HPDConfig(), HPDConfig(objective="sft")
    assert OnePassDriver(hpd, updates_per_batch=4).update_inputs == []
    assert OnePassDriver(hpd, compares_rollouts=True).update_inputs == ["rollout_log_probs"]
    assert StagedDriver(hpd).update_inputs == ["advantages", "sampled_tokens", "sampled_weights"]
    assert StagedDriver(hpd, updates_per_batch=4).update_inputs == [
        *("advantages", "old_log_probs", "sampled_tokens", "sampled_weights", "old_sampled_log_probs")
    ]
    assert StagedDriver(sft, updates_per_batch=4).update_inputs == ["advantages"]
