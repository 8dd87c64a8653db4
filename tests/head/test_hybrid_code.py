"""The hybrid form of the teacher: bytes against an independent reader and writer, and what is right at any size."""

import dataclasses
import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hpd_verl.head.hybrid import HybridFeatures, teacher_hybrid
from hpd_verl.head.hybrid_code import HybridCode, nearest_e8, token_bytes
from hpd_verl.head.output_head import OutputHead
from hpd_verl.objectives import LOG_ZERO

Array = NDArray[np.float64]


def make_head(vocabulary: int, hidden: int, dtype: torch.dtype = torch.float64, **layer: Any) -> OutputHead:
    random = torch.Generator().manual_seed(vocabulary * 1000 + hidden)
    # Some directions matter more than others, and padding beyond the vocabulary not at all.
    weight = torch.randn(vocabulary + 3, hidden, dtype=torch.float64, generator=random)
    weight = weight * torch.logspace(0.3, -0.7, hidden, dtype=torch.float64)
    weight[vocabulary:] = 1e3
    if layer.pop("bias", False):
        layer["bias"] = torch.randn(vocabulary + 3, dtype=torch.float64, generator=random).to(dtype)
    return OutputHead(weight.to(dtype), vocabulary, **layer)


def make_states(count: int, hidden: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    states = torch.randn(count, hidden, dtype=torch.float64, generator=random)
    states[:, 0] *= 20  # an outlier, as models have
    return states.to(dtype)


def make_labels(count: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(1))


def dense(features: HybridFeatures, vocabulary: int | None = None) -> Tensor:
    """Log-probs [n, V] as the head sees them, at least LOG_ZERO; tokens beyond the teacher's vocabulary have it."""
    whole = features.whole_distribution(len(features))
    whole.start(slice(0, len(features)))
    rows = whole.rows(slice(0, len(features))).clamp_min(LOG_ZERO)
    return functional.pad(rows, (0, (vocabulary or rows.shape[1]) - rows.shape[1]), value=LOG_ZERO)


def exact(hidden: Tensor, head: OutputHead, temperature: float = 1.0) -> Tensor:
    """Log-probs [n, V] from the definition, in float64 but for the product, which is the teacher's own."""
    logits = (hidden @ head.weight[: head.vocabulary_size].T).double()
    if head.bias is not None:
        logits = logits + head.bias[: head.vocabulary_size].double()
    logits = logits * head.scale
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    return torch.log_softmax(logits / temperature, -1)


# The reference: loops over values and bits, in float64, from the description in hybrid_code


class Reference:
    """Reads and writes the code one value at a time."""

    def __init__(self, head: OutputHead, bits: int, top_k: int) -> None:
        self.weight = head.weight[: head.vocabulary_size].double().numpy()
        self.vocabulary, self.d = self.weight.shape
        self.bits, self.top_k = bits, min(top_k, self.vocabulary)
        self.blocks = -(-self.d // 64)
        self.rotation = self.make_rotation()
        self.upper = self.make_upper()

    def make_rotation(self) -> Array:
        """[64 blocks, d]: what a state is multiplied with."""
        matrix = np.zeros((64 * self.blocks, self.d))
        for column in range(self.d):
            block, inside = divmod(column, 64)
            digest = hashlib.sha256(f"sign {block}".encode()).digest()
            sign = -1 if digest[inside // 8] >> (inside % 8) & 1 else 1
            for row in range(64):
                matrix[64 * block + row, column] = sign * (-1) ** bin(row & inside).count("1") / 8
        return matrix

    def make_upper(self) -> Array:
        centred = (self.weight - self.weight.mean(0)) @ self.rotation.T
        metric = centred.T @ centred / self.vocabulary
        metric += (1e-3 * np.trace(metric) / len(metric) or 1.0) * np.eye(len(metric))
        return np.linalg.cholesky(metric).T

    def nearest(self, values: Array) -> Array:
        """Of all points of E8 that are within one of the values, the nearest in the box."""
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        best, least = None, math.inf
        for half in (0.0, 0.5):
            near = [min(max(round(value - half), low), high) for value in values]
            candidates = [near]
            if sum(near) % 2:
                candidates = []
                for place in range(8):
                    for move in (-1, 1):
                        if low <= near[place] + move <= high:
                            candidates.append([*near[:place], near[place] + move, *near[place + 1 :]])
            for candidate in candidates:
                point = np.array(candidate) + half
                distance = float(((values - point) ** 2).sum())
                if distance < least - 1e-12:
                    best, least = point, distance
        assert best is not None
        return best

    def state(self, hidden: Array) -> tuple[Array, Array]:
        """Levels and coarse state of one state."""
        x, upper = self.rotation @ hidden, self.upper
        largest = [np.abs(x[64 * b : 64 * b + 64]).max() / 2 ** (self.bits - 1) for b in range(self.blocks)]
        exponent = math.frexp(max(largest))[1]
        finer = [min(255, math.floor(16 * (exponent - math.log2(value)))) for value in largest]
        scale = np.repeat([2.0 ** (exponent - each / 16) for each in finer], 64)
        levels, error = np.zeros_like(x), np.zeros_like(x)
        for start in range(len(x) - 8, -1, -8):
            group = slice(start, start + 8)
            pull = np.linalg.solve(upper[group, group], upper[group, start + 8 :] @ error[start + 8 :])
            levels[group] = self.nearest((x[group] + pull) / scale[group])
            error[group] = x[group] - levels[group] * scale[group]
        return levels, self.rotation.T @ (levels * scale)

    def read(self, packed: bytes) -> tuple[Array, list[int], list[float]]:
        """Coarse state, the K tokens and their residuals, of one token's bytes."""
        at = 64 * self.blocks * self.bits // 8
        codes = bits_of(packed[:at], self.bits)
        finer, exponent = packed[at : at + self.blocks], packed[at + self.blocks] - 128
        at += self.blocks + 1
        low = float(np.frombuffer(packed[at : at + 4], "<f4")[0])
        step = float(np.frombuffer(b"\0\0" + packed[at + 4 : at + 6], "<f4")[0])
        at += 6
        residuals = [low + step * number for number in packed[at : at + self.top_k]]
        at += self.top_k
        whole, left = divmod((self.vocabulary - 1).bit_length(), 8)
        tokens = [0] * self.top_k
        for byte in range(whole):
            for place in range(self.top_k):
                tokens[place] += packed[at + place] << 8 * byte
            at += self.top_k
        if left:
            high = bits_of(packed[at:], left)
            tokens = [token + (high[place] << 8 * whole) for place, token in enumerate(tokens)]
        values = []
        for group in range(0, len(codes), 8):
            numbers = codes[group : group + 8]
            half = numbers[7] & 1
            numbers[7] -= half
            numbers[7] += sum(numbers) & 1
            step_of_block = 2.0 ** (exponent - finer[group // 64] / 16)
            values += [(number - 2 ** (self.bits - 1) + half / 2) * step_of_block for number in numbers]
        return self.rotation.T @ np.array(values), tokens, residuals


def bits_of(packed: bytes, width: int) -> list[int]:
    """Numbers of ``width`` bits, the lowest bit of the first byte first."""
    text = "".join(format(byte, "08b")[::-1] for byte in packed)
    return [int(text[at : at + width][::-1], 2) for at in range(0, len(text), width)]


@pytest.mark.parametrize(
    ("vocabulary", "hidden", "bits", "top_k"),
    [(300, 24, 4, 5), (23, 130, 5, 8), (70_000, 64, 3, 9), (200, 7, 7, 300), (256, 64, 2, 1), (1, 3, 4, 64)],
)
def test_bytes_against_the_reference(vocabulary: int, hidden: int, bits: int, top_k: int) -> None:
    """What is written is what the reference would choose, and reads as the reference reads it."""
    head = make_head(vocabulary, hidden)
    code, reference = HybridCode(head, 1.0, top_k, bits), Reference(head, bits, top_k)
    states = make_states(4, hidden)
    features = teacher_hybrid(states, code, make_labels(4, vocabulary))
    assert features.packed.shape == (4, code.token_bytes)
    assert code.token_bytes == token_bytes(hidden, vocabulary, top_k, bits)
    decoded = code.decode(features.packed)
    log_p = exact(states, head)
    for row in range(4):
        coarse, tokens, residuals = reference.read(bytes(features.packed[row].tolist()))
        np.testing.assert_allclose(decoded.hidden[row], coarse, atol=1e-12)
        np.testing.assert_allclose(coarse, reference.state(states[row].numpy())[1], atol=1e-12)
        assert decoded.top_tokens[row].tolist() == tokens
        assert sorted(tokens) == sorted(log_p[row].topk(len(tokens)).indices.tolist())
        np.testing.assert_allclose(decoded.residuals[row], residuals, atol=1e-12)


def test_bytes_of_a_7b_teacher() -> None:
    """The default: 4 bits, 64 tokens of 18 bits; the store adds the label's log-prob and the shift."""
    assert token_bytes(3584, 152_064, 64) == 1792 + 56 + 7 + 64 * 3 + 16


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_nearest_point(bits: int) -> None:
    """Of E8, in the box and, inside it, no farther than the lattice's covering radius, 1."""
    random = torch.Generator().manual_seed(bits)
    values = torch.randn(2000, 8, dtype=torch.float64, generator=random) * 2 ** (bits - 2)
    points = nearest_e8(values, bits)
    assert (points.sum(1) % 2 == 0).all()
    assert ((points * 2) % 1 == 0).all()
    assert ((points[:, :1] % 1) == (points % 1)).all()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert low <= points.min()
    assert points.floor().max() <= high
    inside = (values.abs() < high - 1).all(1)
    if bits > 2:
        assert inside.any()
        assert (values - points)[inside].norm(dim=1).max() <= 1 + 1e-9


LAYERS: list[dict[str, Any]] = [{}, {"bias": True}, {"scale": 0.3, "soft_cap": 5.0, "bias": True}]


@pytest.mark.parametrize("layer", LAYERS, ids=["plain", "bias", "soft_cap"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_masses(layer: dict[str, Any], temperature: float) -> None:
    """All tokens have mass 1, and those outside the likeliest exactly theirs."""
    head = make_head(500, 96, **layer)
    states = make_states(40, 96)
    features = teacher_hybrid(states, HybridCode(head, temperature, 16), make_labels(40, 500), 7)
    found, log_p = dense(features), exact(states, head, temperature)
    top = log_p.topk(16).indices
    torch.testing.assert_close(found.logsumexp(1), torch.zeros(40, dtype=torch.float64), atol=1e-6, rtol=0)
    rest = [each.scatter(1, top, -math.inf).logsumexp(1) for each in (found, log_p)]
    torch.testing.assert_close(rest[0], rest[1], atol=1e-9, rtol=0)
    labels = make_labels(40, 500)
    torch.testing.assert_close(features.label_log_probs, log_p.gather(1, labels.unsqueeze(1)).squeeze(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "hidden"), [(500, 96), (20, 64), (500, 200)])
def test_errors_are_bounded(vocabulary: int, hidden: int, dtype: torch.dtype) -> None:
    """Of the likeliest tokens half a step of the residuals; more bits come nearer, and rounding by the metric does."""
    head = make_head(vocabulary, hidden, dtype)
    states = make_states(60, hidden, dtype)
    log_p = exact(states, head)
    own = 1e-6 if dtype == torch.float64 else 1e-4
    divergences = []
    for bits in (3, 4, 5, 6):
        code = HybridCode(head, 1.0, 32, bits)
        features = teacher_hybrid(states, code, make_labels(60, vocabulary))
        found = dense(features).double()
        top = log_p.topk(min(32, vocabulary)).indices
        residuals = code.decode(features.packed).residuals.double()
        step = (residuals.amax(1) - residuals.amin(1)) / 255 + 1e-6
        error = (found - log_p).gather(1, top).abs().amax(1)
        assert (error <= 1.05 * step + own).all()
        divergences.append((log_p.exp() * (log_p - found)).sum(1).mean().item())
    if vocabulary > 32 and dtype in (torch.float64, torch.float32):
        assert all(more < less / 2 for less, more in itertools.pairwise(divergences))


def test_the_metric_is_that_of_the_logits() -> None:
    """The logits' error is far below that of rounding without it, where they depend on few directions."""
    head, states = make_head(800, 128), make_states(60, 128)
    random = torch.Generator().manual_seed(2)
    few = torch.randn(800, 24, dtype=torch.float64, generator=random)
    few = few @ torch.randn(24, 128, dtype=torch.float64, generator=random) + head.used_weight
    head = dataclasses.replace(head, weight=few)
    code = HybridCode(head, 1.0, 1)
    flat = HybridCode(OutputHead(torch.eye(128, dtype=torch.float64), 128), 1.0, 1)
    labels = make_labels(60, 100)
    errors = []
    for each in (code, flat):
        coarse = each.decode(each.encode(states, labels).packed).hidden
        logits = (coarse - states) @ head.used_weight.T
        errors.append((logits - logits.mean(1, keepdim=True)).norm().item())
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes(dtype: torch.dtype) -> None:
    """One-hot and flat teachers, huge and tiny states, a state of zeros: finite, of mass 1, and near the truth."""
    head = make_head(300, 96, dtype)
    states = make_states(6, 96, dtype)
    states = torch.cat([states * 50, states * 1e-4, states * 0, states * 1e-30, states[:1] * 1e4])
    features = teacher_hybrid(states, HybridCode(head, 1.0, 16), make_labels(len(states), 300))
    found, log_p = dense(features), exact(states, head)
    assert found.isfinite().all()
    assert features.shift.isfinite().all()
    assert (found.exp().sum(1) - 1).abs().max() < (1e-4 if dtype == torch.float32 else 0.3)
    assert (found.exp() - log_p.exp()).abs().max() < (0.05 if dtype == torch.float32 else 0.4)
    flat = slice(6, 24)
    torch.testing.assert_close(found[flat].double(), torch.full_like(log_p[flat], -math.log(300)), atol=0.05, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_states_that_are_not_finite_show(value: float) -> None:
    """In the shift, also where the label is none of the teacher's; other tokens keep theirs."""
    head = make_head(50, 20, torch.float32)
    states = make_states(4, 20, torch.float32)
    whole = teacher_hybrid(states, HybridCode(head, 1.0, 8), torch.tensor([0, 1, 60, 3]))
    states[1:3, 5] = value
    features = teacher_hybrid(states, HybridCode(head, 1.0, 8), torch.tensor([0, 1, 60, 3]))
    assert features.shift.isnan().tolist() == [False, True, True, False]
    assert features.label_log_probs.isnan().tolist() == [False, True, True, False]
    assert whole.label_log_probs[2] == LOG_ZERO
    assert torch.equal(features.packed[[0, 3]], whole.packed[[0, 3]])
    broken = dataclasses.replace(head, weight=head.weight.clone().fill_(value))
    with pytest.raises(ValueError, match="output layer holds NaN or infinity"):
        teacher_hybrid(make_states(4, 20, torch.float32), HybridCode(broken, 1.0, 8), torch.zeros(4, dtype=torch.int64))


def test_impossible_tokens() -> None:
    """A bias of -inf: more of the likeliest tokens are asked for than are possible."""
    head = make_head(30, 20, bias=True)
    assert head.bias is not None
    head.bias[5:] = -math.inf
    states = make_states(9, 20)
    features = teacher_hybrid(states, HybridCode(head, 1.0, 8), torch.arange(9))
    found, log_p = dense(features), exact(states, head)
    assert (found[:, 5:] == LOG_ZERO).all()
    torch.testing.assert_close(found[:, :5], log_p[:, :5], atol=0.02, rtol=0)
    assert (features.label_log_probs[5:] == LOG_ZERO).all()


@pytest.mark.parametrize("layer", LAYERS, ids=["plain", "bias", "soft_cap"])
def test_chosen_tokens_are_those_of_the_whole(layer: dict[str, Any]) -> None:
    """``log_probs`` and the whole distribution agree, beyond the teacher's vocabulary too; slices decode alike."""
    head = make_head(200, 70, **layer)
    features = teacher_hybrid(make_states(9, 70), HybridCode(head, 1.3, 12), make_labels(9, 200), 4)
    tokens = torch.arange(210).expand(9, -1)
    torch.testing.assert_close(features.log_probs(tokens), dense(features, 210), atol=1e-6, rtol=0)
    assert (dense(features, 210)[:, 200:] == LOG_ZERO).all()
    for some in (slice(3, 7), slice(4, 5)):
        torch.testing.assert_close(dense(features[some]), dense(features)[some], atol=1e-9, rtol=0)
    none = teacher_hybrid(make_states(0, 70), features.code, make_labels(0, 200))
    assert none.log_probs(tokens[:0]).shape == (0, 210)


def test_of_another_size() -> None:
    code = HybridCode(make_head(50, 20), 1.0, 8)
    with pytest.raises(ValueError, match=f"has {code.token_bytes} bytes, not 9"):
        code.decode(torch.zeros(2, 9, dtype=torch.uint8))


def test_equal_states_have_equal_bytes() -> None:
    """Of the state, whatever stands beside it and however large the chunks are."""
    head, states = make_head(400, 100, torch.float32), make_states(30, 100, torch.float32)
    labels = make_labels(30, 400)
    whole = teacher_hybrid(states, HybridCode(head, 1.0, 8), labels)
    for chunk_size in (1, 7):
        parts = teacher_hybrid(states.flip(0), HybridCode(head, 1.0, 8), labels.flip(0), chunk_size)
        differ = (parts.packed.flip(0) != whole.packed)[:, : 128 // 2 + 3].any(1)
        assert differ.sum() <= 2  # the order of a sum may decide a tie
