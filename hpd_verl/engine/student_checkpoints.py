"""Contents of a student's checkpoint: verl's files, the trained model as a folder of transformers, its log-probs.

verl's own folder holds another model after LoRA or with an untied output layer, and its saving fails at generation
settings that transformers refuses to save. Its loading executes pickles.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig
from verl.utils import tensordict_utils as tu
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.fsdp_utils import get_fsdp_full_state_dict

from hpd_verl.engine.ranks import on_rank_zero
from hpd_verl.engine.saved_model import (
    LOG_PROBS,
    LogProbs,
    SavedModelError,
    adapter_settings,
    check_written,
    clean_configuration,
    end_tokens,
    plain_model,
    savable,
    token_rows,
    write_model,
)
from hpd_verl.run.checkpoint import check_pickles

logger = logging.getLogger(__name__)

HUGGINGFACE = "huggingface"
"""Folder of a checkpoint with the tokenizer, the configuration and, with ``hf_model``, the weights."""


class StudentCheckpoints(FSDPCheckpointManager):
    """verl's manager of the checkpoints of one engine.

    Args:
        engine: the student's, its model loaded.
        checks: load the first model that is written again, and compare it with the trained one.
    """

    def __init__(self, engine: Any, checks: bool) -> None:
        super().__init__(
            model=engine.module,
            optimizer=engine.optimizer,
            lr_scheduler=engine.lr_scheduler,
            processing_class=engine.model_config.get_processor(),
            checkpoint_config=engine.checkpoint_config,
            trust_remote_code=engine.model_config.trust_remote_code,
        )
        self.engine = engine
        self.is_checked = not checks

    @property
    def should_save_hf_model(self) -> bool:
        """Never by verl: ``save_checkpoint`` writes it."""
        return False

    def load_checkpoint(self, local_path: Any, *args: Any, **kwargs: Any) -> None:
        """verl's, of files that hold data only.

        Raises:
            ValueError: a file holds more.
        """
        if local_path is not None:
            own = f"*_world_size_{self.world_size}_rank_{self.rank}.pt"
            check_pickles(Path(local_path), f"CHECKPOINT={local_path}", own)
        super().load_checkpoint(local_path, *args, **kwargs)

    def save_checkpoint(self, local_path: Any, *args: Any, **kwargs: Any) -> None:
        """verl's, with the model as it was trained, settings of an adapter, and log-probs.

        Raises:
            SavedModelError: what was written is not what was trained.
        """
        super().save_checkpoint(local_path, *args, **kwargs)
        if local_path is None:
            return
        folder, trained = Path(local_path), self._log_probs()
        writes_model = "hf_model" in self.checkpoint_save_contents
        state: dict[str, Any] = {}
        if writes_model:  # all ranks together; the others get nothing
            state = get_fsdp_full_state_dict(self.model, offload_to_cpu=True, rank0_only=True)
        written = on_rank_zero(lambda: self._write(folder, state if writes_model else None, trained))
        state.clear()  # the comparison needs its room
        if written is not None and not self.is_checked:
            on_rank_zero(lambda: self._check(folder / HUGGINGFACE, trained, written))
            self.is_checked = True

    def _log_probs(self) -> LogProbs:
        """The trained model's log-probs of a few sequences, as the engine computes them. All ranks together."""
        model = self.engine.model_config
        context = getattr(model.hf_config.get_text_config(), "max_position_embeddings", None)
        rows = token_rows(model.hf_config, model.tokenizer.all_special_ids, context or 2**20)
        # As training does: not together where the model or the run wants each row alone, nor across a rope's switch.
        switch = self.engine.rope_switch
        together = self.engine.rows_share and (switch is None or max(map(len, rows)) <= switch)
        ids = [torch.tensor(row) for row in rows]
        nested = {
            "input_ids": ids,
            "position_ids": [torch.arange(len(row)) for row in rows],
            "loss_mask": [torch.ones(len(row), dtype=torch.int64) for row in rows],
        }
        data = tu.get_tensordict(
            {name: torch.nested.as_nested_tensor(tensors, layout=torch.jagged) for name, tensors in nested.items()},
            {
                "temperature": 1.0,
                "use_remove_padding": model.use_remove_padding,
                "use_dynamic_bsz": False,
                "micro_batch_size_per_gpu": len(rows) if together else 1,
                "pad_token_id": model.tokenizer.pad_token_id or 0,
            },
        )
        with self.engine.eval_mode(disable_auto_offload=True):
            output = self.engine.infer_batch(data)
        # The entry of a token belongs to the one after it.
        values = [row[:-1].float().tolist() for row in output["model_output"]["log_probs"].unbind()]
        dtype = self.engine._autocast_dtype
        return LogProbs(rows, values, str(dtype).removeprefix("torch."))

    def _write(self, folder: Path, state: dict[str, Any] | None, trained: LogProbs) -> torch.dtype | None:
        """Write rank 0's additions to verl's files; returns the dtype of the written weights, or None.

        Args:
            folder: of the checkpoint's files.
            state: all parameters, where the model is written.
            trained: the trained model's log-probs.
        """
        model = self.engine.model_config
        out = folder / HUGGINGFACE
        clean_configuration(out)
        source = AutoConfig.from_pretrained(model.local_hf_config_path, trust_remote_code=self.trust_remote_code)
        if self.trust_remote_code:  # verl copies the code of FSDP's class, which has taken the model's place
            for file in Path(model.local_hf_config_path).glob("*.py"):
                shutil.copyfile(file, out / file.name)
        config = AutoConfig.from_pretrained(out, trust_remote_code=self.trust_remote_code)
        # verl lets the configuration end at the tokenizer's token alone.
        config.eos_token_id = end_tokens(config.eos_token_id, source.eos_token_id)
        generation = model.generation_config or GenerationConfig.from_model_config(source)
        generation.eos_token_id = end_tokens(generation.eos_token_id, config.eos_token_id)
        adapter = None
        unwrapped: Any = getattr(self.model, "_fsdp_wrapped_module", self.model)
        if hasattr(unwrapped, "peft_config"):
            adapter = adapter_settings(unwrapped.peft_config["default"].to_dict(), model.path)
            adapter.save_pretrained(str(folder))
        trained.write(folder / LOG_PROBS)
        if state is None:
            config.save_pretrained(out)
            savable(generation, model.path).save_pretrained(out)
            return None
        written = plain_model(config, state, adapter, trusts_code=self.trust_remote_code)
        write_model(written, out, generation, model.path)
        dtype: torch.dtype = written.dtype
        return dtype

    def _check(self, out: Path, trained: LogProbs, written: torch.dtype) -> None:
        try:
            said = check_written(out, trained, written, self.trust_remote_code)
        except SavedModelError as error:
            raise SavedModelError(
                f"{out}: loaded by transformers, {error}; report it, leave `hf_model` out of the checkpoint's "
                "contents, or skip the check by algorithm.hpd.check_saved_model=false"
            ) from error
        logger.info("%s: %s", out, said)
