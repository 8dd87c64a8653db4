"""How small a stored token of the teacher can be: forms of the store beside others that were tried.

    python benchmarks/store_forms.py --teacher DIR --student DIR --data train.parquet

For tokens of demonstrations, the gradient in the student's hidden states with the teacher's exact distribution and
with that of a form: |g - g_exact| / |g_exact| over all tokens, in percent, of forward KL and exact reverse KL. "Close"
is the teacher itself with 2% noise on its weights, "far" the student that is given. KL(exact || form) is in nats a
token, mean. Bytes are a token's with the label's log-prob, at the teacher's size and at that of a 7B model (d 3,584,
V 152,064).
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("VERL_PLATFORM", "cpu")

import torch  # noqa: E402
from results import append_rows, machine  # noqa: E402
from store import sequences  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: E402

from hpd_verl.engine.causal_lm import offer_head  # noqa: E402
from hpd_verl.head.hybrid import teacher_hybrid  # noqa: E402
from hpd_verl.head.hybrid_code import BLOCK, HybridCode, token_bytes  # noqa: E402
from hpd_verl.head.output_head import OutputHead  # noqa: E402

Sizes = tuple[int, int]
"""Hidden size and vocabulary."""
SEVEN_B: Sizes = (3584, 152_064)
NOISE = 0.02
OTHER = 14
"""Label's log-prob, shift, low and step of a token."""


class Integers(HybridCode):
    """Plain integers in place of E8, one value at a time within a group being no better."""

    def _nearest(self, values: Tensor) -> Tensor:
        return values.round().clamp(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)


class OfData(HybridCode):
    """The metric of the teacher's own probabilities, averaged over tokens, and a part of the uniform one."""

    probabilities: Tensor

    def _metric(self) -> Tensor:
        rows = self._rotate(self.head.used_weight.to(self.head.dtype)).double()
        p = self.probabilities.double()
        mean = p @ rows
        of_data, uniform = (rows * p.unsqueeze(1)).T @ rows - torch.outer(mean, mean), super()._metric()
        return of_data / of_data.trace() + 0.1 * uniform / uniform.trace()


class Pair:
    """One teacher, its students, and the tokens of some rows."""

    def __init__(self, teacher: Path, student: Path, data: Path, rows: int, longest: int) -> None:
        torch.manual_seed(0)
        exact, near = load(teacher), load(teacher)
        with torch.no_grad():
            for parameter in near.parameters():
                parameter.add_(torch.randn_like(parameter) * NOISE * parameter.std())
        models = {"teacher": exact, "close": near, "far": load(student)}
        self.vocabulary = min(model.config.vocab_size for model in models.values())
        found = sequences(AutoTokenizer.from_pretrained(teacher), data, rows, longest)
        hidden: dict[str, list[Tensor]] = {name: [] for name in models}
        heads: dict[str, OutputHead] = {}
        for name, model in models.items():
            offer_head(model, self.vocabulary)
            for ids, prompt in found:

                def head(states: Tensor, layer: OutputHead, name: str = name, prompt: int = prompt) -> Tensor:
                    heads[name] = layer
                    hidden[name].append(states[0, prompt - 1 : -1])
                    return states.new_zeros(())

                with torch.no_grad():
                    # A teacher of fewer tokens than its tokenizer has, made for a try, reads the others as some of its.
                    model(input_ids=(ids % self.vocabulary).unsqueeze(0), head=head)
        self.head = heads.pop("teacher")
        self.hidden = torch.cat(hidden.pop("teacher"))
        self.lengths = [len(each) for each in hidden["close"]]
        self.students = {name: (torch.cat(hidden[name]), layer) for name, layer in heads.items()}
        self.log_p = self.log_probs(self.hidden)
        self.log_q = {name: log_softmax(states, layer) for name, (states, layer) in self.students.items()}
        self.exact = {key: self.gradient(*key, self.log_p) for key in self.keys}

    @property
    def sizes(self) -> Sizes:
        return self.hidden.shape[1], self.vocabulary

    @property
    def keys(self) -> list[tuple[str, str]]:
        return [(objective, name) for name in self.students for objective in ("fkl", "rkl_exact")]

    def log_probs(self, hidden: Tensor) -> Tensor:
        return log_softmax(hidden, self.head)

    @torch.no_grad()
    def gradient(self, objective: str, name: str, log_p: Tensor) -> Tensor:
        """[n, d] in the student's hidden states."""
        log_q, weight = self.log_q[name], self.students[name][1].used_weight
        q = log_q.exp()
        if objective == "fkl":
            return (q - log_p.exp()) @ weight
        gaps = q * (log_q - log_p.clamp_min(-60))
        return (gaps - q * gaps.sum(-1, keepdim=True)) @ weight

    @torch.no_grad()
    def errors(self, log_p: Tensor) -> list[float]:
        """Percent, by ``keys``."""
        return [
            100 * float((self.gradient(*key, log_p) - exact).norm() / exact.norm()) for key, exact in self.exact.items()
        ]


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def log_softmax(hidden: Tensor, head: OutputHead) -> Tensor:
    return torch.log_softmax(head.logits(hidden @ head.used_weight.T, 1.0), -1)


