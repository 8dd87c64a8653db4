"""All checks of a command, the cheap ones first, before Ray, ranks or models start."""

import logging
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpd_verl.checks.data import check_prompts_fit, template_kwargs, texts_of_rows
from hpd_verl.checks.files_of_model import check_student_files
from hpd_verl.checks.models import can_check_here, check_models, without_copies
from hpd_verl.checks.row_layouts import Passes, choose_row_layout, model_nodes
from hpd_verl.checks.run import check_checkpoint_folder, check_config, check_sft_config
from hpd_verl.checks.vocabulary import check_embedded
from hpd_verl.config import HPDConfig, choose_pipeline, needs_rollout_server
from hpd_verl.data.files import RowRules, as_list, check_files, is_remote

logger = logging.getLogger(__name__)

DATASET_MODULE = "pkg://hpd_verl.data.dataset"
"""``data.custom_cls.path`` of configs/algorithm/hpd.yaml: the data set whose rows are known here."""


def _has_remote(files: list[Any]) -> bool:
    return any(isinstance(file, str) and is_remote(file) for file in files)


def _max_samples(config: DictConfig, files_setting: str) -> int:
    return OmegaConf.select(config, f"{files_setting.removesuffix('files')}max_samples", default=-1)


def _check_data_and_models(
    config: DictConfig,
    hpd: HPDConfig,
    models: Mapping[str, DictConfig],
    settings: Mapping[str, Any],
    rows_needed: Mapping[str, int],
    passes: Passes,
    validates_on_demonstrations: bool = False,
    serves_rollouts: bool = False,
) -> None:
    """Check files and rows, then models, then both together.

    Args:
        config: the composed configuration.
        hpd: the algorithm's settings.
        models: the model nodes of ``student`` and ``teacher``.
        settings: the names of these models' path settings.
        rows_needed: file setting to the rows that must be there at least.
        passes: what is asked of the models.
        validates_on_demonstrations: validation rows need demonstrations, too.
        serves_rollouts: a server answers with the student's weights.
    """
    data = config.data
    checked = {}
    for setting, needed in rows_needed.items():
        files = as_list(OmegaConf.select(config, setting))
        is_train = files == as_list(data.train_files) or validates_on_demonstrations
        checked[setting] = check_files(setting, files, RowRules.of(data, hpd, is_train))
        if _has_remote(files):
            continue  # which may hold the rows
        rows, limit = sum(file.rows for file in checked[setting]), _max_samples(config, setting)
        used = min(rows, limit) if limit > 0 else rows
        if used < needed:
            raise ValueError(
                f"data.train_batch_size={needed}: {setting} has {used} rows"
                + (f" with {setting.removesuffix('files')}max_samples={limit}" if used < rows else "")
                + ", less than one batch; lower it"
            )
    if not can_check_here(models["student"], models["teacher"]):
        return
    student = check_models(
        student=without_copies(models["student"]),
        teacher=without_copies(models["teacher"]),
        student_setting=settings["student"],
        teacher_setting=settings["teacher"],
        needed_context=data.max_prompt_length + data.max_response_length,
        template_kwargs=template_kwargs(data),
    )
    check_student_files(student, settings["student"], serves_rollouts)
    check_embedded(
        f"{settings['student']}={models['student'].path}",
        student.tokenizer,
        student.hf_config.vocab_size,
        template_kwargs(data),
        texts_of_rows([file for found in checked.values() for file in found], data.get("prompt_key", "prompt")),
    )
    names = [settings[role].removesuffix(".path") for role in ("student", "teacher")]
    for model in model_nodes(without_copies(models["student"]), without_copies(models["teacher"]), names):
        choose_row_layout(model, passes)
    for setting, found in checked.items():
        if _has_remote(as_list(OmegaConf.select(config, setting))):
            continue
        check_prompts_fit(
            setting,
            found,
            student.tokenizer,
            data,
            hpd,
            needed_rows=rows_needed[setting],
            max_samples=-1 if data.get("shuffle", False) else _max_samples(config, setting),
        )


