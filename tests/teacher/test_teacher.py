"""The teacher of one rank on a tiny model in verl's engine: whose features its store serves, and which it keeps."""

import json
import logging
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import Tiny, main_ppo_config, make_nan_model, make_rows, sft_config, write_parquet
from omegaconf import DictConfig
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hpd_verl.ppo.trainer import HPDTrainer
from hpd_verl.sft.fill_store import fill
from hpd_verl.sft.start import checked

pytestmark = pytest.mark.usefixtures("process_group")


def configured(tiny: Tiny, folder: Path, *overrides: str) -> DictConfig:
    settings = [
        *tiny.sft,
        "data.num_workers=0",
        "algorithm.hpd.teacher_cache=disk",
        f"algorithm.hpd.teacher_cache_dir={folder}",
        "algorithm.hpd.teacher_cache_max_gib=0.01",
    ]
    return sft_config(*settings, *overrides)


def make_adapter(tiny: Tiny, folder: Path, seed: int) -> Path:
    """A LoRA adapter of the teacher that changes its logits."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.teacher), settings).save_pretrained(str(folder))
    return folder


def test_whose_features_are_served(tiny: Tiny, tmp_path: Path) -> None:
    """An override or an adapter that changes the teacher is another teacher; another attention is not."""
    store = tmp_path / "store"
    first = fill(configured(tiny, store))
    assert first["hpd/teacher_cache_rows"] > 0
    assert first["hpd/teacher_is_loaded"] == 1
    for harmless in ((), ("+teacher.model.override_config.attn_implementation=eager",)):
        again = fill(configured(tiny, store, *harmless))
        assert again["hpd/teacher_is_loaded"] == 0
        assert again["hpd/teacher_cache_rows"] == first["hpd/teacher_cache_rows"]
    wider = AutoModelForCausalLM.from_pretrained(tiny.teacher).config
    wider.rms_norm_eps = 0.1
    wider.save_pretrained(tmp_path / "config")
    adapter = make_adapter(tiny, tmp_path / "adapter", seed=1)
    others = {
        "teacher_config": ("+teacher.model.override_config.rms_norm_eps=0.1",),
        "teacher_config ": (f"+teacher.model.hf_config_path={tmp_path / 'config'}",),
        "teacher": ("+teacher.model.lora_rank=4", f"+teacher.model.lora_adapter_path={adapter}"),
    }
    for differs, overrides in others.items():
        with pytest.raises(
            ValueError, match=rf"{store}: holds features of another .*\({differs.strip()}: stored \w+, "
        ):
            fill(configured(tiny, store, *overrides))
    with_adapter = ("+teacher.model.lora_rank=4", f"+teacher.model.lora_adapter_path={adapter}")
    fill(configured(tiny, tmp_path / "adapted", *with_adapter))
    make_adapter(tiny, adapter, seed=2)
    with pytest.raises(ValueError, match=r"holds features of another .*\(teacher: stored"):
        fill(configured(tiny, tmp_path / "adapted", *with_adapter))


def test_top_k_store_needs_no_output_head(tiny: Tiny, tmp_path: Path) -> None:
    """Its rows are served without the teacher."""
    folder, topk = tmp_path / "store", "algorithm.hpd.teacher_cache_format=topk"
    first, again = (fill(configured(tiny, folder, topk)) for _ in range(2))
    assert (first["hpd/teacher_is_loaded"], again["hpd/teacher_is_loaded"]) == (1, 0)
    assert again["hpd/teacher_cache_hit_fraction"] == 1
    assert not (folder / "output_head.safetensors").exists()


def test_features_that_are_not_finite_are_not_stored(tiny: Tiny, tmp_path: Path) -> None:
    """A teacher that is NaN on rows with a 7: filling fails and names such rows, and the store has all others."""
    model = AutoModelForCausalLM.from_pretrained(tiny.teacher)
    seven = json.loads((tiny.teacher / "tokenizer.json").read_text())["model"]["vocab"]["7"]
    with torch.no_grad():
        model.get_input_embeddings().weight[seven] = float("nan")
    model.save_pretrained(tmp_path / "teacher")
    for file in tiny.teacher.glob("tokenizer*"):
        (tmp_path / "teacher" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "teacher" / "chat_template.jinja").write_bytes((tiny.teacher / "chat_template.jinja").read_bytes())

    rows = make_rows(16)
    words = [" ".join([row["prompt"][0]["content"], row["demonstration"]]).split() for row in rows]
    broken = {index for index, each in enumerate(words) if "7" in each}
    assert 0 < len(broken) < 16
    train = write_parquet(rows, tmp_path / "train.parquet")
    overrides = (f"teacher.model.path={tmp_path / 'teacher'}", f"data.train_files={train}")
    message = rf"^NaN or infinity in the teacher's features of {len(broken)} rows \(.*train.parquet row \d+"
    with pytest.raises(FloatingPointError, match=message) as refusal:
        fill(configured(tiny, tmp_path / "store", *overrides))
    named = {int(part.split("row ")[1].strip(" )")) for part in str(refusal.value).split(";")[0].split(",")}
    assert named <= broken
    whole = tmp_path / "whole.parquet"
    pd.read_parquet(train).drop(index=sorted(broken)).to_parquet(whole)
    metrics = fill(configured(tiny, tmp_path / "store", *overrides, f"data.train_files={whole}"))
    assert metrics["hpd/teacher_is_loaded"] == 0
    assert metrics["hpd/teacher_cache_hit_fraction"] == 1


def test_the_store_size_is_said_first(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fill(configured(tiny, tmp_path / "store", "algorithm.hpd.teacher_cache_max_gib=1e-5"))
    (line,) = [message for message in caplog.messages if "response tokens" in message]
    tokens = sum(len(row["demonstration"].split()) + 1 for row in make_rows(64))
    assert line.startswith(f"the teacher's features of 64 rows with {tokens} response tokens (counted) need ")
    share = 1e-5 * (1 << 30) / (64 * 64 + tokens * (64 * 2 + 8))
    assert f"algorithm.hpd.teacher_cache_max_gib=1e-05 keeps {share:.0%} of them" in line


def test_nan_everywhere(tiny: Tiny, tmp_path: Path) -> None:
    broken = make_nan_model(tiny.teacher, tmp_path / "teacher")
    with pytest.raises(FloatingPointError, match="of 64 rows"):
        fill(configured(tiny, tmp_path / "store", f"teacher.model.path={broken}"))
    assert not list((tmp_path / "store").glob("part-*"))


def test_memory_on_several_ranks_is_refused_by_the_driver(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either trainer, before a model loads."""
    message = "algorithm.hpd.teacher_cache=memory: rows change between the 2 ranks"
    settings = ["algorithm.hpd.teacher_cache=memory", "trainer.n_gpus_per_node=2", "trainer.nnodes=1"]
    config = main_ppo_config(*tiny.main_ppo, *settings)
    with pytest.raises(ValueError, match=f"^{message}"):
        HPDTrainer(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=f"^Error: {message}"):
        checked(configured(tiny, Path("unused"), "algorithm.hpd.teacher_cache=memory"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    checked(configured(tiny, Path("unused"), "algorithm.hpd.teacher_cache=memory"))  # one rank may
