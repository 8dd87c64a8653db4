"""A run's checkpoint, exported, in transformers, peft and vLLM."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from conftest import Tiny
from test_sft_trainer import RunSFT, run_sft  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd_verl.export import export

IN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=2**24)
    chats = [[{"role": "user", "content": prompt}] for prompt in json.loads(sys.argv[2])]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    print("ANSWERS " + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""
PROMPTS = ["1 plus 2 ?", "7 plus 0 ?", "9 plus 8 ?"]


def greedy(folder: Path) -> list[list[int]]:
    """Answers of transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def test_lora_run_of_two_ranks(run_sft: RunSFT, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Merged and as an adapter the model is the same, another one than the student, and vLLM answers as transformers.

    The logits are those of verl's own copy of the base weights and the adapter, put together by peft.
    """
    run = run_sft(
        "model.lora_rank=4", "trainer.save_freq=4", "checkpoint.save_contents=[model]", "optim.lr=3e-2", ranks=2
    )
    assert run.returncode == 0, run.output[-3000:]
    scores = tmp_path / "results.json"
    scores.write_text(json.dumps({"addition": {"accuracy": 0.25}}))
    checkpoints, merged, adapter = tmp_path / "checkpoints", tmp_path / "merged", tmp_path / "adapter"
    assert "LoRA merged, fp32" in export(checkpoints, merged, dtype="fp32", score=scores)
    export(checkpoints / "global_step_4", adapter, dtype="fp32", lora="adapter")

    from peft import PeftModel

    tokens = torch.arange(1, 25).view(2, 12)
    student = AutoModelForCausalLM.from_pretrained(tiny.student)
    with torch.no_grad():
        before = student(tokens).logits
        with_adapter = PeftModel.from_pretrained(student, adapter)(tokens).logits
        after = AutoModelForCausalLM.from_pretrained(merged)(tokens).logits
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, with_adapter, rtol=1e-4, atol=1e-4)

    card = (merged / "README.md").read_text()
    for said in (
        str(tiny.student),
        str(tiny.teacher),
        str(tiny.train),
        "| Objective | hpd |",
        "addition/accuracy | 0.25",
    ):
        assert said in card
    program = tmp_path / "in_vllm.py"
    program.write_text(IN_VLLM)
    command = [sys.executable, str(program), str(merged), json.dumps(PROMPTS)]
    served = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert served.returncode == 0, served.stderr[-3000:]
    (line,) = [line for line in served.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert json.loads(line.removeprefix("ANSWERS ")) == greedy(merged)