def main_ppo_passes(config: DictConfig, pipeline: str) -> Passes:
    """What the passes of a run of main_ppo ask of its models.

    Args:
        config: the composed configuration.
        pipeline: one_pass or staged.
    """
    nodes, setting = config.actor_rollout_ref, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    rows = None if nodes.actor.use_dynamic_bsz else OmegaConf.select(config, setting)
    return Passes(
        longest_row=config.data.max_prompt_length + config.data.max_response_length,
        one_pass=pipeline == "one_pass",
        ulysses=max(nodes[role].get("ulysses_sequence_parallel_size", 1) for role in ("actor", "ref")) > 1,
        one_row=f"{setting}=1",
        fixed_rows=f"{setting}={rows}" if rows is not None else None,
        rows_share=rows != 1,
    )


def sft_passes(config: DictConfig) -> Passes:
    """The same of the lean trainer."""
    data = config.data
    rows = None if data.use_dynamic_bsz else data.micro_batch_size_per_gpu
    return Passes(
        longest_row=data.max_prompt_length + data.max_response_length,
        one_pass=True,
        one_row="data.use_dynamic_bsz=false data.micro_batch_size_per_gpu=1",
        fixed_rows=f"data.micro_batch_size_per_gpu={rows}" if rows is not None else None,
        rows_share=rows != 1,
    )


def check_temporary_folders(*variables: str) -> None:
    """Check that the folders for temporary files, which these variables of the environment name, can be written to.

    Raises:
        ValueError: one cannot, or without any of them there is none.
    """
    for variable in variables:
        folder = os.environ.get(variable)
        if folder is not None and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
            found = "cannot be written to" if os.path.isdir(folder) else "no such folder"
            raise ValueError(f"{variable}={folder}: {found}; make it, or unset the variable")
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ValueError(f"TMPDIR=: {error.strerror}; set it to a folder that can be written to") from error


def check_main_ppo(config: DictConfig) -> None:
    """Check a run of main_ppo with ``algorithm=hpd`` in the driver, before Ray starts.

    Raises:
        ValueError: one sentence that names the setting, what was found and what to do.
    """
    check_temporary_folders("TMPDIR", "RAY_TMPDIR")
    hpd = check_config(config)
    if config.trainer.save_freq > 0:
        check_checkpoint_folder(config.trainer.default_local_dir)
    rows_needed = {"data.train_files": config.data.train_batch_size}
    if as_list(config.data.val_files) != as_list(config.data.train_files):
        rows_needed["data.val_files"] = 1  # verl reads them whether or not it validates
    if config.data.custom_cls.path != DATASET_MODULE:
        logger.info("data files are not checked before the run starts: data.custom_cls.path is not %s", DATASET_MODULE)
        rows_needed = {}
    nodes = config.actor_rollout_ref
    _check_data_and_models(
        config,
        hpd,
        {"student": nodes.model, "teacher": nodes.ref.model},
        {"student": "actor_rollout_ref.model.path", "teacher": "actor_rollout_ref.ref.model.path"},
        rows_needed,
        main_ppo_passes(config, choose_pipeline(config, hpd)[0]),
        serves_rollouts=needs_rollout_server(config, hpd),
    )


def check_sft_run(config: DictConfig, ranks: int = 1, fills_store: bool = False) -> None:
    """Check a run of the lean trainer, or the filling of the teacher's store, before ranks meet.

    Args:
        config: the composed configuration.
        ranks: processes that torchrun has started.
        fills_store: the teacher's store is to be filled, without training.

    Raises:
        ValueError: one sentence that names the setting, what was found and what to do.
    """
    check_temporary_folders("TMPDIR")
    hpd = check_sft_config(config, ranks, fills_store)
    if not fills_store:  # the last step is saved in any case
        check_checkpoint_folder(config.trainer.default_local_dir)
    rows_needed = {"data.train_files": 1 if fills_store else config.data.train_batch_size}
    if config.data.val_files:
        rows_needed["data.val_files"] = 1
    _check_data_and_models(
        config,
        hpd,
        {"student": config.model, "teacher": config.teacher.model},
        {"student": "model.path", "teacher": "teacher.model.path"},
        rows_needed,
        sft_passes(config),
        validates_on_demonstrations=True,
    )
