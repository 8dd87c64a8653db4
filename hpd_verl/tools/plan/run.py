"""Settings that determine a run's memory and time."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class PlannedRun:
    """A run. Tokens and rows are those of the data set unless they say otherwise."""

    gpus: int = 8
    memory: float = 80.0
    """GiB of a GPU."""
    tokens: int = 16384
    """Per micro-batch on a GPU, prompts and responses, at most."""
    ulysses: int = 1
    """GPUs that share a sequence; their micro-batch has as many times ``tokens``."""
    rows: int = 40_000
    prompt_tokens: int = 200
    """Average per row."""
    response_tokens: int = 1000
    """Average per row."""
    batch_size: int = 256
    """Rows of a training step, over all GPUs."""
    epochs: float = 3.0
    on_policy_fraction: float = 0.0
    trainer: str = "main_ppo"
    """Or ``lean``."""
    gradient_checkpointing: bool = True
    offload_policy: bool = False
    """FSDP2 keeps weights, gradients and optimiser in the machine's memory."""
    optimizer_offload: bool = False
    """verl moves weights and optimiser away while the rollout server runs."""
    lora_rank: int = 0
    attention: str = "flash_attention_2"
    token_chunk_size: int | None = None
    teacher_dtype: str = "bf16"
    teacher_served: bool = False
    """Servers on other GPUs run the teacher; here is its output layer."""
    teacher_cache: str = "off"
    teacher_cache_format: str = "hidden"
    teacher_cache_dtype: str = "bf16"
    teacher_cache_top_k: int = 64
    teacher_cache_bits: int = 4
    store_is_full: bool = False
    """The store was filled ahead: the teacher is not loaded."""
    gpu_memory_utilization: float = 0.5
    """Share of the GPU for the rollout server."""
    platform: str = "gpu"
    """Or ``cpu``: as VERL_PLATFORM=cpu runs, float32 and nothing gathered twice."""
    utilization: float = 0.4
    """Share of ``peak_tflops`` that training reaches, recomputation counted as work."""
    rollout_utilization: float = 0.05
    """The same for generation, whose steps are small."""
    peak_tflops: float = 989.0
    """Peak of a GPU in dense bfloat16; default: H100 SXM."""

    @property
    def row_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @property
    def response_share(self) -> float:
        return self.response_tokens / self.row_tokens

    @property
    def rows_per_gpu(self) -> float:
        """Of a training step."""
        return self.batch_size / self.gpus

    @property
    def micro_batch(self) -> int:
        """Tokens of a micro-batch: no more than a GPU's part of the step has."""
        return min(self.tokens, max(1, round(self.rows_per_gpu * self.row_tokens)))

    @property
    def micro_batches(self) -> int:
        """Of a step on a GPU."""
        return -(-round(self.rows_per_gpu * self.row_tokens) // self.micro_batch)

    @property
    def serves_rollouts(self) -> bool:
        return self.on_policy_fraction > 0
