"""One step of the lean trainer equals plain transformers on each row alone, for families of every kind."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from families import TOLERANCE, off_by
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

from hpd_verl.lean import ALONE

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
