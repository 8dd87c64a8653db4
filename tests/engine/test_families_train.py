"""One step of the lean trainer equals plain transformers on each row alone, for families of every kind."""

import os
from collections.abc import Iterator
from pathlib import Path

import families
import pytest
from families import TOLERANCE, checked_config, off_by
from transformers import AutoModelForCausalLM
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

from hpd_verl.engine.saved_model import plain_log_probs
from hpd_verl.lean import ALONE
from hpd_verl.sft_trainer import HPDSFTTrainer

ONE_ROW = ("data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=1")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ALONE.items():
            if name not in os.environ:
                patch.setenv(name, value)
        initialize_global_process_group()
        yield
        destroy_global_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen2_moe", ()),  # packed: windows that layers do not hand on, experts
        ("gemma2", ()),  # soft caps
        ("gpt_oss", ()),  # sinks
        ("nemotron", ()),  # packed by sdpa
        ("qwen3_5_text", ()),  # padded: linear attention
        ("granitemoehybrid", ()),  # Mamba
        ("opt", ()),  # no positions
        ("bloom", ()),  # alibi, eager
        ("llama4_text", ()),  # chunks
        ("glm_moe_dsa", ONE_ROW),
        ("lfm2", ("model.override_config.attn_implementation=sdpa",)),
    ],
)
def test_a_step_is_that_of_each_row_alone(family: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    assert off_by(family, tmp_path, *overrides) < TOLERANCE


@pytest.mark.parametrize("family", ["deepseek_v4", "nemotron_h"])
def test_a_family_for_which_nothing_is_right(family: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.path=\S+: .*; choose another model, or one row a micro-batch: data"):
        off_by(family, tmp_path)


@pytest.mark.parametrize(("family", "overrides"), [("nemotron_h", ONE_ROW), ("phi3", ())])
def test_log_probs_of_a_checkpoint_are_those_of_each_row_alone(
    family: str, overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows share no micro-batch, or lie on both sides of a rope's switch."""
    switches = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
        "factor": 16.0,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
    }
    monkeypatch.setitem(families._KINDS_OF_LAYERS, "phi3", {"rope_parameters": switches})
    trainer = HPDSFTTrainer(checked_config(family, tmp_path, *overrides))
    found = trainer.engine.checkpoint_manager._log_probs()
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", attn_implementation="eager").eval()
    for values, expected in zip(found.values, plain_log_probs(student, found.rows), strict=True):
        assert values == pytest.approx(expected, abs=1e-4)