# Forms: log-probs [n, V], and a token's bytes by the model's sizes

Form = tuple[Tensor, Callable[[Sizes], float]]


def index_bytes(sizes: Sizes) -> float:
    return (sizes[1] - 1).bit_length() / 8


def in_bf16(pair: Pair) -> Form:
    return pair.log_probs(pair.hidden.bfloat16().float()), lambda sizes: 2 * sizes[0] + 8


def plain(pair: Pair, bits: int) -> Form:
    """Each value to the nearest of 2^bits."""
    blocks = pair.hidden.view(len(pair.hidden), -1, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded = ((blocks / scale).round() * scale).view_as(pair.hidden)
    return pair.log_probs(rounded), lambda sizes: sizes[0] * bits / 8 + 2 * sizes[0] / BLOCK + 8


def likeliest(pair: Pair, k: int) -> Form:
    """Format topk: the rest is spread evenly."""
    top = pair.log_p.topk(k, -1)
    rest = pair.log_p.scatter(1, top.indices, -math.inf).logsumexp(1, keepdim=True) - math.log(pair.vocabulary - k)
    return rest.expand_as(pair.log_p).scatter(1, top.indices, top.values), lambda _: 8 * k + 8


def drawn(pair: Pair, size: float) -> Form:
    """RS-KD (arXiv 2503.16870) at temperature 1: as many tokens drawn from p as ``size`` bytes hold, mass by counts."""
    draws = max(1, round((size - 8) / index_bytes(pair.sizes)))
    tokens = torch.multinomial(pair.log_p.exp(), draws, replacement=True)
    counts = torch.zeros_like(pair.log_p).scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.float32))
    return (counts / draws).log(), lambda sizes: draws * index_bytes(sizes) + 8


def corrected(pair: Pair, coarse: Tensor, k: int, by_residual: bool = False) -> Tensor:
    """Log-probs of coarse states with the likeliest tokens' in 8 bits, both with their mass."""
    shape = pair.log_probs(coarse)
    score = pair.log_p.exp() * (pair.log_p - shape).abs() if by_residual else pair.log_p
    tokens = score.topk(k, -1).indices
    others = [each.scatter(1, tokens, -math.inf).logsumexp(1, keepdim=True) for each in (shape, pair.log_p)]
    shape = shape - (others[0] - others[1])
    gap = (pair.log_p - shape).gather(1, tokens)
    step = (gap.amax(1, keepdim=True) - gap.amin(1, keepdim=True)).clamp_min(1e-9) / 255
    gap = (gap / step).round() * step
    found = (shape.gather(1, tokens) + gap).logsumexp(1, keepdim=True)
    mass = pair.log_p.gather(1, tokens).logsumexp(1, keepdim=True)
    return shape.scatter_add(1, tokens, gap + (mass - found))


def hybrid(pair: Pair, bits: int, k: int) -> Form:
    """The store's own."""
    code = HybridCode(pair.head, 1.0, k, bits)
    features = teacher_hybrid(pair.hidden, code, torch.zeros(len(pair.hidden), dtype=torch.int64))
    whole = features.whole_distribution(len(features))
    whole.start(slice(0, len(features)))
    return whole.rows(slice(0, len(features))), lambda sizes: token_bytes(*sizes, k, bits) + 8


def variant(pair: Pair, code: HybridCode, k: int, by_residual: bool = False) -> Form:
    """The store's own but for one thing."""
    coarse = code._encode_states(pair.hidden)[1]
    return corrected(pair, coarse, k, by_residual), lambda sizes: token_bytes(*sizes, k, code.bits) + 8


def of_data(pair: Pair, bits: int, k: int) -> Form:
    """In the metric of all tokens' mean probabilities."""
    code = OfData(pair.head, 1.0, k, bits)
    code.probabilities = pair.log_p.exp().mean(0)
    return variant(pair, code, k)


def of_rows(pair: Pair, bits: int, k: int) -> Form:
    """In a metric of each row's own probabilities."""
    coarse, start = [], 0
    for length in pair.lengths:
        code = OfData(pair.head, 1.0, k, bits)
        code.probabilities = pair.log_p[start : start + length].exp().mean(0)
        coarse.append(code._encode_states(pair.hidden[start : start + length])[1])
        start += length
    return corrected(pair, torch.cat(coarse), k), lambda sizes: token_bytes(*sizes, k, bits) + 8


