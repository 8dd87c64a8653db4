"""All checks of a command, the cheap ones first, before Ray, ranks or models start."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.workers.config import HFModelConfig

from hpd_verl.checks.data import check_prompts_fit, template_kwargs, texts_of_rows
from hpd_verl.checks.files_of_model import check_student_files
from hpd_verl.checks.folders import check_checkpoint_folder, check_store, check_temporary_folders
from hpd_verl.checks.models import ModelUse, check_models, is_remote_model, load_model_config, without_copies
from hpd_verl.checks.resume import check_resume
from hpd_verl.checks.row_layouts import Passes, choose_row_layout, model_nodes
from hpd_verl.checks.run import check_config, check_sft_config, sft_ulysses
from hpd_verl.checks.settings import on_cpu
from hpd_verl.checks.teacher_server import check_teacher_server
from hpd_verl.checks.vocabulary import check_embedded
from hpd_verl.config import HPDConfig
from hpd_verl.data.files import DataFile, RowRules, as_list, check_files, is_remote
from hpd_verl.data.teacher_prompt import (
    KEY_SETTING,
    LENGTH_SETTING,
    TEMPLATE_SETTING,
    TeacherPrompts,
    max_teacher_prompt_length,
)
from hpd_verl.engine.families import head_size
from hpd_verl.errors import require
from hpd_verl.run.checkpoint import ACTOR, LEAN
from hpd_verl.run.choices import choose_pipeline, needs_rollout_server
from hpd_verl.teacher.model_config import teacher_model_config, teacher_name, teacher_nodes

logger = logging.getLogger(__name__)

DATASET_MODULE = "pkg://hpd_verl.data.dataset"
"""``data.custom_cls.path`` of configs/algorithm/hpd.yaml: the data set whose rows are known here."""

VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes of vLLM's attention on a CPU, without importing vLLM."""


def _has_remote(files: list[Any]) -> bool:
    return any(isinstance(file, str) and is_remote(file) for file in files)


def _max_samples(config: DictConfig, files_setting: str) -> int:
    return OmegaConf.select(config, f"{files_setting.removesuffix('files')}max_samples", default=-1)


