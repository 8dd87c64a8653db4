"""Exports a checkpoint as one folder that transformers and vLLM load, with tokenizer and model card.

    hpd-verl export CHECKPOINT OUT [--lora merge|adapter] [--dtype bf16] [--score results.json]

CHECKPOINT is a run's folder (the checkpoint that it would resume from) or one of its ``global_step_N``, of either
trainer. Details: docs/export.md.
"""

import argparse
import contextlib
import copy
import glob
import logging
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel
from verl.model_merger.fsdp_model_merger import merge_non_dtensor_shards

from hpd_verl.checks.models import check_weights
from hpd_verl.data.chat_template import ChatTemplate
from hpd_verl.data.files import as_list
from hpd_verl.engine.saved_model import (
    ADAPTER,
    LOG_PROBS,
    LogProbs,
    SavedModelError,
    adapter_settings,
    as_loaded,
    check_adapter,
    check_written,
    end_tokens,
    is_adapter,
    load_written,
    plain_model,
    write_adapter,
    write_model,
)
from hpd_verl.errors import one_line
from hpd_verl.run import checkpoint

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_HUGGINGFACE = "huggingface"
_LORA_META = "lora_train_meta.json"
"""verl's file of an adapter's rank and alpha."""
_MAX_RANKS = 10**6


# ------------------------------ the checkpoint ------------------------------


