"""How a training step grows with tokens, vocabulary, teacher and ranks.

    python benchmarks/growth.py --tokenizer DIR --data train.parquet

Random Llama models of each size, with the tokenizer of DIR; each point is a run of benchmarks/step.py, whose rows go to
benchmarks/results/growth.csv. Student and teacher are named after vocabulary, hidden size and layers.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
BASE = {"rows": 4, "vocabulary": 49_152, "teacher_layers": 12, "ranks": 1}
VARIED = {
    "rows": (2, 8),
    "vocabulary": (98_304, 151_936),
    "teacher_layers": (6, 24),
    "ranks": (2,),
}
STUDENT_LAYERS = 6
COMPARED = ("sft", "one_pass", "one_pass_stored")


def make_model(folder: Path, tokenizer: Path, vocabulary: int, layers: int) -> Path:
    """A random model with SmolLM2-135M's hidden size, once."""
    path = folder / f"v{vocabulary}_h576_l{layers}"
    if not path.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(path)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a model with a chat template")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "growth.csv")
    arguments = parser.parse_args()
    points = [BASE, *({**BASE, name: value} for name, values in VARIED.items() for value in values)]
    with tempfile.TemporaryDirectory() as folder:
        for point in points:
            student = make_model(Path(folder), arguments.tokenizer, point["vocabulary"], STUDENT_LAYERS)
            teacher = make_model(Path(folder), arguments.tokenizer, point["vocabulary"], point["teacher_layers"])
            print(", ".join(f"{name} {value}" for name, value in point.items()), flush=True)
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *(f"--nproc_per_node={point['ranks']}", str(ROOT / "benchmarks" / "step.py")),
                *("--student", str(student), "--teacher", str(teacher), "--data", str(arguments.data)),
                *("--rows", str(point["rows"]), "--repeats", str(arguments.repeats), "--csv", str(arguments.csv)),
                *("--only", *COMPARED),
            ]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
