"""What the recipes' headers and docs/recipes.md say of memory and time is what the planner says."""

from pathlib import Path
from typing import Any

import pytest
from test_plan import MODELS, QWEN_1_5B, QWEN_7B, shape
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from hpd_verl.tools.plan.memory import complaints, plan_memory
from hpd_verl.tools.plan.model_size import model_size
from hpd_verl.tools.plan.run import GIB, PlannedRun
from hpd_verl.tools.plan.work import plan_work

ROOT = Path(__file__).resolve().parents[2]
LINES = (ROOT / "docs" / "recipes.md").read_text().splitlines()

QWEN_0_5B = Qwen2Config(**shape(896, 4864, 24, 14, 2, 151_936), tie_word_embeddings=True)
QWEN_3B = Qwen2Config(**shape(2048, 11_008, 36, 16, 2, 151_936), tie_word_embeddings=True)
QWEN3_30B = Qwen3MoeConfig(
    **shape(2048, 6144, 48, 32, 4, 151_936),
    head_dim=128,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    tie_word_embeddings=False,
)
LLAMA_8B = LlamaConfig(**shape(4096, 14_336, 32, 32, 8, 128_256), tie_word_embeddings=False)
DEEPSEEK_1B = LlamaConfig(**shape(2048, 5504, 24, 16, 16, 32_256), tie_word_embeddings=False)
DEEPSEEK_7B = LlamaConfig(**shape(4096, 11_008, 32, 32, 32, 32_256), tie_word_embeddings=False)

MATHS = {"epochs": 12.8, "response_tokens": 4000}
CODE = {"rows": 78_000, "response_tokens": 500}
ONE_GPU = {
    **{"trainer": "lean", "gpus": 1, "memory": 24, "peak_tflops": 165, "tokens": 4096},
    **{"rows": 7473, "response_tokens": 300, "batch_size": 64},
}
STORED = {"trainer": "lean", "tokens": 24_576, "response_tokens": 6000, "batch_size": 128, "teacher_cache": "disk"}
PLANS: dict[str, tuple[PretrainedConfig, PretrainedConfig, dict[str, Any]]] = {
    "math/hpd.sh`, 1.5B": (QWEN_1_5B, QWEN_7B, MATHS),
    "math/hpd.sh`, 3B": (QWEN_3B, QWEN_7B, MATHS),
    "math/hpd.sh`, Llama": (MODELS["Llama-3.2-1B"][0], LLAMA_8B, MATHS),
    "math/hpd_then_opd.sh`": (QWEN_1_5B, QWEN_7B, MATHS | {"epochs": 15.36, "on_policy_fraction": 0.58}),
    "math/opd.sh`": (QWEN_1_5B, QWEN_7B, MATHS | {"rows": 200 * 256, "epochs": 1, "on_policy_fraction": 1.0}),
    "math/store_teacher.sh`": (MODELS["Qwen3-0.6B"][0], QWEN3_30B, STORED | {"epochs": 1}),
    "math/strong_teacher.sh`": (MODELS["Qwen3-0.6B"][0], QWEN3_30B, STORED | {"store_is_full": True}),
    "math/one_gpu.sh`": (QWEN_0_5B, QWEN_1_5B, ONE_GPU),
    "math/lora.sh`": (QWEN_1_5B, QWEN_7B, ONE_GPU | {"lora_rank": 64}),
    "code/hpd.sh`, Qwen2.5-Coder": (QWEN_1_5B, QWEN_7B, CODE),
    "code/hpd.sh`, DeepSeek-Coder": (DEEPSEEK_1B, DEEPSEEK_7B, CODE),
    "dialogue/hpd.sh`": (QWEN_1_5B, QWEN_7B, {"trainer": "lean", "rows": 61_000, "response_tokens": 400}),
}
"""What stands in docs/recipes.md: student, teacher, and what differs from the planner's defaults."""


@pytest.mark.parametrize("name", PLANS)
def test_page_and_header_say_what_the_planner_says(name: str) -> None:
    student, teacher = (model_size(role, config) for role, config in zip(("s", "t"), PLANS[name][:2], strict=True))
    run = PlannedRun(**PLANS[name][2])
    memory, work = plan_memory(student, teacher, run), plan_work(student, teacher, run)
    assert not complaints(memory, run)
    hours = sum(work.hours.values())
    gib, time = f"{memory.peak / GIB:.0f}", f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
    (row,) = [line for line in LINES if line.startswith(f"| `examples/{name} |")][-1:]
    assert [cell.strip() for cell in row.split("|")[2:5]] == [str(run.gpus), gib, time]
    script = (ROOT / "examples" / name.split("`")[0]).read_text()
    header = " ".join(line.removeprefix("# ") for line in script.split("set -euo pipefail")[0].splitlines())
    assert f"{gib} GiB a GPU, {time}" in header.split("By the planner")[1]
    if run.teacher_cache != "off":
        assert f"{work.store_bytes / GIB:,.0f} GiB on disk" in header
        assert f"{work.store_bytes / GIB:,.0f} GiB on disk" in "\n".join(LINES)