@contextlib.contextmanager
def _reading(folder: Path, file: str) -> Iterator[None]:
    """Whatever a library raises on a file of the checkpoint becomes a line that names both.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        yield
    except Exception as error:  # of transformers, tokenizers, Jinja or the model's own code
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"CHECKPOINT={folder}: its {file} needs the model's own code; read it, then add --trust-remote-code"
            ) from error
        raise ValueError(
            f"CHECKPOINT={folder}: its {file} cannot be read ({one_line(error)[:200]}); copy the checkpoint again, or "
            "take another"
        ) from error


def find_checkpoint(path: Path) -> Path:
    """The folder with a checkpoint's files: ``global_step_N/actor`` of main_ppo, ``global_step_N`` of the lean trainer.

    Args:
        path: a run's folder of checkpoints, one of its checkpoints, or a folder in that.

    Raises:
        ValueError: there is no checkpoint, or it is known not to be whole.
    """
    setting = f"CHECKPOINT={path}"
    path = path.absolute()
    if not path.is_dir():
        raise ValueError(f"{setting}: no such folder; give a run's folder or one of its global_step_N")
    if any(path.glob("global_step_*")):
        chosen = checkpoint.checkpoint_to_resume(path, ".")
        if chosen is None:
            raise ValueError(f"{setting}: no complete checkpoint there; run until one is saved")
        path = chosen
    if path.name == _HUGGINGFACE:
        path = path.parent
    step_folder = path.parent if path.name == "actor" else path
    if checkpoint.is_incomplete(step_folder):
        raise ValueError(
            f"{setting}: incomplete, its saving or removal was interrupted; choose one with a file named "
            f"{checkpoint.COMPLETE}"
        )
    folder = step_folder / "actor" if (step_folder / "actor").is_dir() else step_folder
    if not (folder / _HUGGINGFACE / "config.json").is_file():
        raise ValueError(f"{setting}: no {_HUGGINGFACE}/config.json there; give a run's folder or its global_step_N")
    return folder


def _shard_files(folder: Path) -> list[Path]:
    """verl's files of the sharded model, one per rank; none if only ``hf_model`` was saved.

    Raises:
        ValueError: some are missing.
    """
    if not any(folder.glob("model_world_size_*_rank_*.pt")):
        return []
    try:
        ranks = checkpoint.read_json(folder / "fsdp_config.json").get("world_size")
        if type(ranks) is not int or not 1 <= ranks <= _MAX_RANKS:
            raise ValueError(f"world_size is {ranks!r}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"CHECKPOINT={folder}: fsdp_config.json has no number of ranks ({one_line(error)}); copy the checkpoint "
            "again"
        ) from error
    files = [folder / f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"CHECKPOINT={folder}: {len(missing)} of {ranks} files are missing, such as {missing[0]}; collect the "
            "files of all nodes"
        )
    return files


def _whole(name: str, parts: list[Any]) -> Tensor:
    """One tensor from its shards on all ranks."""
    first = parts[0]
    if not isinstance(first, DTensor):
        return merge_non_dtensor_shards(name, parts)
    placement: Any = first.placements[-1]  # before it, under HSDP, are copies
    if not placement.is_shard():
        return first.to_local()
    ranks = first.device_mesh.mesh.shape[-1]
    return torch.cat([part.to_local() for part in parts[:ranks]], dim=placement.dim)


def load_shards(folder: Path, files: list[Path]) -> dict[str, Tensor]:
    """The student's parameters, as they were trained, of verl's sharded files.

    Raises:
        ValueError: a file is torn, or holds more than data.
    """
    shards = []
    for file in files:
        try:
            shards.append(checkpoint.load_data(file))
        except ValueError as error:
            raise ValueError(f"CHECKPOINT={folder}: {error}") from error
    for file, shard in zip(files, shards, strict=True):
        tensors = isinstance(shard, dict) and all(isinstance(value, Tensor) for value in shard.values())
        if not tensors or shard.keys() != shards[0].keys():
            raise ValueError(
                f"CHECKPOINT={folder}: {file.name}: no parameters, or not those of {files[0].name}; copy the "
                "checkpoint again, or take another"
            )
    return {name: _whole(name, [shard[name] for shard in shards]) for name in shards[0]}


# ------------------------------ LoRA ------------------------------


def _adapter_settings(folder: Path, names: Collection[str], base_model: str) -> LoraConfig | None:
    """The settings of the run's adapter; None for a run without one.

    Args:
        folder: of ``find_checkpoint``.
        names: of the parameters, of which the adapted modules are read where verl alone saved them.
        base_model: of the adapter.

    Raises:
        ValueError: they are damaged, or missing where the parameters are an adapter's.
    """
    file = folder / ADAPTER
    try:
        if file.is_file():
            return adapter_settings(checkpoint.read_json(file), base_model)
        for file in (folder / _LORA_META, folder.parent / _LORA_META):  # verl's own, of a run without this package
            if file.is_file():
                targets = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names if ".lora_" in name})
                meta = checkpoint.read_json(file)
                alpha: Any = meta.get("lora_alpha")
                if type(alpha) not in (int, float) or not alpha > 0:
                    raise ValueError(f"lora_alpha is {alpha!r}, no number above 0")
                return adapter_settings(
                    {"r": meta.get("r"), "lora_alpha": alpha, "target_modules": targets}, base_model
                )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"CHECKPOINT={folder}: {file.name} has no settings of an adapter ({one_line(error)[:200]}); copy the "
            "checkpoint again"
        ) from error
    if any(map(is_adapter, names)):
        raise ValueError(
            f"CHECKPOINT={folder}: {ADAPTER}, with the adapter's settings, is missing; copy the checkpoint again"
        )
    return None


# ------------------------------ what is written ------------------------------


@contextlib.contextmanager
def _parameters(source: Path) -> Iterator[None]:
    """Parameters that do not fit their model become a line.

    Raises:
        ValueError: they are not those of the model in ``source``.
    """
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"CHECKPOINT={source.parent}: its weights are not those of its {_HUGGINGFACE}/config.json "
            f"({one_line(error)[:200]}); copy the checkpoint again"
        ) from error


def _generation_settings(source: Path, config: PretrainedConfig, end_token: int | None) -> GenerationConfig:
    """The checkpoint's, with all its end tokens and the chat template's end of an answer."""
    if (source / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(source)
    else:
        generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = end_tokens(end_token, generation.eos_token_id, config.eos_token_id)
    return generation


def _end_token(tokenizer: Any, settings: Mapping[str, Any] | None) -> int | None:
    """The token that ended an answer in training; None without a chat template."""
    if not tokenizer.chat_template:
        return None
    template_kwargs = {} if settings is None else settings["data"].get("apply_chat_template_kwargs") or {}
    return ChatTemplate(tokenizer, template_kwargs).turn_end([{"role": "user", "content": "question"}]).token


def _base_model(
    config: PretrainedConfig, state: Mapping[str, Tensor], folder: str, trusts_code: bool
) -> PreTrainedModel | None:
    """The model that an adapter belongs to, in float32: of the checkpoint, or of its folder; None without both."""
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in state.items()
        if not is_adapter(name)
    }
    if base:
        return as_loaded(plain_model(copy.deepcopy(config), base, trusts_code=trusts_code))
    return load_written(Path(folder), trusts_code) if Path(folder).is_dir() else None


def write_checkpoint(
    folder: Path,
    out: Path,
    dtype: torch.dtype,
    lora: str,
    settings: Mapping[str, Any] | None,
    trusts_code: bool = False,
    checks: bool = True,
) -> tuple[str, str]:
    """Write weights, configuration and tokenizer.

    Args:
        folder: of ``find_checkpoint``.
        out: an empty folder.
        dtype: of the written weights.
        lora: ``merge`` or ``adapter``.
        settings: of the run.
        trusts_code: the model may bring code of its own.
        checks: load what was written, and compare it with the trained model.

    Returns:
        What was written, and what the comparison found, for the reader.

    Raises:
        ValueError: the checkpoint is torn, or does not hold what is asked for.
        SavedModelError: what was written is not the trained model.
    """
    source, files = folder / _HUGGINGFACE, _shard_files(folder)
    with _reading(folder, f"{_HUGGINGFACE}/config.json"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trusts_code)
    with _reading(folder, f"tokenizer or chat template in {_HUGGINGFACE}"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusts_code)
        end_token = _end_token(tokenizer, settings)
    with _reading(folder, f"{_HUGGINGFACE}/generation_config.json"):
        generation = _generation_settings(source, config, end_token)
    with _reading(folder, LOG_PROBS):
        trained = LogProbs.read(folder / LOG_PROBS)
    state = load_shards(folder, files) if files else {}
    base_model = "" if settings is None else str(_student(settings)["path"])
    base_model = "" if "${" in base_model else base_model  # of an environment that is not known here
    adapter = _adapter_settings(folder, state, base_model)
    if lora == "adapter" and adapter is None:
        raise ValueError(f"--lora=adapter: CHECKPOINT={folder} was trained without LoRA; leave --lora out")
    merged = adapter is not None and not files and (folder / ADAPTER).is_file() and lora == "merge"
    if adapter is not None and not any(map(is_adapter, state)) and not merged:
        raise ValueError(
            f"CHECKPOINT={folder}: a LoRA run whose adapter was not saved; train with `model` in "
            "checkpoint.save_contents"
        )
    if lora == "adapter":
        assert adapter is not None
        with _parameters(source):
            write_adapter(config, state, adapter, out, dtype, trusts_code)
            written = "LoRA adapter"
            base = _base_model(config, state, base_model, trusts_code) if checks and trained is not None else None
        tokenizer.save_pretrained(out)
        if not checks or trained is None or base is None:
            return written, _unchecked(checks, trained, f"{base_model}, its base model, is not a folder here")
        return written, check_adapter(out, base, trained, dtype)
    if files:
        if adapter is not None and all(map(is_adapter, state)):
            raise ValueError(
                f"--lora=merge: CHECKPOINT={folder} holds the adapter alone (save_lora_only); use --lora adapter"
            )
        written = "whole model" if adapter is None else "whole model, LoRA merged"
        with _parameters(source):
            model = plain_model(config, state, adapter, dtype, trusts_code)
    else:
        try:
            check_weights("CHECKPOINT", source)
        except ValueError as error:
            raise ValueError(f"{error} (checkpoint.save_contents needs `model` or `hf_model`)") from error
        with _reading(folder, _HUGGINGFACE):
            loaded = load_written(source, trusts_code)
        written = "whole model, LoRA merged" if merged else "whole model"
        model = plain_model(config, loaded.state_dict(), None, dtype, trusts_code)
    write_model(model, out, generation, f"CHECKPOINT={folder}")
    del model, state
    tokenizer.save_pretrained(out)
    if not checks or trained is None:
        return written, _unchecked(checks, trained)
    return written, check_written(out, trained, dtype, trusts_code)


def _unchecked(checks: bool, trained: LogProbs | None, otherwise: str = "") -> str:
    """Why the written model was not compared with the trained one."""
    if not checks:
        return "not compared with the trained model (--no-check)"
    if trained is None:
        return f"not compared with the trained model (no {LOG_PROBS} in the checkpoint)"
    return f"not compared with the trained model ({otherwise})"


# ------------------------------ the model card ------------------------------


def _student(settings: Mapping[str, Any]) -> dict[str, Any]:
    node = settings["actor_rollout_ref"]["model"] if "actor_rollout_ref" in settings else settings["model"]
    assert isinstance(node, dict)
    return node


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings that the trainer left in the checkpoint, None where it was not one of this package.

    Raises:
        ValueError: they are damaged.
    """
    step_folder = folder.parent if folder.name == "actor" else folder
    try:
        settings = checkpoint.read_settings(step_folder)
        if settings is not None:
            _training_rows(settings)
        return settings
    except (ValueError, TypeError, AttributeError, AssertionError) as error:
        found = one_line(error)[:120]
    except KeyError as error:
        found = f"Missing key {error.args[0]}"
    raise ValueError(f"CHECKPOINT={folder}: {checkpoint.SETTINGS} is damaged ({found}); copy the checkpoint again")