def _check_data_and_models(
    config: DictConfig,
    hpd: HPDConfig,
    student_node: DictConfig,
    teacher_parent: DictConfig,
    uses: tuple[ModelUse, ModelUse],
    rows_needed: Mapping[str, int],
    passes: Passes,
    validates_on_demonstrations: bool = False,
    serves_rollouts: bool = False,
) -> HFModelConfig | None:
    """Check files and rows, then models, then both together.

    Args:
        config: the composed configuration.
        hpd: the algorithm's settings.
        student_node: the student's model node.
        teacher_parent: of its teacher's.
        uses: of student and teacher.
        rows_needed: file setting to the rows that must be there at least.
        passes: what is asked of the models.
        validates_on_demonstrations: validation rows need demonstrations, too.
        serves_rollouts: a server answers with the student's weights.

    Returns:
        The student's configuration; None where its model would have to be fetched.
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
    is_used = _check_teacher_prompts(config, hpd, checked, validates_on_demonstrations, passes)
    teachers = teacher_nodes(teacher_parent, hpd)
    remote = [str(node.path) for node in (student_node, *teachers.values()) if is_remote_model(node)]
    if remote:
        logger.info("not checked before the run starts, for they would have to be fetched: %s", ", ".join(remote))
        return None
    teachers = {name: without_copies(node) for name, node in teachers.items()}
    student_node = without_copies(student_node)
    longest = data.max_prompt_length + data.max_response_length
    of_teacher = max_teacher_prompt_length(data) + data.max_response_length if is_used else longest
    for name, node in teachers.items():
        student = check_models(
            student=student_node,
            teacher=node,
            uses=(uses[0], _use_of(name, uses[1], hpd)),
            needed_context=longest,
            template_kwargs=template_kwargs(data),
            teacher_context=of_teacher,
        )
    check_student_files(student, uses[0].setting, serves_rollouts)
    check_embedded(
        f"{uses[0].setting}={student_node.path}",
        student.tokenizer,
        student.hf_config.vocab_size,
        template_kwargs(data),
        texts_of_rows([file for found in checked.values() for file in found], data.get("prompt_key", "prompt")),
    )
    for name, own in hpd.of_each_teacher.items():
        use, node = _use_of(name, uses[1], hpd), teachers[name]
        if use.served and hpd.needs_teacher and node.get("path"):
            teacher = load_model_config(teacher_model_config(student_node, node), use.setting)
            check_teacher_server(own, use.setting, teacher, student, of_teacher)
    for model in model_nodes(student_node, teachers, [use.node for use in uses]):
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
    return student


def _use_of(name: str, single: ModelUse, hpd: HPDConfig) -> ModelUse:
    """How a teacher is used, by its name among several; ``single`` where it is the only one."""
    if not name or hpd.teachers is None:
        return single
    return dataclasses.replace(single, setting=f"{teacher_name(name, '')}.path", served=bool(hpd.teachers[name].urls))


def _check_teacher_prompts(
    config: DictConfig,
    hpd: HPDConfig,
    checked: Mapping[str, Sequence[DataFile]],
    validates_on_demonstrations: bool,
    passes: Passes,
) -> bool:
    """Check that what the teacher reads fits the run; whether it reads something else than the student.

    Raises:
        ValueError: the pipeline's teacher cannot, validation rows are without, or a setting that nothing reads.
    """
    data, prompts = config.data, TeacherPrompts.of(config.data)
    found = {
        setting: any(prompts.are_used(file.schema.names) for file in files)
        for setting, files in checked.items()
        if files
    }
    is_used = found.get("data.train_files", True)
    require(
        is_used or data.get("max_teacher_prompt_length") is None,
        LENGTH_SETTING,
        data.get("max_teacher_prompt_length"),
        f"no file has the column {prompts.key!r} ({KEY_SETTING}); add it, set {TEMPLATE_SETTING}, or leave this out",
    )
    validation = found.get("data.val_files", is_used) if validates_on_demonstrations else is_used
    require(
        validation == is_used,
        "data.val_files",
        data.val_files,
        f"the column {prompts.key!r} is {'not ' if is_used else ''}there, and in data.train_files it is"
        f"{'' if is_used else ' not'}; give both files alike, for one teacher reads them",
    )
    has_others = is_used if found else prompts.template is not None  # of other rows their trainer finds out
    require(
        not has_others or passes.one_pass or not hpd.needs_teacher,
        "algorithm.hpd.pipeline",
        hpd.pipeline,
        f"staged here, whose teacher reads the student's prompts, and the column {prompts.key!r} or {TEMPLATE_SETTING} "
        "has others; set algorithm.hpd.pipeline=one_pass, or take them out",
    )
    return is_used


def _wrapped(*engines: DictConfig) -> Any:
    """The classes that FSDP is to wrap, by the first engine that says so."""
    found = (OmegaConf.select(engine, "wrap_policy.transformer_layer_cls_to_wrap") for engine in engines)
    return next((layers for layers in found if layers), None)


def main_ppo_uses(config: DictConfig, hpd: HPDConfig) -> tuple[ModelUse, ModelUse]:
    """Student and teacher of a run of main_ppo."""
    nodes, (pipeline, _) = config.actor_rollout_ref, choose_pipeline(config, hpd)
    student, teacher = (
        ModelUse(
            f"{path}.path",
            f"actor_rollout_ref.{role}.fsdp_config",
            one_pass=pipeline == "one_pass",
            ulysses=nodes[role].get("ulysses_sequence_parallel_size", 1),
            layers=_wrapped(nodes[role].fsdp_config),
            served=role == "ref" and hpd.teacher_server.is_used,
        )
        for role, path in (("actor", "actor_rollout_ref.model"), ("ref", "actor_rollout_ref.ref.model"))
    )
    return student, teacher


def _longest_row(data: DictConfig) -> int:
    """Tokens of the longest row that a model gets, the student or a teacher."""
    longest: int = max(data.max_prompt_length, max_teacher_prompt_length(data)) + data.max_response_length
    return longest


def main_ppo_passes(config: DictConfig, pipeline: str) -> Passes:
    """Requirements of main_ppo's passes on its models.

    Args:
        config: the composed configuration.
        pipeline: one_pass or staged.
    """
    nodes, own = config.actor_rollout_ref, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    by_tokens = {
        own: nodes.actor.use_dynamic_bsz,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": nodes.ref.log_prob_use_dynamic_bsz,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": nodes.rollout.log_prob_use_dynamic_bsz,
    }
    rows = {setting: None if tokens else OmegaConf.select(config, setting) for setting, tokens in by_tokens.items()}
    shared = [f"{setting}={size}" for setting, size in rows.items() if size not in (None, 1)]
    return Passes(
        longest_row=_longest_row(config.data),
        one_pass=pipeline == "one_pass",
        ulysses=next(
            (
                f"actor_rollout_ref.{role}.ulysses_sequence_parallel_size={size}"
                for role in ("actor", "ref")
                if (size := nodes[role].get("ulysses_sequence_parallel_size", 1)) > 1
            ),
            "",
        ),
        # The others follow the actor's where they are not set.
        one_row=" ".join(f"{setting}=1" for setting, size in rows.items() if setting == own or size != rows[own]),
        fixed_rows=shared[0] if shared else None,
        rows_share=None in rows.values() or bool(shared),
    )


def sft_passes(config: DictConfig) -> Passes:
    """The same of the lean trainer."""
    data = config.data
    rows = None if data.use_dynamic_bsz else data.micro_batch_size_per_gpu
    return Passes(
        longest_row=_longest_row(data),
        one_pass=True,
        ulysses=f"engine.ulysses_sequence_parallel_size={shared}" if (shared := sft_ulysses(config)) > 1 else "",
        one_row="data.use_dynamic_bsz=false data.micro_batch_size_per_gpu=1",
        fixed_rows=f"data.micro_batch_size_per_gpu={rows}" if rows is not None else None,
        rows_share=rows != 1,
    )


def check_main_ppo(config: DictConfig) -> None:
    """Check a run of main_ppo with ``algorithm=hpd`` in the driver, before Ray starts.

    Raises:
        ValueError: one sentence that names the setting, what was found and what to do.
    """
    check_temporary_folders("TMPDIR", "RAY_TMPDIR")
    hpd = check_config(config)
    trainer = config.trainer
    if trainer.save_freq > 0 or hpd.teacher_server.n_gpus_per_node:  # whose servers' logs are there, too
        check_checkpoint_folder(trainer.default_local_dir)
    check_resume(
        trainer,
        config.actor_rollout_ref.actor.checkpoint,
        ranks=trainer.n_gpus_per_node * trainer.nnodes,
        counted="trainer.n_gpus_per_node * trainer.nnodes",
        folder=ACTOR,
        contents=ACTOR,
    )
    check_store(hpd)
    rows_needed = {"data.train_files": config.data.train_batch_size}
    if as_list(config.data.val_files) != as_list(config.data.train_files):
        rows_needed["data.val_files"] = 1  # verl reads them whether or not it validates
    if config.data.custom_cls.path != DATASET_MODULE:
        logger.info("data files are not checked before the run starts: data.custom_cls.path is not %s", DATASET_MODULE)
        rows_needed = {}
    nodes = config.actor_rollout_ref
    student = _check_data_and_models(
        config,
        hpd,
        nodes.model,
        nodes.ref,
        main_ppo_uses(config, hpd),
        rows_needed,
        main_ppo_passes(config, choose_pipeline(config, hpd)[0]),
        serves_rollouts=needs_rollout_server(config, hpd),
    )
    if student is not None and nodes.rollout.name == "vllm" and on_cpu() and needs_rollout_server(config, hpd):
        size = head_size(student.hf_config)
        require(
            size in VLLM_CPU_HEAD_SIZES,
            "actor_rollout_ref.model.path",
            student.path,
            f"attention heads of {size}; vLLM on a CPU supports {', '.join(map(str, VLLM_CPU_HEAD_SIZES))} only; "
            "choose another student, or train on demonstrations alone without validation",
        )


def check_fetched_models(config: DictConfig, hpd: HPDConfig) -> HFModelConfig:
    """The student's configuration, where the models may be fetched: those that the driver left out are checked.

    Raises:
        ValueError: as ``check_models``.
    """
    nodes, (of_student, of_teacher) = config.actor_rollout_ref, main_ppo_uses(config, hpd)
    teachers = teacher_nodes(nodes.ref, hpd)
    if not any(map(is_remote_model, (nodes.model, *teachers.values()))):
        return load_model_config(nodes.model, of_student.setting)
    for name, node in teachers.items():
        student = check_models(
            student=nodes.model,
            teacher=node,
            uses=(of_student, _use_of(name, of_teacher, hpd)),
            needed_context=config.data.max_prompt_length + config.data.max_response_length,
            template_kwargs=template_kwargs(config.data),
        )
    return student


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
        check_resume(
            config.trainer,
            config.checkpoint,
            ranks,
            counted="torchrun's --nproc_per_node times --nnodes",
            folder="",
            contents=LEAN,
            auto_takes_path=True,
        )
    check_store(hpd)
    rows_needed = {"data.train_files": 1 if fills_store else config.data.train_batch_size}
    if config.data.val_files:
        rows_needed["data.val_files"] = 1
    _check_data_and_models(
        config,
        hpd,
        config.model,
        config.teacher,
        (
            ModelUse("model.path", "engine", ulysses=sft_ulysses(config), layers=_wrapped(config.engine)),
            ModelUse(
                "teacher.model.path",
                "teacher.engine",
                ulysses=sft_ulysses(config),
                layers=_wrapped(config.teacher.engine, config.engine),
                served=bool(hpd.teacher_server.urls),
            ),
        ),
        rows_needed,
        sft_passes(config),
        validates_on_demonstrations=True,
    )
