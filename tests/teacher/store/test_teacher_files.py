"""Which teacher it is: every byte that transformers would load, the configuration as loaded, and nothing else."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_utils import _get_resolved_checkpoint_files
from verl.workers.config import HFModelConfig

from hpd_verl.teacher.store.teacher_files import FileHashes, config_hash, model_files, teacher_hashes


def make_teacher(folder: Path, shards: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="5KB" if shards else "1GB")
    return folder


def model_config(folder: Path | str, **settings: Any) -> HFModelConfig:
    return HFModelConfig(path=str(folder), load_tokenizer=False, **settings)


def identify(folder: Path | str, **settings: Any) -> tuple[str, str]:
    return teacher_hashes(model_config(folder, **settings), FileHashes(None))


def as_bin(folder: Path) -> Path:
    """The same weights as PyTorch's files."""
    for file in folder.glob("model*.safetensors"):
        torch.save(
            load_file(file), folder / file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        )
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()
    return folder


FORMS: dict[str, Callable[[Path], Path]] = {
    "one file": make_teacher,
    "shards": lambda folder: make_teacher(folder, shards=True),
    "bfloat16": lambda folder: make_teacher(folder, dtype=torch.bfloat16),
    "float16": lambda folder: make_teacher(folder, dtype=torch.float16),
    "bin": lambda folder: as_bin(make_teacher(folder)),
    "bin shards": lambda folder: as_bin(make_teacher(folder, shards=True)),
}


@pytest.mark.parametrize("form", FORMS)
def test_reads_what_transformers_would_load(form: str, tmp_path: Path) -> None:
    """Among files that it would not: other formats, checkpoints, and what is no weights."""
    folder = FORMS[form](tmp_path / "teacher")
    for name in ("consolidated.safetensors", "optimizer.bin", "README.md", "model-1.safetensors", "training_args.bin"):
        (folder / name).write_bytes(b"x")
    if "bin" not in form:
        (folder / "pytorch_model.bin").write_bytes(b"x")
    expected, _ = _get_resolved_checkpoint_files(str(folder), None, None, None, None, False)
    found = {str(file) for file in model_files(str(folder)).values() if not file.name.endswith(".json")}
    assert expected is not None
    assert found == set(expected)
    assert len(found) > 1 if "shards" in form else len(found) == 1
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_counts(form: str, tmp_path: Path) -> None:
    folder = FORMS[form](tmp_path / "teacher")
    seen = {identify(folder)}
    files = sorted({*folder.glob("*.safetensors"), *folder.glob("*.bin")})
    expected = 1
    for file in files:
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
        for name in tensors:
            changed = {key: value.clone() for key, value in tensors.items()}
            changed[name].view(-1)[-1] += 1
            save_file(changed, file) if file.suffix == ".safetensors" else torch.save(changed, file)
            seen.add(identify(folder))
            expected += 1
    assert len(seen) == expected > 10


def test_every_bit_of_quantised_weights_counts(tmp_path: Path) -> None:
    """Integer tensors as of GPTQ, in a file larger than a block that one thread reads."""
    folder = make_teacher(tmp_path / "teacher")
    packed = torch.arange(70_000_000, dtype=torch.int32)  # 267 MiB
    save_file({"q_proj.qweight": packed, "q_proj.scales": torch.ones(3).half()}, folder / "model.safetensors")
    file, seen = folder / "model.safetensors", {identify(folder)}
    size = file.stat().st_size
    for position in (8, 200, size // 3, (256 << 20) - 1, 256 << 20, size - 1):
        with open(file, "r+b") as stream:
            stream.seek(position)
            (byte,) = stream.read(1)
            stream.seek(position)
            stream.write(bytes([byte ^ 1]))
        seen.add(identify(folder))
    assert len(seen) == 7


def test_a_copy_is_the_same_teacher(tmp_path: Path) -> None:
    """Neither the folder, nor times, nor links, nor files that are not loaded count."""
    folder = make_teacher(tmp_path / "teacher", shards=True)
    identity = identify(folder)
    shutil.copytree(folder, tmp_path / "copy")
    for file in (tmp_path / "copy").iterdir():
        os.utime(file, (1, 1))
    (tmp_path / "copy" / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "copy" / "notes.txt").write_text("A teacher.")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "links").mkdir()
    for file in folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    for name in ("copy", "link", "links"):
        assert identify(tmp_path / name) == identity, name


# The configuration