def entropy_coded(pair: Pair, bits: float, k: int) -> Form:
    """Integers without a box, as fine as their entropy allows: what a perfect variable-length code gives."""
    code = Integers(pair.head, 1.0, k, 7)
    rotated = code._rotate(pair.hidden)
    spread = rotated.view(len(rotated), -1, BLOCK).square().mean(-1).sqrt()
    step = math.sqrt(2 * math.pi * math.e) / 2**bits  # of a normal distribution with deviation 1
    scales = spread * step
    levels = code._nearest_plane(rotated, scales.repeat_interleave(BLOCK, 1))
    share = levels.long().flatten().add(64).bincount().double() / levels.numel()
    found = -float((share * share.clamp_min(1e-300).log2()).sum())
    return (
        corrected(pair, code._state(levels, scales), k),
        lambda sizes: token_bytes(*sizes, k, 4) + 8 + sizes[0] * (found - 4) / 8,
    )


FORMS: dict[str, Callable[[Pair], Form]] = {
    "hidden, bf16": in_bf16,
    "int8, plain": lambda pair: plain(pair, 8),
    "topk 64": lambda pair: likeliest(pair, 64),
    "drawn tokens, as topk 64": lambda pair: drawn(pair, 520),
    "12 drawn tokens": lambda pair: drawn(pair, 12 * index_bytes(pair.sizes) + 8),
    "hybrid: E8 4 bits, top 32": lambda pair: hybrid(pair, 4, 32),
    "hybrid: E8 4 bits, top 64": lambda pair: hybrid(pair, 4, 64),
    "hybrid: E8 4 bits, top 128": lambda pair: hybrid(pair, 4, 128),
    "hybrid: E8 5 bits, top 32": lambda pair: hybrid(pair, 5, 32),
    "hybrid: E8 5 bits, top 64": lambda pair: hybrid(pair, 5, 64),
    "hybrid: E8 3 bits, top 64": lambda pair: hybrid(pair, 3, 64),
    "integers 4 bits, top 64": lambda pair: variant(pair, Integers(pair.head, 1.0, 64, 4), 64),
    "integers, entropy of 4 bits, top 64": lambda pair: entropy_coded(pair, 4.0, 64),
    "E8 4 bits, top 64 by residual": lambda pair: variant(pair, HybridCode(pair.head, 1.0, 64, 4), 64, True),
    "E8 4 bits, top 64, metric of data": lambda pair: of_data(pair, 4, 64),
    "E8 4 bits, top 64, metric by row": lambda pair: of_rows(pair, 4, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "student", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--forms", default="", help="only those whose name matches this regular expression")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "store_forms.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pair = Pair(arguments.teacher, arguments.student, arguments.data, arguments.rows, arguments.longest)
    entropy = float(-(pair.log_p.exp() * pair.log_p).sum(-1).mean())
    held = float(pair.log_p.topk(64, -1).values.exp().sum(-1).mean())
    print(f"{len(pair.hidden)} tokens, d {pair.sizes[0]}, V {pair.sizes[1]}")
    print(f"the teacher's entropy is {entropy:.2f} nats, its 64 likeliest tokens hold {held:.1%}")
    print("| form | bytes | at 7B | close: fkl | rkl_exact | far: fkl | rkl_exact | KL |")
    print("|---" * 8 + "|")
    results = []
    for name, form in FORMS.items():
        if not re.search(arguments.forms, name):
            continue
        with torch.no_grad():
            log_p, size = form(pair)
        errors = pair.errors(log_p)
        divergence = float((pair.log_p.exp() * (pair.log_p - log_p).clamp_max(1e3)).sum(-1).mean())
        sizes = [round(size(each)) for each in (pair.sizes, SEVEN_B)]
        shown = " | ".join(f"{error:.2g}" for error in errors)
        print(f"| {name} | {sizes[0]:,} | {sizes[1]:,} | {shown} | {divergence:.1e} |", flush=True)
        results.append(
            {
                **machine(),
                "teacher": arguments.teacher.name,
                "student": arguments.student.name,
                "tokens": len(pair.hidden),
                "hidden_size": pair.sizes[0],
                "vocabulary": pair.sizes[1],
                "form": name,
                "bytes": sizes[0],
                "bytes_7b": sizes[1],
                **{"_".join(reversed(key)): round(error, 3) for key, error in zip(pair.keys, errors, strict=True)},
                "kl": f"{divergence:.3g}",
            }
        )
    append_rows(arguments.csv, results)


if __name__ == "__main__":
    main()
