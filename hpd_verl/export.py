"""A checkpoint as a model to use: one folder that transformers and vLLM load, with its tokenizer and a model card.

    python -m hpd_verl.export CHECKPOINT OUT [--lora merge|adapter] [--dtype bf16] [--score results.json]

CHECKPOINT is a run's folder, of which the checkpoint is taken that the run would resume from, or one of its
``global_step_N``, of either trainer. docs/export.md says more.
"""

import argparse
import contextlib
import glob
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from verl.model_merger.fsdp_model_merger import merge_non_dtensor_shards

from hpd_verl import checkpoint
from hpd_verl.checks.models import check_weights
from hpd_verl.data.chat_template import ChatTemplate
from hpd_verl.data.files import as_list, one_line

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_HUGGINGFACE = "huggingface"
_PEFT_PREFIX = "base_model.model."
_OF_TRAINING = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_name_or_path")
"""What a saved configuration may hold that is the training's alone."""


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
            raise ValueError(f"{setting}: no checkpoint there is whole; go on with the run until it saves one")
        path = chosen
    if path.name == _HUGGINGFACE:
        path = path.parent
    step_folder = path.parent if path.name == "actor" else path
    if checkpoint.is_incomplete(step_folder):
        raise ValueError(
            f"{setting}: not whole, its saving or removal was interrupted; choose one whose folder holds a file named "
            f"{checkpoint.COMPLETE}"
        )
    folder = step_folder / "actor" if (step_folder / "actor").is_dir() else step_folder
    if not (folder / _HUGGINGFACE / "config.json").is_file():
        raise ValueError(f"{setting}: no {_HUGGINGFACE}/config.json there; give a run's folder or its global_step_N")
    return folder


def _shard_files(folder: Path) -> list[Path]:
    """verl's files of the sharded model, one a rank; none where it was saved as ``hf_model`` alone.

    Raises:
        ValueError: some are missing.
    """
    if not any(folder.glob("model_world_size_*_rank_*.pt")):
        return []
    try:
        ranks = int(json.loads((folder / "fsdp_config.json").read_text())["world_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"CHECKPOINT={folder}: fsdp_config.json does not tell the number of ranks ({one_line(error)}); copy the "
            "checkpoint again"
        ) from error
    files = [folder / f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"CHECKPOINT={folder}: {len(missing)} of {ranks} files are missing, as {missing[0]}; bring the files of "
            "all nodes together"
        )
    return files


def _whole(name: str, parts: list[Any]) -> Tensor:
    """One tensor of what each rank holds of it."""
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
        ValueError: a file is torn.
    """
    shards = []
    for file in files:
        try:
            # Files of the user's own training: they hold DTensors, which torch reads by pickle only.
            shards.append(torch.load(file, map_location="cpu", weights_only=False, mmap=True))
        except Exception as error:  # of zip, pickle or torch
            raise ValueError(
                f"CHECKPOINT={folder}: {file.name} cannot be read ({one_line(error)[:120]}); it is cut short or "
                "damaged: copy it again, or take another checkpoint"
            ) from error
    for file, shard in zip(files, shards, strict=True):
        if not isinstance(shard, dict) or shard.keys() != shards[0].keys():
            raise ValueError(
                f"CHECKPOINT={folder}: {file.name}: no parameters, or others than those of {files[0].name}; copy the "
                "checkpoint again, or take another"
            )
    return {name: _whole(name, [shard[name] for shard in shards]) for name in shards[0]}


# ------------------------------ LoRA ------------------------------


def _split_lora(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Base weights under their names in the plain model, and the adapter's under those of peft's files."""
    base = {
        name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if ".lora_" not in name
    }
    adapter = {name.replace(".default.", "."): tensor for name, tensor in state.items() if ".lora_" in name}
    return base, adapter


def _lora_settings(folder: Path) -> tuple[int, float]:
    """Rank and alpha of the adapter.

    Raises:
        ValueError: verl did not leave them.
    """
    for file in (folder / "lora_train_meta.json", folder.parent / "lora_train_meta.json"):
        try:
            meta = json.loads(file.read_text())
            rank, alpha = int(meta["r"]), float(meta["lora_alpha"])
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            break
        if rank > 0 and alpha > 0:
            return rank, alpha
    raise ValueError(
        f"CHECKPOINT={folder}: lora_train_meta.json, with the adapter's r and lora_alpha, is missing or damaged; copy "
        "the checkpoint again"
    )


def _merge_lora(base: dict[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> None:
    """Add the adapter to its base weights, in float32 and in place."""
    for name, down in adapter.items():
        if ".lora_A." in name:
            up = adapter[name.replace(".lora_A.", ".lora_B.")]
            key = name.removeprefix(_PEFT_PREFIX).replace(".lora_A.", ".")
            base[key] = base[key].float() + scale * (up.float() @ down.float())


# ------------------------------ what is written ------------------------------


def _with_parameters(state: Mapping[str, Tensor], source: Path, dtype: torch.dtype, trusts_code: bool) -> Any:
    """A model of transformers with these parameters.

    Raises:
        ValueError: they are not those of the model in ``source``.
    """
    with _reading(source.parent, f"{_HUGGINGFACE}/config.json"), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trusts_code)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusts_code)
    try:
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"CHECKPOINT={source.parent}: its weights are not those of its {_HUGGINGFACE}/config.json "
            f"({one_line(error)[:200]}); copy the checkpoint again"
        ) from error
    model.tie_weights()
    return model


