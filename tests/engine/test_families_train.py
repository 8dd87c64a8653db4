"""One step of the lean trainer equals plain transformers on each row alone, for families of every kind."""

import json
from pathlib import Path

import families
import pytest
from families import TOLERANCE, checked_config, off_by
from transformers import AutoModelForCausalLM

from hpd_verl.engine.saved_model import plain_log_probs
from hpd_verl.sft.trainer import HPDSFTTrainer
from hpd_verl.tools.export import export

ONE_ROW = ("data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=1")


pytestmark = pytest.mark.usefixtures("process_group")


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


def _with_code(folder: Path) -> None:
    """Make a model one whose code comes with it."""
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_a_model_with_code_of_its_own_is_saved_with_it(tmp_path: Path) -> None:
    contents = "checkpoint.save_contents=[model,hf_model]"
    config = checked_config("llama", tmp_path, "model.trust_remote_code=true", contents, change=_with_code)
    HPDSFTTrainer(config)._save(1)
    said = export(tmp_path / "run", tmp_path / "out", dtype="fp32", trusts_code=True)
    assert "its log-probs are the trained model's" in said
    assert (tmp_path / "out" / "modeling_own.py").is_file()
    assert "modeling_own.OwnForCausalLM" in (tmp_path / "out" / "config.json").read_text()