def test_which_overrides_count(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher")
    weights, config = identify(folder)
    for harmless in (
        {"attn_implementation": "eager"},
        {"attn_implementation": "sdpa", "pad_token_id": 3, "eos_token_id": [4, 5], "use_cache": False},
        {"model_config": {"attn_implementation": "eager"}},
    ):
        assert identify(folder, override_config=harmless) == (weights, config), harmless
    for other in (
        {"rms_norm_eps": 0.1},
        {"hidden_act": "gelu"},
        {"model_config": {"rms_norm_eps": 0.1}},
        {"tie_word_embeddings": True},
    ):
        found = identify(folder, override_config=other)
        assert found[0] == weights
        assert found[1] != config, other
    loaded = AutoConfig.from_pretrained(folder)
    assert config_hash(loaded) == config
    loaded.rope_parameters["rope_theta"] = 20000.0
    assert config_hash(loaded) != config


def test_the_configurations_folder_counts(tmp_path: Path) -> None:
    """hf_config_path: its content, not its name."""
    folder = make_teacher(tmp_path / "teacher")
    identity = identify(folder)
    (tmp_path / "config").mkdir()
    content = json.loads((folder / "config.json").read_text())
    for changed, same in (
        (content | {"architectures": content["architectures"]}, True),
        (content | {"rms_norm_eps": 0.1}, False),
    ):
        (tmp_path / "config" / "config.json").write_text(json.dumps(changed))
        assert (identify(folder, hf_config_path=str(tmp_path / "config")) == identity) is same


def test_nested_configurations_count() -> None:
    """Models whose text part has its own; the attention of the part has no effect either."""
    from transformers import Gemma3Config

    first, second, third = Gemma3Config(), Gemma3Config(), Gemma3Config()
    assert config_hash(first) == config_hash(second)
    second.text_config._attn_implementation = "eager"
    second.text_config.pad_token_id = 7
    assert config_hash(first) == config_hash(second)
    third.text_config.sliding_window = 17
    assert config_hash(first) != config_hash(third)


def test_an_external_library_counts(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher")
    assert identify(folder, external_lib="this")[1] != identify(folder)[1]


# Adapters and code


def add_adapter(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "elsewhere"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"lora_A": torch.full((4, 4), value)}, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_counts(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher")
    adapter = add_adapter(tmp_path / "adapter")
    seen = {identify(folder)}
    assert identify(folder, lora_adapter_path=str(adapter)) in seen  # verl loads none without a rank
    seen.add(identify(folder, lora_adapter_path=str(adapter), lora_rank=2))
    add_adapter(tmp_path / "adapter", value=2.0)
    seen.add(identify(folder, lora_adapter_path=str(adapter), lora_rank=2))
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 2, "lora_alpha": 32'))
    seen.add(identify(folder, lora_adapter_path=str(adapter), lora_rank=2))
    shutil.copytree(adapter, folder, dirs_exist_ok=True)  # transformers loads an adapter in the model's own folder
    seen.add(identify(folder))
    seen.add(identify(folder, lora_adapter_path=str(adapter), lora_rank=2))
    assert len(seen) == 6
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"^actor_rollout_ref\.ref\.model\.lora_adapter_path={adapter}: no adapter"):
        identify(folder, lora_adapter_path=str(adapter), lora_rank=2)


def test_a_models_own_code_counts(tmp_path: Path) -> None:
    """Where it is run at all."""
    folder = make_teacher(tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text("VERSION = 1\n")
    trusted, not_trusted = identify(folder, trust_remote_code=True), identify(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert identify(tmp_path / "copy", trust_remote_code=True) == trusted
    (folder / "modeling_own.py").write_text("VERSION = 2\n")
    assert identify(folder, trust_remote_code=True) != trusted
    assert identify(folder) == not_trusted


# What is missing


def test_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(ValueError, match=rf"^actor_rollout_ref\.ref\.model\.path={folder}: no weights there; give a"):
        identify(folder)


@pytest.mark.parametrize("form", ["shards", "bin shards"])
def test_refuses_missing_shards(form: str, tmp_path: Path) -> None:
    folder = FORMS[form](tmp_path / "teacher")
    shards = sorted(file for file in folder.glob("*model-*"))
    shards[1].unlink()
    message = rf"path={folder}: 1 of its {len(shards)} weight files are missing \({shards[1].name}\); "
    with pytest.raises(ValueError, match=message):
        identify(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}'])
def test_refuses_an_index_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher", shards=True)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not an index of weights; copy or"):
        identify(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one sharded model in it, as the hub's client lays it out; offline."""
    source = make_teacher(tmp_path / "source", shards=True)
    repo = tmp_path / "hub" / "models--organisation--teacher"
    snapshot = repo / "snapshots" / ("0" * 40)
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for file in source.iterdir():
        shutil.copy(file, repo / "blobs" / f"blob-of-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-of-{file.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_model_of_the_hub(hub: Path, tmp_path: Path) -> None:
    """The same teacher as its folder; needs the files that are loaded, all of them, and no others."""
    identity = identify("organisation/teacher")
    assert identity == identify(tmp_path / "source") == identify(hub)
    (hub / "generation_config.json").unlink()
    assert identify("organisation/teacher") == identity
    shard = sorted(hub.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(
        ValueError, match=rf"path=organisation/teacher: 1 of its .* are missing \({shard.name}\); get the whole"
    ):
        identify("organisation/teacher")
    for file in hub.glob("model*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"path=organisation/teacher: no weights there; give"):
        identify("organisation/teacher")


# The memory of hashes


def bytes_read() -> int:
    """By this process so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def hashes_of(folder: Path, memory: Path | None, settled_after: float = 0.0) -> tuple[tuple[str, str], bool]:
    """The identity, and whether the weights were read for it."""
    model, before = model_config(folder), bytes_read()
    hashes = FileHashes(memory, settled_after)
    identity = teacher_hashes(model, hashes)
    has_read = bytes_read() - before > sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    hashes.save()
    return identity, has_read


def test_a_second_run_reads_nothing(tmp_path: Path) -> None:
    folder, memory = make_teacher(tmp_path / "teacher", shards=True), tmp_path / "memory.json"
    time.sleep(0.02)
    identity, has_read = hashes_of(folder, memory)
    assert has_read
    assert hashes_of(folder, memory) == (identity, False)
    (tmp_path / "link").symlink_to(folder)
    assert hashes_of(tmp_path / "link", memory) == (identity, False)
    shutil.copytree(folder, tmp_path / "copy")
    assert hashes_of(tmp_path / "copy", memory) == (identity, True)
    assert hashes_of(folder, memory) == (identity, False)
    assert hashes_of(tmp_path / "copy", memory) == (identity, False)


def edit_in_place(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        (byte,) = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))


def replace_file(file: Path) -> None:
    copy = file.with_name("copy")
    shutil.copy2(file, copy)
    edit_in_place(copy)
    copy.replace(file)


def point_the_link_elsewhere(file: Path) -> None:
    moved, other = file.parent.parent / "moved", file.parent.parent / "other"
    file.rename(moved)
    shutil.copy2(moved, other)
    edit_in_place(other)
    file.symlink_to(other)


@pytest.mark.parametrize("edit", [edit_in_place, replace_file, point_the_link_elsewhere])
def test_an_edit_with_the_old_size_and_time_is_seen(edit: Callable[[Path], None], tmp_path: Path) -> None:
    folder, memory = make_teacher(tmp_path / "teacher"), tmp_path / "memory.json"
    time.sleep(0.02)
    identity, _ = hashes_of(folder, memory)
    file = folder / "model.safetensors"
    before = file.stat()
    edit(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert hashes_of(folder, memory)[0] != identity


def test_a_file_just_written_is_not_remembered(tmp_path: Path) -> None:
    """A later edit might carry the same times."""
    folder, memory = make_teacher(tmp_path / "teacher"), tmp_path / "memory.json"
    identity, _ = hashes_of(folder, memory, settled_after=60.0)
    assert hashes_of(folder, memory, settled_after=60.0) == (identity, True)
    assert not memory.exists()


def test_a_torn_or_damaged_memory_is_none(tmp_path: Path) -> None:
    """Cut at every byte, or with any changed: the hashes are right, and remembered again."""
    folder, memory = make_teacher(tmp_path / "teacher"), tmp_path / "memory.json"
    time.sleep(0.02)
    identity, _ = hashes_of(folder, memory)
    content = memory.read_bytes()
    damaged = [content[:length] for length in range(0, len(content) - 2, 7)]
    damaged += [
        content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        for position in range(0, len(content), 7)
        if content[position : position + 1].isalnum()
    ]
    for bad in [*damaged, b"null", b"[]", b'{"files": 3, "sha256": 3}', b"\xff\xfe"]:
        memory.write_bytes(bad)
        assert hashes_of(folder, memory) == (identity, True), bad
    memory.write_bytes(content)
    assert hashes_of(folder, memory) == (identity, False)
    memory.write_bytes(b"{")
    hashes_of(folder, memory)
    assert hashes_of(folder, memory) == (identity, False)


def test_a_memory_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_teacher(tmp_path / "teacher")
    time.sleep(0.02)
    for memory in (tmp_path / "not" / "there" / "memory.json", Path("/proc/self/memory.json")):
        assert hashes_of(folder, memory)[0] == identify(folder)
        assert f"{memory}: cannot be written (" in caplog.text


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """A real writer, all the time."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(64 << 20))
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            edit_in_place(file)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pytest.raises(ValueError, match=rf"^{file}: changed while it was read; start again"):
            FileHashes(None).of([file])
    finally:
        stop.set()
        writer.join()