def _save_model(model: Any, source: Path, out: Path, end_token: int | None) -> None:
    """Write a model, whose generation stops at the token that ends an answer in its chat template."""
    generation = model.generation_config
    if (source / "generation_config.json").is_file():
        with _reading(source.parent, f"{_HUGGINGFACE}/generation_config.json"):
            generation = GenerationConfig.from_pretrained(source)
    found = generation.eos_token_id
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if end_token is not None and end_token not in ends:
        generation.eos_token_id = [end_token, *ends] if ends else end_token
    model.generation_config = generation
    model.save_pretrained(out)
    file = out / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in _OF_TRAINING}, indent=2) + "\n")


def _end_token(tokenizer: Any, settings: DictConfig | None) -> int | None:
    """The token that ended an answer in training; None without a chat template."""
    if not tokenizer.chat_template:
        return None
    template_kwargs = {} if settings is None else settings.data.get("apply_chat_template_kwargs") or {}
    return ChatTemplate(tokenizer, template_kwargs).turn_end([{"role": "user", "content": "question"}]).token


def _save_adapter(adapter: dict[str, Tensor], folder: Path, out: Path, dtype: torch.dtype, base_model: str) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    rank, alpha = _lora_settings(folder)
    targets = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapter})
    LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # peft divides it, whatever its type
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).save_pretrained(str(out))
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in adapter.items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})


def write_model(folder: Path, out: Path, dtype: torch.dtype, lora: str, settings: DictConfig | None) -> str:
    """Write weights, configuration and tokenizer.

    Args:
        folder: of ``find_checkpoint``.
        out: an empty folder.
        dtype: of the written weights.
        lora: ``merge`` or ``adapter``.
        settings: of the run.

    Returns:
        What was written, for the reader.

    Raises:
        ValueError: the checkpoint is torn, or does not hold what is asked for.
    """
    source, files = folder / _HUGGINGFACE, _shard_files(folder)
    trusts_code = bool(settings is not None and _student(settings).get("trust_remote_code", False))
    with _reading(folder, f"tokenizer or chat template in {_HUGGINGFACE}"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusts_code)
        end_token = _end_token(tokenizer, settings)
    state = load_shards(folder, files) if files else {}
    base, adapter = _split_lora(state)
    is_lora = bool(adapter) or any((place / "lora_train_meta.json").is_file() for place in (folder, folder.parent))
    if lora == "adapter" and not is_lora:
        raise ValueError(f"--lora=adapter: CHECKPOINT={folder} was trained without LoRA; leave --lora out")
    if is_lora and not adapter:  # verl's `hf_model` of such a run has names that transformers does not know
        raise ValueError(
            f"CHECKPOINT={folder}: a LoRA run whose adapter was not saved; train with `model` in "
            "checkpoint.save_contents"
        )
    written = "whole model"
    if lora == "adapter":
        _save_adapter(adapter, folder, out, dtype, "" if settings is None else str(_student(settings).path))
        written = "LoRA adapter"
    elif files:
        if adapter:
            if not base:
                raise ValueError(
                    f"--lora=merge: CHECKPOINT={folder} holds the adapter alone (save_lora_only); use --lora adapter"
                )
            rank, alpha = _lora_settings(folder)
            _merge_lora(base, adapter, alpha / rank)
            written = "whole model, LoRA merged"
        _save_model(_with_parameters(base, source, dtype, trusts_code), source, out, end_token)
    else:
        try:
            check_weights("CHECKPOINT", source)
        except ValueError as error:
            raise ValueError(f"{error} (checkpoint.save_contents needs `model` or `hf_model`)") from error
        with _reading(folder, _HUGGINGFACE):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trusts_code)
        _save_model(model, source, out, end_token)
    tokenizer.save_pretrained(out)
    return written


# ------------------------------ the model card ------------------------------


def _student(settings: DictConfig) -> DictConfig:
    node = settings.actor_rollout_ref.model if "actor_rollout_ref" in settings else settings.model
    assert isinstance(node, DictConfig)
    return node


