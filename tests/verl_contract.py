"""All that this package relies on in verl beyond its registries and documented calls: what, where, and why.

Written for the verl of ``plugin.VERL_VERSION``. ``tests/test_verl_contract.py`` compares each entry with the installed
verl, so that an upgrade fails there and says what changed, and finds what a class here relies on without an entry.
Names of what patches replace are in ``cpu.patches``, with tests of their own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Something of verl's.

    ``place`` is ``module:Class.name`` of a method or attribute, ``module`` or ``module:function`` of a text.
    """

    place: str
    used_in: str
    """File of this package."""
    why: str

    @property
    def name(self) -> str:
        """What the entry is called in messages."""
        return self.place


@dataclass(frozen=True)
class Method(Entry):
    """A method that is overridden or called."""

    parameters: str
    """Names of all parameters, in order, with stars."""


@dataclass(frozen=True)
class Attribute(Entry):
    """An attribute that verl's class sets or reads, and a class here reads or sets."""


@dataclass(frozen=True)
class Text(Entry):
    """Something that has no name to look up: a switch or a key as verl's source has it."""

    text: str
    """Of the source of ``place``."""
    used: str
    """Of the source of ``used_in``."""

    @property
    def name(self) -> str:
        return f"{self.place}: {self.text}"


def _methods(owner: str, used_in: str, signatures: Mapping[str, str]) -> Iterable[Entry]:
    """Of one class, from ``name(parameters)`` to why."""
    for signature, why in signatures.items():
        name, _, parameters = signature.removesuffix(")").partition("(")
        yield Method(f"{owner}.{name}", used_in, why, parameters)


def _attributes(owner: str, used_in: str, names: Mapping[str, str]) -> Iterable[Entry]:
    """Of one class, from names (separated by spaces) to why."""
    for group, why in names.items():
        for name in group.split():
            yield Attribute(f"{owner}.{name}", used_in, why)


def _texts(place: str, used_in: str, texts: Iterable[tuple[str, str, str]]) -> Iterable[Entry]:
    """Of one place, ``(text, what of it is used, why)``."""
    for text, used, why in texts:
        yield Text(place, used_in, why, text, used)


_TRAINER = "verl.trainer.ppo.v1.trainer_sync:PPOTrainerSync"
_WORKER = "verl.workers.engine_workers:ActorRolloutRefWorker"
_TRAINING_WORKER = "verl.workers.engine_workers:TrainingWorker"
_ENGINE = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"
_AGENT_LOOP = "verl.experimental.agent_loop.single_turn_agent_loop:SingleTurnAgentLoop"
_MANAGER = "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ"
_CHECKPOINTS = "verl.utils.checkpoint.fsdp_checkpoint_manager:FSDPCheckpointManager"
_DATASET = "verl.utils.dataset.rl_dataset:RLHFDataset"
_SFT = "verl.trainer.sft_trainer:SFTTrainer"

