"""Checkpoints of all layouts become models; what is torn, missing or in the way is refused in one line."""

import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Tiny, make_model
from omegaconf import OmegaConf
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

from hpd_verl.engine.saved_model import LogProbs, SavedModelError, plain_log_probs
from hpd_verl.run import checkpoint
from hpd_verl.tools.export import export, find_checkpoint, model_card, read_scores

TOKENS = torch.arange(1, 25).view(2, 12)
LEAN_SETTINGS: dict[str, Any] = {
    "model": {"path": "Qwen/Qwen2.5-1.5B", "lora_rank": 0},
    "teacher": {"model": {"path": "/models/a|b"}},
    "algorithm": {"hpd": {"objective": {"hpd": 1.0, "sft": 0.1}, "on_policy_objective": None, "temperature": 1.0}},
    "data": {
        "train_files": ["a.parquet", "b.parquet"],
        "train_batch_size": 8,
        "max_prompt_length": 16,
        "max_response_length": 16,
    },
    "optim": {"lr": 1e-5},
}


def save_checkpoint(root: Path, model: Path, step: int, actor: bool, shards: bool, weights: bool) -> Path:
    """A complete checkpoint in the layout of a trainer; returns the folder of its files."""
    step_folder = root / f"global_step_{step}"
    folder = step_folder / "actor" if actor else step_folder
    checkpoint.mark_incomplete(root, step)
    shutil.copytree(model, folder / "huggingface", ignore=None if weights else shutil.ignore_patterns("*.safetensors"))
    if shards:
        state = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
        torch.save(state, folder / "model_world_size_1_rank_0.pt")
        (folder / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 1}')
    checkpoint.mark_complete(root, step)
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


@pytest.mark.parametrize(
    ("actor", "shards", "weights", "tied"),
    [(True, True, True, False), (True, True, False, True), (False, True, False, False), (False, False, True, True)],
)
def test_every_layout_gives_the_same_logits(
    tmp_path: Path, actor: bool, shards: bool, weights: bool, tied: bool
) -> None:
    model = make_model(tmp_path / "model", seed=3, tie_word_embeddings=tied)
    save_checkpoint(tmp_path / "run", model, 2, actor, shards, weights)
    out = tmp_path / "exports" / "ünïcode model"
    assert str(out) in export(tmp_path / "run", out, dtype="fp32")
    assert torch.equal(logits(out), logits(model))
    assert not (tmp_path / "exports" / "model").exists()
    assert [entry.name for entry in out.parent.iterdir()] == [out.name]  # nothing is left of the writing
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(model).chat_template
    assert {file.stat().st_mode for file in out.iterdir()} == {(out / "README.md").stat().st_mode}


def test_the_dtype_is_the_weights_and_the_configurations(tiny: Tiny, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run", tiny.student, 1, actor=True, shards=True, weights=False)
    export(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.dtype == torch.bfloat16


def test_what_is_the_trainings_alone_stays_there(tiny: Tiny, tmp_path: Path) -> None:
    """The attention that verl wrote into the configuration; and generation stops where the chat template ends."""
    folder = save_checkpoint(tmp_path / "run", tiny.student, 1, actor=True, shards=True, weights=False)
    file = folder / "huggingface" / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"attn_implementation": "sdpa", "_name_or_path": "/home"})
    )
    GenerationConfig(eos_token_id=[5], temperature=0.7, do_sample=True).save_pretrained(folder / "huggingface")
    export(tmp_path / "run", tmp_path / "out")
    assert not {name for name in json.loads((tmp_path / "out" / "config.json").read_text()) if "attn_impl" in name}
    assert "/home" not in (tmp_path / "out" / "config.json").read_text()
    written = GenerationConfig.from_pretrained(tmp_path / "out")
    end = AutoTokenizer.from_pretrained(tiny.student).eos_token_id
    assert (written.eos_token_id, written.temperature) == ([end, 5], 0.7)


def test_a_runs_folder_gives_what_the_run_would_resume_from(tiny: Tiny, tmp_path: Path) -> None:
    for step in (9, 10):
        save_checkpoint(tmp_path, tiny.student, step, actor=True, shards=False, weights=True)
    checkpoint.mark_incomplete(tmp_path, 11)
    (tmp_path / "global_step_11" / "actor" / "huggingface").mkdir(parents=True)
    newest = tmp_path / "global_step_10" / "actor"
    assert find_checkpoint(tmp_path) == newest
    assert (
        find_checkpoint(newest) == find_checkpoint(newest.parent) == find_checkpoint(newest / "huggingface") == newest
    )
    with pytest.raises(ValueError, match=r"^CHECKPOINT=.*global_step_11: incomplete"):
        find_checkpoint(tmp_path / "global_step_11")


