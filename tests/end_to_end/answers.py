"""Greedy answers of a model's folder, by vLLM in a process of its own, and by transformers.

python tests/end_to_end/answers.py FOLDER
"""

import json
import os
import subprocess
import sys
from pathlib import Path

PROMPTS = ["1 plus 2 ?", "7 plus 0 ?", "9 plus 8 ?"]
MAX_TOKENS = 8


def by_vllm(folder: Path) -> list[list[int]]:
    """Tokens of each answer."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # its engine and worker are one process
    command = [sys.executable, __file__, str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("ANSWERS ")]
    return json.loads(line.removeprefix("ANSWERS "))


def by_transformers(folder: Path) -> list[list[int]]:
    """Tokens of each answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def main() -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=2**24)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    print("ANSWERS " + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