def read_settings(folder: Path) -> DictConfig | None:
    """The settings that the trainer left in the checkpoint, None where it was not one of this package.

    Raises:
        ValueError: they are damaged.
    """
    step_folder = folder.parent if folder.name == "actor" else folder
    found = "no settings of a run"
    try:
        settings = OmegaConf.load(step_folder / checkpoint.SETTINGS)
        if isinstance(settings, DictConfig) and settings:
            _training_rows(settings)
            return settings
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        found = one_line(error)[:120]
    raise ValueError(f"CHECKPOINT={folder}: {checkpoint.SETTINGS} is damaged ({found}); copy the checkpoint again")


def read_scores(file: Path) -> dict[str, float]:
    """The numbers of a JSON file, nested ones under names joined by ``/``.

    Raises:
        ValueError: it is no JSON object, or holds no number.
    """
    try:
        content = json.loads(file.read_text())
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
        raise ValueError(f"--score={file}: no number in it; give an object of scores, as {{'gsm8k': 0.71}}")
    return found


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()


def _training_rows(settings: DictConfig) -> dict[str, Any]:
    """What the card says of the run."""
    is_ppo = "actor_rollout_ref" in settings
    student = _student(settings)
    teacher = settings.actor_rollout_ref.ref.model if is_ppo else settings.teacher.model
    hpd, data = settings.algorithm.hpd, settings.data
    rows: dict[str, Any] = {"Student": student.path}
    if teacher.path is not None and hpd.objective != "sft":
        rows["Teacher"] = teacher.path
    rows["Objective"] = hpd.objective
    if hpd.on_policy_objective is not None:
        rows["Objective of rollouts"] = hpd.on_policy_objective
    if is_ppo:
        rows["Share of rollouts"] = hpd.on_policy_fraction
    rows |= {
        "Temperature": hpd.temperature,
        "Data": ", ".join(str(file) for file in as_list(data.train_files)),
        "Prompt and response tokens": f"at most {data.max_prompt_length} and {data.max_response_length}",
        "Batch": f"{data.train_batch_size} rows",
        "Learning rate": (settings.actor_rollout_ref.actor if is_ppo else settings).optim.lr,
    }
    if student.get("lora_rank", 0):
        rows["LoRA"] = f"rank {student.lora_rank}, alpha {student.lora_alpha}"
    return rows


def _table(heads: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    cells = [heads, ("---", "---"), *rows.items()]
    return [f"| {' | '.join(' '.join(str(cell).replace('|', '/').split()) for cell in row)} |" for row in cells]


def model_card(name: str, folder: Path, settings: DictConfig | None, scores: Mapping[str, float], written: str) -> str:
    """README.md of the exported folder.

    Args:
        name: the model's.
        folder: of ``find_checkpoint``.
        settings: of the run; None if the checkpoint does not hold them.
        scores: by the name of the benchmark.
        written: of ``write_model``.
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
        raise ValueError(f"{setting}: it lies in the checkpoint or holds it; choose a folder of its own")
    if out.is_file() or out.is_symlink():
        raise ValueError(f"{setting}: a file or link; choose a folder that is not there yet")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{setting}: the folder is not empty; choose another, or add --overwrite")
    if not (out / "README.md").is_file() or not any(
        (out / name).is_file() for name in ("config.json", "adapter_config.json")
    ):
        raise ValueError(f"{setting}: the folder holds no exported model, so --overwrite leaves it; choose another")


def _replace(new: Path, out: Path) -> None:
    """Put a finished folder in its place; killed at any moment, ``out`` is whole or not there.

    Then what killed exports left beside it is removed.
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
) -> str:
    """Write a checkpoint as a folder to use.

    Args:
        source: a run's folder or a checkpoint.
        out: the folder; it appears when it is whole.
        dtype: of ``DTYPES``.
        lora: of a run with LoRA: ``merge`` or ``adapter``.
        score: JSON file of scores for the card.
        overwrite: replace an earlier export.

    Returns:
        One line on what was written.

    Raises:
        ValueError: one line on what is wrong.
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
        written = write_model(folder, partial, DTYPES[dtype], lora, settings)
        card = partial / "README.md"
        card.write_text(model_card(out.name, folder, settings, scores, written))
        for file in partial.iterdir():
            shutil.copymode(card, file)  # safetensors are written for the owner alone
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{out}: {written}, {dtype}, of {folder}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run's folder, or one of its global_step_N")
    parser.add_argument("out", type=Path, help="folder to write; not there yet, or empty")
    parser.add_argument("--lora", choices=["merge", "adapter"], default="merge", help="of a run with LoRA")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the weights")
    parser.add_argument("--score", type=Path, help="JSON file with scores for the model card")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUT")
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
            )
        )
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"Error: {one_line(error)}")


if __name__ == "__main__":
    main()