def read_scores(file: Path) -> dict[str, float]:
    """The numbers of a JSON file, nested ones under names joined by ``/``.

    Raises:
        ValueError: it is no JSON object, or holds no number.
    """
    try:
        content = checkpoint.read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--score={file}: cannot be read as JSON ({one_line(error)}); give an object of scores"
        ) from error
    found: dict[str, float] = {}

    def collect(value: Any, names: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            for name, each in value.items():
                collect(each, (*names, str(name)))
        elif isinstance(value, int | float) and not isinstance(value, bool) and names:
            found["/".join(names)] = value

    collect(content, ())
    if not found:
        raise ValueError(f"--score={file}: no number in it; give an object of scores, such as {{'gsm8k': 0.71}}")
    return found


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()


def _training_rows(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The model card's rows about the run."""
    is_ppo = "actor_rollout_ref" in settings
    student = _student(settings)
    teacher = settings["actor_rollout_ref"]["ref"]["model"] if is_ppo else settings["teacher"]["model"]
    hpd, data = settings["algorithm"]["hpd"], settings["data"]
    rows: dict[str, Any] = {"Student": student["path"]}
    if teacher["path"] is not None and hpd["objective"] != "sft":
        rows["Teacher"] = teacher["path"]
    elif hpd.get("teachers"):  # one a source
        rows["Teacher"] = ", ".join(f"{each['path']} ({name})" for name, each in hpd["teachers"].items())
    rows["Objective"] = hpd["objective"]
    if hpd["on_policy_objective"] is not None:
        rows["Objective of rollouts"] = hpd["on_policy_objective"]
    if is_ppo:
        rows["Share of rollouts"] = hpd["on_policy_fraction"]
    rows |= {
        "Temperature": hpd["temperature"],
        "Data": ", ".join(str(file) for file in as_list(data["train_files"])),
        "Prompt and response tokens": f"at most {data['max_prompt_length']} and {data['max_response_length']}",
        "Batch": f"{data['train_batch_size']} rows",
        "Learning rate": (settings["actor_rollout_ref"]["actor"] if is_ppo else settings)["optim"]["lr"],
    }
    if student.get("lora_rank", 0):
        rows["LoRA"] = f"rank {student['lora_rank']}, alpha {student['lora_alpha']}"
    return rows


def _table(heads: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    cells = [heads, ("---", "---"), *rows.items()]
    return [f"| {' | '.join(' '.join(str(cell).replace('|', '/').split()) for cell in row)} |" for row in cells]


def model_card(
    name: str, folder: Path, settings: Mapping[str, Any] | None, scores: Mapping[str, float], written: str
) -> str:
    """README.md of the exported folder.

    Args:
        name: the model's.
        folder: of ``find_checkpoint``.
        settings: of the run; None if the checkpoint does not hold them.
        scores: by the name of the benchmark.
        written: of ``write_checkpoint``.
    """
    step_folder = folder.parent if folder.name == "actor" else folder
    step = step_folder.name.removeprefix("global_step_")
    header: dict[str, Any] = {
        "library_name": "peft" if written == "LoRA adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "hpd-verl"],
    }
    rows: dict[str, Any] = {}
    if settings is not None:
        rows = _training_rows(settings)
        if _is_hub_name(str(rows["Student"])):
            header["base_model"] = str(rows["Student"])
    rows |= {"Training steps": step, "Written as": written}
    lines = ["---", yaml.safe_dump(header, sort_keys=False).rstrip(), "---", "", f"# {name}", ""]
    if "Teacher" in rows:
        lines += [
            f"`{rows['Student']}`, taught by `{rows['Teacher']}` with objective `{rows['Objective']}` of hpd-verl.",
            "",
        ]
    lines += ["## Training", "", *_table(("", ""), rows), ""]
    if settings is None:
        lines += ["The checkpoint does not hold the settings of its run.", ""]
    lines += ["## Scores", ""]
    lines += _table(("benchmark", "score"), scores) if scores else ["Not evaluated."]
    return "\n".join([*lines, ""])


# ------------------------------ the command ------------------------------


def _check_out(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse to write where something else is.

    Raises:
        ValueError: the folder holds files, and they may not be replaced.
    """
    setting = f"OUT={out}"
    if source.is_relative_to(out) or out.is_relative_to(source):
        raise ValueError(f"{setting}: inside or around the checkpoint; choose another folder")
    if out.is_file() or out.is_symlink():
        raise ValueError(f"{setting}: a file or link; choose a new folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{setting}: the folder is not empty; choose another, or add --overwrite")
    if not (out / "README.md").is_file() or not any(
        (out / name).is_file() for name in ("config.json", "adapter_config.json")
    ):
        raise ValueError(f"{setting}: the folder holds no exported model, so --overwrite leaves it; choose another")


def _replace(new: Path, out: Path) -> None:
    """Move a finished folder into place; after a kill ``out`` is complete or missing.

    Then removes what killed exports left next to it.
    """
    old = out.with_name(f"{new.name}.old")
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.partial*"):  # of exports that were killed
        process = left.name.removeprefix(f".{out.name}.").split(".")[0]
        if process.isdigit() and not Path("/proc", process).exists():
            shutil.rmtree(left, ignore_errors=True)


def export(
    source: Path,
    out: Path,
    dtype: str = "bf16",
    lora: str = "merge",
    score: Path | None = None,
    overwrite: bool = False,
    trusts_code: bool = False,
    checks: bool = True,
) -> str:
    """Write a checkpoint as a folder to use.

    Args:
        source: a run's folder or a checkpoint.
        out: the folder; it appears when it is whole.
        dtype: of ``DTYPES``.
        lora: of a run with LoRA: ``merge`` or ``adapter``.
        score: JSON file of scores for the card.
        overwrite: replace an earlier export.
        trusts_code: run the code that the model brings, if it does.
        checks: load what was written by plain transformers, and compare it with the trained model.

    Returns:
        One line on what was written, and one on the comparison.

    Raises:
        ValueError: one line on what is wrong.
        SavedModelError: what was written is not the trained model; nothing is left of it.
    """
    folder, out = find_checkpoint(source), out.absolute()
    _check_out(out, folder, overwrite)
    scores = {} if score is None else read_scores(score)
    settings = read_settings(folder)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"OUT={out}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        try:
            written, compared = write_checkpoint(folder, partial, DTYPES[dtype], lora, settings, trusts_code, checks)
        except SavedModelError as error:
            raise SavedModelError(
                f"CHECKPOINT={folder}: loaded by transformers, {error}; report it, or skip the check by --no-check"
            ) from error
        card = partial / "README.md"
        card.write_text(model_card(out.name, folder, settings, scores, written))
        for file in partial.iterdir():
            shutil.copymode(card, file)  # safetensors are written for the owner alone
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{out}: {written}, {dtype}, of {folder}\n{out}: {compared}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run's folder, or one of its global_step_N")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument(
        "--lora",
        choices=["merge", "adapter"],
        default="merge",
        help="for LoRA runs: merged model, or adapter alone (%(default)s)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="dtype of the weights (%(default)s)")
    parser.add_argument("--score", type=Path, help="JSON file with scores for the model card")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUT")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with the trained model")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that the model's folder brings; read it first"
    )
    arguments = parser.parse_args()
    # It warns of meshes that are read without the training's processes, as all are here.
    logging.getLogger("torch.distributed.device_mesh").disabled = True
    try:
        print(
            export(
                arguments.checkpoint,
                arguments.out,
                dtype=arguments.dtype,
                lora=arguments.lora,
                score=arguments.score,
                overwrite=arguments.overwrite,
                trusts_code=arguments.trust_remote_code,
                checks=not arguments.no_check,
            )
        )
    except (ValueError, OSError, SafetensorError, SavedModelError) as error:
        sys.exit(f"Error: {one_line(error)}")


if __name__ == "__main__":
    main()