CONTRACT: tuple[Entry, ...] = (
    # The trainer
    *_methods(
        _TRAINER,
        "ppo/trainer.py",
        {
            "__init__(self, config)": "checks run before it, and what it derives from verl's own KL terms is set after",
            "_build_replay_buffer(self)": "the buffer of the mode sync, looking for responses more often",
            "_init_dataloader(self)": "too few rows for a batch are refused, the size of the teacher's store is said",
            "_init_resource_pool_mgr(self)": "student and teacher share a worker of this package",
            "on_init_end(self)": "weights go to the rollout server only before something is generated",
            "on_step_end(self)": "weights go to the rollout server only before something is generated",
            "on_sample_end(self)": "a server that was not woken is not put to sleep",
            "on_train_begin(self)": "from here on a signal lets the step under way end",
            "on_validate_end(self)": "a signal during validation needs no further step",
            "_next_train_batch(self, num_prompts)": "rows are numbered, and marked as demonstration or rollout",
            "_balance_batch(self, batch, metrics, logging_prefix, keep_minibatch)": "a reproducible order before it; "
            "row numbers after it",
            "_compute_old_log_prob(self, batch, metrics)": "the pipeline's student pass",
            "_compute_ref_log_prob(self, batch, metrics)": "the pipeline's teacher pass",
            "_compute_advantage(self, batch, metrics)": "the pipeline's weights; verl's reads a fixed list of fields",
            "_update_actor(self, batch, metrics)": "the update with the pipeline's fields",
            "_compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch)": "verl's metrics are those of "
            "rewards, which HPD does not have",
            "_get_n_gpus_for_throughput(self)": "the throughput in the log",
            "_load_checkpoint(self)": "resumes from complete checkpoints only",
            "_save_checkpoint(self)": "old checkpoints go after the new one is complete",
            "fit(self, agent_loop_manager)": "without its teacher the run ends with a checkpoint",
        },
    ),
    *_attributes(
        _TRAINER,
        "ppo/trainer.py",
        {
            "config": "the run's configuration",
            "global_steps total_training_steps": "counters of the draws and of the schedules; the second set to the "
            "first, the run ends after this step",
            "train_dataset": "number of rows and of dropped ones",
            "train_dataloader": "its state before a step, for a checkpoint where the step fails",
            "actor_rollout_wg ref_policy_wg": "workers that run the passes and the update",
            "checkpoint_manager": "weights to the rollout server",
            "role_worker_mapping mapping": "which worker class a role has",
            "trainer_mode": "set to sync: buffer and content of checkpoints depend on this name",
            "use_reference_policy": "set: verl would run no reference model without KL terms of its own",
            "_enable_hybrid_replicas": "set to False: no rollout server where nothing is generated",
        },
    ),
    *_texts(
        f"{_TRAINER}._setup",
        "ppo/trainer.py",
        [
            (
                'getattr(self, "_enable_hybrid_replicas", True)',
                "_enable_hybrid_replicas = False",
                "verl's switch for an empty list of replicas",
            ),
            (
                "elif Role.ActorRolloutRef in self.role_worker_mapping",
                "Role.ActorRolloutRef",
                "the role of a worker with student and teacher",
            ),
        ],
    ),
    *_texts(
        f"{_TRAINER}.fit",
        "ppo/trainer.py",
        [
            (
                "self.global_steps <= self.total_training_steps:",
                "self.total_training_steps = self.global_steps",
                "the loop's condition, which a signal makes false after the step",
            )
        ],
    ),
    *_texts(
        f"{_TRAINER}._build_replay_buffer",
        "ppo/trainer.py",
        [('self.trainer_mode == "sync"', 'trainer_mode = "sync"', "the buffer for one batch at a time")],
    ),
    *_texts(
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer",
        "ppo/trainer.py",
        [("time.sleep(self.poll_interval)", "poll_interval", "verl's default would be most of a small step")],
    ),
    *_texts(
        "verl.workers.rollout.llm_server:LLMServerManager",
        "ppo/trainer.py",
        [
            ("def create_empty(", "RolloutReplicaRegistry", "resolves the rollout's name without a replica"),
            ("self.rollout_config.nnodes > 0", "rollout.nnodes = 1", "asserted for standalone replicas, however few"),
        ],
    ),
    *_texts(
        "verl.experimental.reward_loop.reward_loop:RewardLoopManager",
        "ppo/trainer.py",
        [("for i in range(num_workers)", "reward.num_workers = 0", "no worker where nothing is generated")],
    ),
    *_texts(
        f"{_TRAINER}._save_checkpoint",
        "ppo/trainer.py",
        [
            ('.get("max_actor_ckpt_to_keep"', "max_actor_ckpt_to_keep", "off during verl's own save"),
            ('.get("remove_previous_ckpt_in_save"', "remove_previous_ckpt_in_save", "off during verl's own save"),
            ("torch.save(self.train_dataloader.state_dict(),", "_WithState(", "the state of the data's order"),
        ],
    ),
    *_texts(
        f"{_TRAINER}._save_checkpoint",
        "run/checkpoint.py",
        [
            ('"latest_checkpointed_iteration.txt"', "latest_checkpointed_iteration.txt", "verl's tracker file"),
            ('f"global_step_{self.global_steps}"', "global_step_", "verl's folders"),
        ],
    ),
    *_texts(
        "verl.trainer.ppo.padding_utils:upsample_batch_to_divisible_size",
        "ppo/trainer.py",
        [('f"pad{uuid.uuid4().hex}"', 'startswith("pad")', "verl's padding sequences come last in the order")],
    ),
    *_texts(
        "verl.trainer.ppo.padding_utils",
        "ppo/trainer.py",
        [("is_padding=True", '"is_padding"', "padding sequences do not count in the log")],
    ),
    # The worker
    *_methods(
        _WORKER,
        "ppo/worker.py",
        {
            "init_model(self)": "builds the pipeline of the two models after it",
            "update_actor(self, data)": "the pipeline's update",
            "save_checkpoint(self, local_path, hdfs_path, global_step, max_ckpt_to_keep)": "with the teacher's part",
            "load_checkpoint(self, local_path, hdfs_path, del_local_after_load)": "with the teacher's part",
            "__init__(self, config, role, distillation_config, **kwargs)": "the role without rollout is set after it",
        },
    ),
    *_attributes(
        "verl.single_controller.base.worker_group:WorkerGroup",
        "ppo/trainer.py",
        {"_dispatch_info": "the data-parallel rank of each worker, by which verl cuts a batch"},
    ),
    *_texts(
        "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer.generate",
        "ppo/agent_loop.py",
        [('setdefault("seed"', '["seed"]', "a request's own seed is vLLM's")],
    ),
    *_methods(
        _WORKER,
        "ppo/queue_batch.py",
        {
            "compute_log_prob(self, data)": "the student pass",
            "compute_ref_log_prob(self, data)": "the teacher pass",
        },
    ),
    *_attributes(
        _WORKER,
        "ppo/worker.py",
        {
            "config": "actor_rollout_ref; the teacher's model node is taken out, verl's dataclass does not know it",
            "actor ref": "workers of student and teacher",
            "actor_worker_cls ref_worker_cls": "set: the classes of these",
            "loss_fn": "verl's loss function holds the actor's configuration, made once",
            "role _is_rollout": "set: no rollout adapter where nothing is generated",
        },
    ),
    *_texts(
        f"{_WORKER}.init_model",
        "ppo/worker.py",
        [
            ("partial(ppo_loss, config=actor_config)", 'loss_fn.keywords["config"]', "the actor's configuration"),
            (
                "self.ref_worker_cls(config=",
                "ref_worker_cls = partial(",
                "the teacher has a model of its own",
            ),
            ('"ref" in self.role', '"actor_ref"', "verl builds what the role's name contains"),
            ('"actor" in self.role', '"actor_ref"', "verl builds what the role's name contains"),
            ('"rollout" in self.role', '"actor_ref"', "verl builds what the role's name contains"),
            ("omega_conf_to_dataclass(self.config.ref)", "del self.config.ref.model", "its dataclass has no model"),
        ],
    ),
    *_texts(
        f"{_WORKER}.init_model",
        "teacher/settings.py",
        [
            ("self.ref.reset()", "def reset(", "loads nothing: a teacher loads what it needs when it is prepared"),
            ("**self.ref.get_dispatch_collect()", "def get_dispatch_collect(", "the reference has no pass of its own"),
        ],
    ),
    *_texts(
        "verl.utils.checkpoint.checkpoint_handler:CheckpointHandler.save_checkpoint",
        "sft/demonstrations.py",
        [("self.train_dataloader.state_dict()", "def state_dict(", "of what was trained on, not of what is fetched")],
    ),
    *_methods(
        _TRAINING_WORKER,
        "teacher/colocated.py",
        {
            "__init__(self, config)": "the teacher's own model, and the engine that hands out hidden states",
            "reset(self)": "loads the model, here only when it is needed",
            "infer_batch(self, data)": "the teacher's pass",
            "set_loss_fn(self, loss_fn)": "what the pass makes of hidden states",
        },
    ),
    *_methods(
        _TRAINING_WORKER,
        "pipelines/one_pass.py",
        {
            "__init__(self, config)": "the engine that hands hidden states to the loss",
            "reset(self)": "an output layer that is not understood is refused once the model is there",
            "infer_batch(self, data)": "validation",
            "set_loss_fn(self, loss_fn)": "the loss from hidden states",
        },
    ),
    *_attributes(_TRAINING_WORKER, "pipelines/one_pass.py", {"engine model_config": "the student's engine and model"}),
    *_attributes(
        _TRAINING_WORKER,
        "teacher/colocated.py",
        {"engine engine_config": "the teacher's engine"},
    ),
    *_methods(_TRAINING_WORKER, "pipelines/updates.py", {"train_mini_batch(self, data)": "the updates of a batch"}),
    *_texts(
        f"{_TRAINING_WORKER}.train_mini_batch",
        "pipelines/updates.py",
        [
            ('key="epochs"', 'key="epochs"', "taken out of the batch there"),
            (
                "mini_batch_size // self.engine.get_data_parallel_size()",
                "def rows_of_ranks(",
                "a rank's own rows are cut into equal parts, in their order",
            ),
            ("append_to_dict(metrics, output)", "def batch_metrics(", "metrics are a list with a number an update"),
        ],
    ),
    *_texts(
        f"{_TRAINING_WORKER}.train_mini_batch",
        "ppo/trainer.py",
        [
            (f'key="{key}"', f"{key}=", "how a batch becomes updates")
            for key in ("mini_batch_size", "epochs", "seed", "dataloader_kwargs")
        ],
    ),
    *_texts(
        f"{_TRAINING_WORKER}.infer_batch",
        "ppo/queue_batch.py",
        [('key="compute_loss"', "compute_loss=True", "the loss function is called, which draws the tokens")],
    ),
    *_texts(
        f"{_TRAINING_WORKER}._postprocess_output",
        "ppo/trainer.py",
        [
            ('final_metrics["mfu"]', '"actor/mfu"', "renamed in the log"),
            ('final_metrics["grad_norm"]', '"actor/grad_norm"', "a norm that is not finite ends the run"),
        ],
    ),
    # The engine
    *_methods(
        _ENGINE,
        "engine/head_engine.py",
        {
            "__init__(self, model_config, engine_config, optimizer_config, checkpoint_config)": "its model type is one "
            "that verl can build",
            "_build_fsdp_module(self, module)": "the output layer is made replaceable before it is wrapped",
            "forward_step(self, micro_batch, loss_function, forward_only)": "the loss takes the output layer's place",
            "prepare_model_inputs(self, micro_batch)": "the model's inputs, packed or padded",
            "eval_mode(self, **kwargs)": "the probe of the output layer runs in it",
        },
    ),
    *_attributes(
        _ENGINE,
        "engine/head_engine.py",
        {
            "engine_config": "whether verl compiles",
            "module": "the model",
        },
    ),
    *_methods(
        _ENGINE,
        "engine/row_engine.py",
        {
            "__init__(self, model_config, engine_config, optimizer_config, checkpoint_config)": "its model type is one "
            "that verl can build",
            "initialize(self)": "the loaded model is tried with rows side by side",
            "eval_mode(self, **kwargs)": "the trial runs in it",
            "forward_backward_batch(self, data, loss_function, forward_only)": "what micro-batches are filled by",
        },
    ),
    *_attributes(
        _ENGINE,
        "engine/row_engine.py",
        {
            "_autocast_dtype": "the dtype of the model's products, of which verl tells no one",
            "model_config": "its model type is set",
            "module": "the model",
            "use_remove_padding use_ulysses_sp": "how rows share a micro-batch",
        },
    ),
    *_texts(
        f"{_ENGINE}._build_module",
        "engine/row_engine.py",
        [('self.model_config.model_type == "language_model"', '"language_model"', "the name that builds the module")],
    ),
    *_texts(
        f"{_ENGINE}.prepare_model_inputs",
        "engine/head_engine.py",
        [('key="use_remove_padding"', '"use_remove_padding"', "whether hidden states are packed")],
    ),
    *_texts(
        f"{_ENGINE}.prepare_model_outputs",
        "pipelines/staged.py",
        [
            ('key="distillation_use_topk"', '"distillation_use_topk"', "the logits go to the loss function"),
            ('key="distillation_only"', '"distillation_only"', "no log-probs are computed beside it"),
            (
                "logits_processor_func(student_logits=logits_rmpad.unsqueeze(0), data=micro_batch)",
                "student_logits: Tensor | None = None",
                "how the loss function gets them: [1, tokens of this rank, vocabulary], before the loss",
            ),
        ],
    ),
    *_texts(
        f"{_ENGINE}.forward_step",
        "pipelines/staged.py",
        [("loss_function(\n", 'kwargs["model_output"]', "how the loss function is called for the loss")],
    ),
    *_texts(
        f"{_ENGINE}.forward_backward_batch",
        "pipelines/one_pass.py",
        [
            (f"assign_non_tensor(data, {key}=", f'data["{key}"]', "what verl's aggregation divides by")
            for key in ("batch_num_tokens", "dp_size")
        ],
    ),
    *_texts(
        f"{_ENGINE}.forward_backward_batch",
        "pipelines/staged.py",
        [("sp_size=self.ulysses_sequence_parallel_size", 'key="sp_size"', "a rank's share of a sequence")],
    ),
    # Keys of batches
    *_texts(
        f"{_ENGINE}.prepare_model_inputs",
        "ppo/trainer.py",
        [
            (
                'micro_batch["temperature"]',
                '"temperature"',
                "the temperature of distillation, which logits are divided by",
            )
        ],
    ),
    *_texts(
        f"{_ENGINE}.prepare_model_inputs",
        "data/fields.py",
        [(f'micro_batch["{key}"]', f'"{key}"', "the model's inputs") for key in ("input_ids", "position_ids")],
    ),
    *_texts(
        f"{_ENGINE}.forward_backward_batch",
        "data/fields.py",
        [('data["loss_mask"]', '"loss_mask"', "the tokens of the global batch are counted in it")],
    ),
    *_texts(
        "verl.workers.utils.padding:no_padding_2_padding",
        "data/fields.py",
        [(f'data["{key}"]', f'"{key}"', "lengths of prompts and responses") for key in ("prompts", "responses")],
    ),
    *_texts(
        "verl.utils.debug.metrics:calculate_debug_metrics",
        "pipelines/staged.py",
        [
            (f'data.batch["{key}"]', f'"{key}"', "compares the rollout server's log-probs with the student's")
            for key in ("old_log_probs", "rollout_log_probs", "response_mask", "responses")
        ],
    ),
    *_texts(
        "verl.workers.engine.utils:prepare_micro_batches",
        "sft/demonstrations.py",
        [
            (f'"{key}"', f'"{key}"', "how a batch is split and packed")
            for key in ("use_dynamic_bsz", "max_token_len_per_gpu", "micro_batch_size_per_gpu")
        ],
    ),
    # Agent loop and its manager
    *_methods(
        _AGENT_LOOP,
        "ppo/agent_loop.py",
        {
            "__init__(self, *args, **kwargs)": "the chat template is read once",
            "run(self, sampling_params, priority, **kwargs)": "rollouts stop where demonstrations end",
            "ct_build_initial_tokens(self, messages, tools, images, videos, audios, mm_inputs_out)": "prompts are "
            "tokenised as for demonstrations",
            "_cap_text_prompt_length(self, prompt_ids)": "cut prompts are counted",
        },
    ),
    *_attributes(
        _AGENT_LOOP,
        "ppo/agent_loop.py",
        {
            "config tokenizer apply_chat_template_kwargs": "the run's configuration and the student's chat template",
            "rollout_config": "which server generates: vLLM takes a seed with each request",
            "loop": "tokenising does not hold up other answers",
        },
    ),
    *_methods(
        _MANAGER,
        "ppo/agent_loop_manager.py",
        {
            "__init__(self, *args, **kwargs)": "demonstrations are tokenised here",
            "create(*args, **kwargs)": "workers exist only where something is generated",
            "_init_agent_loop_workers(self)": "makes these workers",
            "generate_sequences(self, prompts)": "demonstrations are written to the queue here",
        },
    ),
    *_attributes(_MANAGER, "ppo/agent_loop_manager.py", {"config": "the run's configuration"}),
    *_texts(
        "verl.trainer.ppo.v1.agent_loop_tq",
        "ppo/agent_loop_manager.py",
        [
            ('f"{uid}_{session_id}_{i}"', "_0_0", "the key of a sequence"),
            *(
                (f'"{tag}"', f'"{tag}"', "a tag of a sequence, which verl reads")
                for tag in ("prompt_len", "response_len", "seq_len", "min_global_steps", "max_global_steps")
            ),
            ('status = "finished"', '"finished"', "the tag of a prompt whose sequences are there"),
            ('"status": "success"', '"status": "success"', "the tag of a sequence"),
        ],
    ),
    # Data
    *_methods(
        _DATASET,
        "data/dataset.py",
        {
            "_read_files_and_tokenize(self)": "rows are checked before, and overlong demonstrations dropped after it",
            "maybe_filter_out_long_prompts(self, dataframe)": "prompts are measured as they are trained, refusals said",
            "__getitem__(self, item)": "rows come as they were written",
        },
    ),
    *_attributes(
        _DATASET,
        "data/dataset.py",
        {
            "config": "verl's data node",
            "data_files original_data_files": "the files read; those given tell the split",
            "dataframe": "the rows",
            "prompt_key tokenizer apply_chat_template_kwargs": "prompts as verl finds and tokenises them",
            "filter_overlong_prompts max_prompt_length num_workers": "which prompts are left out, and by how many",
        },
    ),
    # The lean trainer
    *_methods(
        _SFT,
        "sft/trainer.py",
        {
            "__init__(self, config)": "settings are read before it",
            "_build_config(self)": "the engine's dtype",
            "_build_dataset(self)": "rows with demonstrations",
            "_build_engine(self)": "the student's worker with the engine that hands out hidden states",
            "_build_dataloader(self)": "the seed of the order; validation of every row",
            "_init_engine(self)": "the pipeline, once the student is loaded",
            "_build_ckpt_handler(self)": "resumes from complete checkpoints only",
            "fit(self)": "steps with a teacher, and an end by a signal; verl's computes its own loss",
        },
    ),
    *_attributes(
        _SFT,
        "sft/trainer.py",
        {
            "config checkpoint_config engine_config model_config optimizer_config profiler_config": "the run's "
            "configuration, whole and as verl's dataclasses",
            "training_client engine": "set: the student's worker; its engine",
            "train_dataset val_dataset": "set: rows with demonstrations",
            "train_dataloader val_dataloader train_sampler collate_fn": "batches",
            "global_batch_size train_batch_size_per_dp": "their sizes",
            "ckpt_handler": "saves and resumes",
            "device_name": "where a tensor for all ranks lies",
            "resume_global_step steps_per_epoch total_training_steps save_freq test_freq": "the course of the run",
        },
    ),
    *_attributes(
        "verl.utils.checkpoint.checkpoint_handler:CheckpointHandler",
        "sft/trainer.py",
        {
            "max_ckpt_to_keep": "off: old checkpoints go after the new one is complete",
            "resume_mode resume_from_path": "set to the checkpoint that is chosen here",
            "dp_rank": "names a rank's file of the data loader",
        },
    ),
    # Checkpoints
    *_methods(
        _CHECKPOINTS,
        "engine/student_checkpoints.py",
        {
            "__init__(self, model, optimizer, lr_scheduler, processing_class, checkpoint_config, trust_remote_code, "
            "**kwargs)": "made again in the place of the engine's",
            "save_checkpoint(self, local_path, hdfs_path, global_step, max_ckpt_to_keep)": "the model is written here",
            "load_checkpoint(self, local_path, hdfs_path, del_local_after_load)": "files hold data only",
        },
    ),
    *_attributes(
        _CHECKPOINTS,
        "engine/student_checkpoints.py",
        {
            "model": "the sharded model, of which the state is gathered",
            "checkpoint_save_contents": "whether the model is to be written",
            "should_save_hf_model": "set to False: verl does not write the model",
            "rank world_size": "names of a rank's files",
            "trust_remote_code": "the run's setting",
        },
    ),
    *_attributes(
        _ENGINE,
        "engine/student_checkpoints.py",
        {
            "checkpoint_manager": "set: the manager of this package",
            "module optimizer lr_scheduler model_config checkpoint_config": "what the manager is made of",
            "_autocast_dtype": "the dtype of the log-probs of the trained model",
        },
    ),
    *_methods(
        _ENGINE,
        "engine/student_checkpoints.py",
        {
            "infer_batch(self, data, loss_function)": "log-probs of the trained model",
            "eval_mode(self, **kwargs)": "for the pass that gives them",
        },
    ),
    *_texts(
        f"{_CHECKPOINTS}.save_checkpoint",
        "engine/student_checkpoints.py",
        [
            ('os.path.join(local_path, "huggingface")', '"huggingface"', "verl's folder, to which this package adds"),
            ("if self.should_save_hf_model:", "def should_save_hf_model", "the switch of verl's own writing"),
        ],
    ),
    *_texts(
        f"{_CHECKPOINTS}.load_checkpoint",
        "engine/student_checkpoints.py",
        [("weights_only=False", "check_pickles(", "files are looked at before verl runs what they say")],
    ),
    # The process
    *_texts(
        "verl",
        "plugin.py",
        [
            ('group="verl.plugins"', "verl.plugins", "the entry point that loads this package"),
            ("VERL_USE_EXTERNAL_PLUGINS", "VERL_USE_EXTERNAL_PLUGINS", "how to run verl without it"),
        ],
    ),
    *_texts(
        "verl.workers.engine.base:EngineRegistry",
        "cpu/__init__.py",
        [('os.getenv("VERL_ENGINE_DEVICE")', "VERL_ENGINE_DEVICE", "verl's engine serves a CPU under another name")],
    ),
    *_methods(
        "hydra.plugins.config_source:ConfigSource",
        "hydra_config.py",
        {"_get_header_dict(config_text)": "Hydra's: the package header of a configuration file"},
    ),
    *_attributes(
        "transformers:PreTrainedModel",
        "engine/families.py",
        {"_no_split_modules": "transformers': the decoder layers, whose weights are gathered one at a time"},
    ),
    *_attributes(
        "transformers:PreTrainedModel",
        "engine/row_layout.py",
        {"_supports_flash_attn": "transformers': what a class says of flash attention, installed or not"},
    ),
)
