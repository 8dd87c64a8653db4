"""Which function a teacher is: what it computes hidden states and logits with.

``teacher_hashes`` reads every byte of the weights that transformers would load, once: ``FileHashes`` remembers files
that have not changed. On one core of an AMD EPYC with SHA instructions that takes 0.7 s a GiB, and less on more cores.

A teacher is its weights (with adapters), its configuration as loaded, and the code of models that bring their own. Left
out is what changes rounding at most, and what other parts of a store's identity hold:

    the attention's implementation, fused or tiled kernels, padding, caching of keys and values
    the dtype (``StoreIdentity.teacher_dtype``)
    the ids of special tokens, which no logit depends on; tokenizer and chat template (``StoreIdentity.tokenisation``)

A library that computes something else than it did, transformers itself for instance, is not seen.
"""

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig
from transformers.utils import cached_file
from verl.utils.fs import copy_to_local
from verl.workers.config import HFModelConfig

from hpd_verl.engine.weight_files import ADAPTER_WEIGHTS, weight_files

logger = logging.getLogger(__name__)

PATH_SETTING = "actor_rollout_ref.ref.model.path"
ADAPTER_SETTING = "actor_rollout_ref.ref.model.lora_adapter_path"

_WITHOUT_EFFECT = {
    "_attn_implementation",
    "_attn_implementation_internal",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys of a configuration, at any depth, that the function does not depend on, or that the identity has elsewhere."""


def teacher_hashes(model: HFModelConfig, hashes: "FileHashes") -> tuple[str, str]:
    """What a teacher's function depends on, as two sha256: of its weights and code, and of its configuration.

    Args:
        model: the teacher, its configuration loaded and overrides applied. A model of the hub is fetched, if need be:
            the files that are loaded, and no others.
        hashes: reads the files.

    Raises:
        ValueError: files of the weights are missing; the message names the setting and the files.
    """
    config = model.hf_config
    explicit, commit = getattr(config, "transformers_weights", None), getattr(config, "_commit_hash", None)
    files = model_files(str(model.local_path), explicit, commit)
    if model.lora_adapter_path is not None and model.lora_rank > 0:  # verl's own condition
        folder = copy_to_local(model.lora_adapter_path, use_shm=model.use_shm)
        files |= _named("lora", adapter_files(folder, ADAPTER_SETTING))
    if model.trust_remote_code:
        files |= _named("code", code_files(config, str(model.local_path)))
    digest = hashlib.sha256()
    for name, content in zip(sorted(files), hashes.of(files[name] for name in sorted(files)), strict=True):
        digest.update(f"{len(name)} {name} {content}\n".encode())
    return digest.hexdigest(), config_hash(config, model.external_lib)


def config_hash(config: PreTrainedConfig, external_lib: Any = None) -> str:
    """sha256 of a configuration as loaded, without the keys that have no effect on the function.

    Args:
        config: with all overrides applied.
        external_lib: verl's setting: modules imported before the model, which may change it.
    """
    content = {"config": _effective(config.to_dict()), "external_lib": external_lib}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _effective(value: Any) -> Any:
    if isinstance(value, Mapping):
        # Text: keys may be numbers, and of two types.
        return {str(key): _effective(item) for key, item in value.items() if key not in _WITHOUT_EFFECT}
    if isinstance(value, list | tuple):
        return [_effective(item) for item in value]
    return value


# The files that transformers would load


def model_files(source: str, explicit: str | None = None, commit: str | None = None) -> dict[str, Path]:
    """The weights of a model, by name: the one file or the index and its shards, and an adapter beside them.

    Args:
        source: a folder or a name on the hub.
        explicit: the file that the model's configuration names as its weights.
        commit: of a model of the hub, that its configuration was loaded from.

    Raises:
        ValueError: there are none, or not all.
    """
    adapter: dict[str, Path] = {}
    config = find_file(source, "adapter_config.json", commit)
    if config is not None:
        adapter = _named("adapter", adapter_files(source, PATH_SETTING))
        if not (Path(source) / "config.json").exists():  # transformers' condition
            source = json.loads(config.read_text())["base_model_name_or_path"]
    index, names = weight_files(f"{PATH_SETTING}={source}", lambda name: find_file(source, name, commit), explicit)
    found = {name: find_file(source, name, commit) for name in sorted(names)}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise ValueError(
            f"{PATH_SETTING}={source}: {len(missing)} of its {len(names)} weight files are missing "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); get the whole model"
        )
    files = {name: file for name, file in found.items() if file is not None}
    return files | adapter if index is None else {index.name: index} | files | adapter


def adapter_files(source: str, setting: str) -> dict[str, Path]:
    """The configuration and weights of a PEFT adapter, by name.

    Raises:
        ValueError: they are not there.
    """
    config = find_file(source, "adapter_config.json")
    for name in ADAPTER_WEIGHTS:
        weights = find_file(source, name)
        if config is not None and weights is not None:
            return {"adapter_config.json": config, name: weights}
    raise ValueError(
        f"{setting}={source}: no adapter there; give a folder with adapter_config.json and "
        f"{' or '.join(ADAPTER_WEIGHTS)}"
    )


def code_files(config: PreTrainedConfig, source: str) -> dict[str, Path]:
    """The Python files of a model that brings its own code, by name; none for transformers' own models."""
    files: dict[str, Path] = {}
    for target in (getattr(config, "auto_map", None) or {}).values():
        for reference in [target] if isinstance(target, str) else target:
            origin, is_other, _ = str(reference).rpartition("--")
            place = origin if is_other else source
            folder = Path(place) if Path(place).is_dir() else Path(snapshot_download(place, allow_patterns="*.py"))
            files |= {f"{origin}/{file.relative_to(folder)}": file for file in sorted(folder.rglob("*.py"))}
    return files


def _named(kind: str, files: Mapping[str, Path]) -> dict[str, Path]:
    return {f"{kind}/{name}": file for name, file in files.items()}


def find_file(source: str, name: str, commit: str | None = None) -> Path | None:
    """A file of a model: in its folder, or in the hub's cache, fetched if need be; None if there is none."""
    if Path(source).is_dir():
        file = Path(source) / name
        return file if file.is_file() else None
    try:
        found = cached_file(source, name, _commit_hash=commit, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        cause = str(error).split("\n")[0]
        raise ValueError(f"{PATH_SETTING}={source}: {name} cannot be found or fetched ({cause})") from error
    return None if found is None else Path(found)


# Hashes of files


class FileHashes:
    """sha256 of files' content, and a file that remembers them.

    A file counts as unchanged if its path (links resolved), size, inode, and times of the last change of content
    (mtime) and of anything (ctime, which no program can set) are the same. A hash is not remembered until the file has
    been left alone for a while: what is written within the same tick of the clock may carry the same times. A memory
    that is missing, torn, damaged or cannot be written only costs reading again.

    Args:
        memory: the file; None to remember nothing.
        settled_after: seconds without change after which a hash is remembered.
    """

    def __init__(self, memory: Path | None, settled_after: float = 60.0) -> None:
        self.memory = memory
        self.settled_after = settled_after
        self._known: dict[str, list[Any]] = {} if memory is None else _read_memory(memory)
        self._new: dict[str, list[Any]] = {}

    def of(self, files: Iterable[Path]) -> list[str]:
        """The hashes, in order, as hexadecimal text.

        Raises:
            ValueError: a file changed while it was read.
        """
        paths = [file.resolve() for file in files]
        before = {path: _state(path) for path in paths}
        found: dict[Path, str] = {}
        for path, state in before.items():
            *known, content = self._known.get(str(path), [None])
            if known == state:
                found[path] = content
        unknown = [path for path in before if path not in found]
        size = sum(path.stat().st_size for path in unknown)
        if size > 1 << 30:
            logger.info("reading the teacher's weights once, to identify them: %.3g GiB", size / (1 << 30))
        now = time.time_ns()
        for path, content in zip(unknown, _content_hashes(unknown), strict=True):
            found[path], state = content, _state(path)
            if state != before[path]:
                raise ValueError(f"{path}: changed while it was read; start again once it is written")
            _, modified, changed, _ = state
            if now - max(modified, changed) > self.settled_after * 1e9:
                self._new[str(path)] = [*state, content]
        return [found[path] for path in paths]

    def save(self) -> None:
        """Remember what was read."""
        if self.memory is None or not self._new:
            return
        files = _read_memory(self.memory) | self._new
        temporary = self.memory.with_name(f"{self.memory.name}.{secrets.token_hex(8)}.tmp")
        try:
            temporary.write_text(json.dumps({"files": files, "sha256": _memory_hash(files)}, indent=1) + "\n")
            temporary.replace(self.memory)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            logger.warning("%s: cannot be written (%s); the next run reads the weights again", self.memory, error)


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _memory_hash(files: dict[str, list[Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _read_memory(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_text())
        files = content["files"]
        return files if content["sha256"] == _memory_hash(files) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # a memory that cannot be read is none
        return {}


_BLOCK = 256 << 20
_PIECE = 4 << 20


def _content_hashes(files: list[Path]) -> list[str]:
    """sha256 of each file's size and of the sha256 of its blocks, which several threads read at once."""
    sizes = [file.stat().st_size for file in files]
    blocks = [(file, start) for file, size in zip(files, sizes, strict=True) for start in range(0, size, _BLOCK)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = pool.map(_block_hash, blocks)
        result = []
        for size in sizes:
            digest = hashlib.sha256(str(size).encode())
            for _ in range(0, size, _BLOCK):
                digest.update(next(read))
            result.append(digest.hexdigest())
    return result


def _block_hash(block: tuple[Path, int]) -> bytes:
    path, start = block
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        left = _BLOCK
        while left and (read := file.readinto(buffer[: min(left, _PIECE)])):
            digest.update(buffer[:read])
            left -= read
    return digest.digest()