def spoil(folder: Path, case: str) -> None:
    shard, huggingface = folder / "model_world_size_1_rank_0.pt", folder / "huggingface"
    if case == "torn shard":
        shard.write_bytes(shard.read_bytes()[:50_000])
    elif case == "empty shard":
        shard.write_bytes(b"")
    elif case == "missing rank":
        (folder / "fsdp_config.json").write_text('{"world_size": 2}')
    elif case == "no fsdp_config":
        (folder / "fsdp_config.json").unlink()
    elif case == "other model":
        config = json.loads((huggingface / "config.json").read_text())
        (huggingface / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    elif case == "torn safetensors":
        shard.unlink()
        weights = huggingface / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif case == "no weights":
        shard.unlink()
        (huggingface / "model.safetensors").unlink()
    elif case == "LoRA without adapter":
        (folder / "lora_train_meta.json").write_text('{"r": 4, "lora_alpha": 16}')
    elif case == "torn settings":
        (folder / "settings.yaml").write_text("a: [")
    elif case == "empty settings":
        (folder / "settings.yaml").write_bytes(b"")
    elif case == "half of the settings":
        (folder / "settings.yaml").write_text("model:\n  path: x\n")
    elif case == "torn tokenizer":
        tokenizer = huggingface / "tokenizer.json"
        tokenizer.write_bytes(tokenizer.read_bytes()[:500])
    elif case == "no tokenizer":
        (huggingface / "tokenizer.json").unlink()
    elif case == "torn template":
        (huggingface / "chat_template.jinja").write_text("{% for")
    elif case == "config of another kind":
        (huggingface / "config.json").write_text("{}")
    elif case == "torn generation_config":
        (huggingface / "generation_config.json").write_text("{")
    elif case == "ranks of different runs":
        state = torch.load(shard)
        torch.save(state, folder / "model_world_size_2_rank_0.pt")
        state.pop("model.norm.weight")
        torch.save(state, folder / "model_world_size_2_rank_1.pt")
        (folder / "fsdp_config.json").write_text('{"world_size": 2}')
    elif case == "no parameters":
        torch.save([1], shard)


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("torn shard", "model_world_size_1_rank_0.pt cannot be read"),
        ("empty shard", "model_world_size_1_rank_0.pt cannot be read"),
        ("missing rank", "2 of 2 files are missing, such as model_world_size_2_rank_0.pt"),
        ("no fsdp_config", "has no number of ranks"),
        ("other model", "its weights are not those of its huggingface/config.json"),
        ("torn safetensors", "model.safetensors"),
        ("no weights", "no weights there"),
        ("LoRA without adapter", "a LoRA run whose adapter was not saved"),
        ("torn settings", "settings.yaml is damaged"),
        ("empty settings", "settings.yaml is damaged .no settings of a run"),
        ("half of the settings", "settings.yaml is damaged .Missing key teacher"),
        ("torn tokenizer", "its tokenizer or chat template in huggingface cannot be read"),
        ("no tokenizer", "its tokenizer or chat template in huggingface cannot be read"),
        ("torn template", "its tokenizer or chat template in huggingface cannot be read"),
        ("config of another kind", "its huggingface/config.json cannot be read"),
        ("torn generation_config", "its huggingface/generation_config.json cannot be read"),
        ("ranks of different runs", "model_world_size_2_rank_1.pt: no parameters, or not those of"),
        ("no parameters", "model_world_size_1_rank_0.pt: no parameters"),
    ],
)
def test_a_torn_checkpoint_is_refused(case: str, found: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "run", tiny.student, 1, actor=False, shards=True, weights=True)
    spoil(folder, case)
    with pytest.raises(ValueError, match=f"^CHECKPOINT=.*({found})") as caught:
        export(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"], "something was left behind"


# ------------------------------ files of others ------------------------------


class Planted:
    """Unpickled, it calls a function."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("place", ["as a parameter", "as the file", "beside parameters", "in legacy form"])
@pytest.mark.parametrize("kind", ["mkdir", "eval", "import", "numpy"])
def test_a_planted_pickle_runs_nothing(kind: str, place: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "run", tiny.student, 1, actor=True, shards=True, weights=True)
    ran = tmp_path / "ran"
    planted = {
        "mkdir": Planted(os.mkdir, str(ran)),
        "eval": Planted(eval, f"__import__('os').mkdir({str(ran)!r})"),
        "import": Planted(importlib.import_module, "antigravity"),
        "numpy": Planted(np.load, str(ran), None, True),
    }[kind]
    shard = folder / "model_world_size_1_rank_0.pt"
    state = torch.load(shard)
    content: Any = {"as the file": planted, "as a parameter": state | {"model.norm.weight": planted}}.get(
        place, state | {"extra": [planted]}
    )
    torch.save(content, shard, _use_new_zipfile_serialization=place != "in legacy form")
    with pytest.raises(
        ValueError, match=r"^CHECKPOINT=.*rank_0\.pt (holds code, not only data|cannot be read)"
    ) as caught:
        export(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not ran.exists()
    with pytest.raises(
        ValueError, match=r"^trainer\.resume_from_path=.*rank_0\.pt (holds code, not only data|cannot be read)"
    ):
        checkpoint.check_whole(
            OmegaConf.create({"resume_mode": "resume_path", "resume_from_path": str(folder.parent)}), "actor"
        )
    assert not ran.exists()
    assert "antigravity" not in sys.modules


def test_all_that_a_checkpoint_holds_is_data(tmp_path: Path) -> None:
    """Random states, an optimiser's, a data loader's with workers, and parameters of a mesh are read."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    loader = StatefulDataLoader(list(range(8)), num_workers=1, batch_size=2, shuffle=True)
    next(iter(loader))
    content = {
        "rng": BaseCheckpointManager.get_rng_state(),
        "generator": np.random.default_rng(0).bit_generator.state,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "loader": loader.state_dict(),
        "counts": np.arange(3, dtype=np.int64),
    }
    torch.save(content, tmp_path / "all.pt")
    read = checkpoint.load_data(tmp_path / "all.pt")
    assert read.keys() == content.keys()
    assert read["rng"]["random"] == content["rng"]["random"]
    assert (read["counts"] == content["counts"]).all()


def bring_code(folder: Path, ran: Path) -> None:
    """A model with code of its own, which makes a file."""
    huggingface = folder / "huggingface"
    (huggingface / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_of_nobody'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((huggingface / "config.json").read_text())
    config |= {
        "model_type": "own_of_nobody",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (huggingface / "config.json").write_text(json.dumps(config))


def test_a_folder_does_not_decide_that_its_code_runs(tiny: Tiny, tmp_path: Path) -> None:
    """Whatever its settings say; the command's flag does."""
    folder = save_checkpoint(tmp_path / "run", tiny.student, 1, actor=False, shards=True, weights=False)
    trusting = LEAN_SETTINGS | {"model": LEAN_SETTINGS["model"] | {"trust_remote_code": True}}
    (folder / "settings.yaml").write_text(yaml.safe_dump(trusting))
    bring_code(folder, tmp_path / "ran")
    with pytest.raises(ValueError, match=r"needs the model's own code; read it, then add --trust-remote-code"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    export(folder, tmp_path / "out", dtype="fp32", trusts_code=True)
    assert (tmp_path / "ran").exists()
    assert (tmp_path / "out" / "model.safetensors").is_file()


TURN = "<turn> {{ m['role'] }} {{ m['content'] }} <end> "


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("huggingface/chat_template.jinja", "{% for i in range(10**9) %}{% endfor %}" + TURN, "Range too big"),
        (
            "huggingface/chat_template.jinja",
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + TURN,
            "more than 1 s",
        ),
        ("huggingface/config.json", "[" * 100_000, "config.json cannot be read"),
        ("huggingface/generation_config.json", '{"a":' * 100_000, "generation_config.json cannot be read"),
        ("huggingface/tokenizer_config.json", "[" * 100_000, "tokenizer or chat template"),
        ("huggingface/tokenizer.json", "[" * 100_000, "tokenizer or chat template"),
        ("huggingface/config.json", "\udcff\udcfe{}", "config.json cannot be read"),
        ("huggingface/generation_config.json", "\udcff", "generation_config.json cannot be read"),
        ("fsdp_config.json", "[" * 100_000, "has no number of ranks"),
        ("fsdp_config.json", '{"world_size": 1e999}', "has no number of ranks"),
        ("fsdp_config.json", '{"world_size": 1000000000000}', "has no number of ranks"),
        ("adapter_config.json", "[" * 100_000, "adapter_config.json has no settings of an adapter"),
        ("adapter_config.json", '{"r": "8"}', "adapter_config.json has no settings of an adapter"),
        ("log_probs.json", '{"rows": 5}', "log_probs.json cannot be read"),
        ("settings.yaml", "[" * 10_000, "settings.yaml is damaged"),
        ("settings.yaml", "a: \udcff", "settings.yaml is damaged"),
        (
            "settings.yaml",
            "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
            "settings.yaml is damaged .it holds more settings than a run has",
        ),
    ],
)
def test_a_crafted_file_costs_one_line_and_little_time(
    file: str, content: str, found: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpd_verl.data.chat_template.RENDER_SECONDS", 1.0)
    folder = save_checkpoint(tmp_path / "run", tiny.student, 1, actor=False, shards=True, weights=True)
    (folder / file).write_text(content, errors="surrogateescape")
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"^CHECKPOINT=.*({found})") as caught:
        export(folder, tmp_path / "out")
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_neither_card_nor_settings_tell_the_environment(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was typed, what an interpolation gave before verl resolved it, and what a crafted file asks for."""
    monkeypatch.setenv("HPD_TEST_PLACE", "/secret/place")
    monkeypatch.setenv("HPD_TEST_API_KEY", "abcdefgh")
    monkeypatch.setenv("TOKENIZER_PATH", "/models/student")  # no secret, whatever its name begins with
    checkpoint.remember_environment()
    config = OmegaConf.create(
        {
            **LEAN_SETTINGS,
            "model": {"path": "${oc.env:HPD_TEST_PLACE}", "lora_rank": 0},
            "teacher": {"model": {"path": "${model.path}"}},
            "trainer": {
                "note": "key abcdefgh",
                "kept": "${oc.env:HPD_TEST_NOT_THERE,default}",
                "steps": 7,
                "from": "/models/student",
            },
        }
    )
    unresolved = copy.deepcopy(config)
    OmegaConf.resolve(config)
    for each, name in ((config, "resolved"), (unresolved, "unresolved")):
        folder = save_checkpoint(tmp_path / name, tiny.student, 1, actor=False, shards=True, weights=False)
        checkpoint.save_settings(tmp_path / name, 1, each)
        text = (folder / "settings.yaml").read_text()
        assert "/secret/place" not in text
        assert "abcdefgh" not in text
        assert "note: key ${oc.env:HPD_TEST_API_KEY}" in text
        assert "steps: 7" in text
        assert "from: /models/student" in text
        assert (folder / "settings.yaml").stat().st_mode & 0o777 == 0o600
        export(folder, tmp_path / f"{name} out")
        card = (tmp_path / f"{name} out" / "README.md").read_text()
        assert "| Student | ${oc.env:HPD_TEST_PLACE} |" in card
        assert "| Teacher | ${oc.env:HPD_TEST_PLACE} |" in card
        assert "/secret/place" not in card


def test_another_model_than_the_trained_one_is_not_exported(tiny: Tiny, tmp_path: Path) -> None:
    """By the log-probs that the checkpoint holds; without them it says that it did not look."""
    folder = save_checkpoint(tmp_path / "run", tiny.student, 1, actor=False, shards=True, weights=False)
    assert "not compared with the trained model (no log_probs.json" in export(folder, tmp_path / "a")
    rows = [[5, 6, 7, 8, 9], [4, 3]]
    for name, model in (("right", tiny.student), ("other", tiny.teacher)):
        values = plain_log_probs(AutoModelForCausalLM.from_pretrained(model), rows)
        LogProbs(rows, values, "float32").write(folder / "log_probs.json")
        if name == "right":
            for dtype in ("fp32", "bf16", "fp16"):
                said = export(folder, tmp_path / dtype, dtype=dtype)
                assert "its log-probs are the trained model's, within" in said
        else:
            with pytest.raises(SavedModelError, match=r"^CHECKPOINT=.*differ from the trained model's by .*--no-check"):
                export(folder, tmp_path / "out")
            assert not (tmp_path / "out").exists()
            assert "(--no-check)" in export(folder, tmp_path / "out", checks=False)


@pytest.mark.parametrize("tracker", ["9" * 5000, "9" * 30, "-1", "1e3", "\udcff", ""])
@pytest.mark.parametrize(
    "marker", ['{"number": 1e999, "limited": true}', '{"number": "a"}', "[" * 100_000, '{"number": 1' + "0" * 30 + "}"]
)
def test_markers_and_trackers_of_any_content(marker: str, tracker: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, tiny.student, 7, actor=False, shards=False, weights=True)
    (tmp_path / "global_step_007").mkdir()
    (tmp_path / f"global_step_{'9' * 200}").mkdir()
    (folder / "complete").write_text(marker)
    (tmp_path / checkpoint.TRACKER).write_text(tracker, errors="surrogateescape")
    assert find_checkpoint(tmp_path) == folder
    checkpoint.mark_incomplete(tmp_path, 8, folder)


def test_what_is_in_the_way_stays(tiny: Tiny, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "run", tiny.student, 1, actor=False, shards=False, weights=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    file = tmp_path / "file"
    file.write_text("x")
    for out, found in (
        (mine, "not empty"),
        (file, "a file or link"),
        (folder / "out", "inside or around the checkpoint"),
        (tmp_path, "inside or around the checkpoint"),
    ):
        with pytest.raises(ValueError, match=f"^OUT=.*{found}"):
            export(folder, out)
    with pytest.raises(ValueError, match="holds no exported model"):
        export(folder, mine, overwrite=True)
    assert (mine / "thesis.tex").read_text() == "x"

    out = tmp_path / "out"
    out.mkdir()  # empty: may be filled
    export(folder, out)
    (out / "stale").write_text("x")
    with pytest.raises(ValueError, match="add --overwrite"):
        export(folder, out)
    export(folder, out, overwrite=True)
    assert not (out / "stale").exists()


@pytest.mark.parametrize("layout", ["lean", "main_ppo"])
def test_the_card_says_teacher_objective_data_and_score(layout: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = LEAN_SETTINGS
    if layout == "main_ppo":
        settings = {
            "actor_rollout_ref": {
                "model": LEAN_SETTINGS["model"],
                "ref": LEAN_SETTINGS["teacher"],
                "actor": {"optim": LEAN_SETTINGS["optim"]},
            },
            "algorithm": {"hpd": LEAN_SETTINGS["algorithm"]["hpd"] | {"on_policy_fraction": 0.25}},
            "data": LEAN_SETTINGS["data"],
        }
    card = model_card("out", tmp_path / "global_step_7", settings, {"gsm8k": 0.5}, "whole model")
    assert "base_model: Qwen/Qwen2.5-1.5B\n" in card
    for row in (
        "| Teacher | /models/a/b |",  # no bar ends a cell
        "| Objective | {'hpd': 1.0, 'sft': 0.1} |",
        "| Data | a.parquet, b.parquet |",
        "| Training steps | 7 |",
        "| gsm8k | 0.5 |",
    ):
        assert row in card
    assert ("| Share of rollouts | 0.25 |" in card) == (layout == "main_ppo")


def test_scores_of_any_nesting(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"model": "x", "gsm8k": {"maj@8": 0.5, "passed": True}, "n": 3}))
    assert read_scores(file) == {"gsm8k/maj@8": 0.5, "n": 3}
    for content in ("", "[1]", "{}", "{"):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"^--score=.*results\.json: "):
            read_scores(file)


def test_a_folder_that_cannot_be_made_is_named(tiny: Tiny, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run", tiny.student, 1, actor=True, shards=True, weights=False)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"OUT=.*/file/out: cannot be written \(Not a directory\); choose another"):
        export(tmp_path / "run", tmp_path / "file" / "out")


def test_what_a_killed_export_left_is_removed(tiny: Tiny, tmp_path: Path) -> None:
    """That of a process that still runs is not."""
    save_checkpoint(tmp_path / "run", tiny.student, 1, actor=True, shards=True, weights=False)
    of_nobody = 2**30  # beyond all process ids
    for name in (f".out.{of_nobody}.partial", f".out.{of_nobody}.partial.old", f".out.{os.getppid()}.partial"):
        (tmp_path / name / "weights").mkdir(parents=True)
    export(tmp_path / "run", tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "out", f".out.{os.getppid()}.partial"}


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """The command, with a limit to a file's size in place of the disk's: one line, and no folder."""
    save_checkpoint(tmp_path / "run", tiny.student, 1, actor=True, shards=True, weights=False)
    command = f"{sys.executable} -m hpd_verl.tools.export {tmp_path}/run {tmp_path}/out --dtype fp32"
    limited = f"ulimit -f 100; exec {command}"
    run = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=100)
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert "File too large" in last
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "run"] == []
