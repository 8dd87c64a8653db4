"""The student's draws and the log-probs of chosen tokens, against naive versions and for every chunk size."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpd_verl.head.sampling import counter_uniform, sample_from, sample_tokens, token_log_probs

VOCABULARIES = [1, 2, 255, 256, 257, 1000]
CHUNK_SIZES = [1, 3, 7, 16, 1000]
BELOW_ONE = 1.0 - 2.0**-53
property_test = settings(deadline=None, max_examples=100, derandomize=True)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# counter_uniform


def grid(rows: int, positions: int) -> tuple[Tensor, Tensor]:
    """Rows and positions of all tokens of a batch, flattened."""
    row, position = torch.meshgrid(torch.arange(rows), torch.arange(positions), indexing="ij")
    return row.flatten(), position.flatten()


def unsigned_uniform(*counters: int) -> float:
    """counter_uniform in unbounded, unsigned Python integers."""
    state = 0
    for counter in counters:
        state = (state + counter + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return (state >> 11) / 2**53


@property_test
@given(
    seed=st.integers(-(2**70), 2**70),
    step=st.integers(0, 2**40),
    row=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**63 - 1),
)
def test_uniform_is_splitmix64(seed: int, step: int, row: int, position: int) -> None:
    """Bit for bit: torch's signed integers compute the unsigned hash; another would change old runs."""
    found = counter_uniform(seed, step, torch.tensor([row]), torch.tensor([position]))
    assert found.dtype == torch.float64
    assert found.tolist() == [unsigned_uniform(seed, step, 0, row, position)]
    assert 0 <= found.item() < 1


@property_test
@given(
    data=st.data(),
    rows=st.integers(1, 6),
    positions=st.integers(1, 9),
    seed=st.integers(),
    step=st.integers(0, 99),
)
def test_uniform_does_not_depend_on_the_batch(
    data: st.DataObject, rows: int, positions: int, seed: int, step: int
) -> None:
    """However tokens are ordered and split into micro-batches, each keeps its number."""
    row, position = grid(rows, positions)
    whole = counter_uniform(seed, step, row, position)
    order = torch.tensor(data.draw(st.permutations(range(len(row)))))
    cut = data.draw(st.integers(0, len(row)))
    parts = [counter_uniform(seed, step, row[part], position[part]) for part in (order[:cut], order[cut:])]
    assert torch.equal(torch.cat(parts), whole[order])


def test_uniform_leaves_the_global_generator_alone() -> None:
    """No state is read or advanced."""
    row, position = grid(2, 3)
    state = torch.get_rng_state()
    first = counter_uniform(0, 0, row, position)
    torch.manual_seed(1)
    assert torch.equal(counter_uniform(0, 0, row, position), first)
    torch.set_rng_state(state)
    counter_uniform(0, 0, row, position)
    assert torch.equal(torch.get_rng_state(), state)


def kolmogorov_smirnov(numbers: Tensor) -> float:
    """Distance from the uniform distribution times sqrt(n); above 1.95 with probability 0.001 if uniform."""
    ordered = numbers.sort().values
    n = len(ordered)
    upper = torch.arange(1, n + 1, dtype=torch.float64) / n
    return max((upper - ordered).max().item(), (ordered - upper + 1 / n).max().item()) * math.sqrt(n)


def test_uniform_is_uniform() -> None:
    """Over a batch, along each single counter, and in its low bits. Seeds are fixed: the outcome is too."""
    row, position = grid(64, 512)
    numbers = counter_uniform(42, 1, row, position)
    assert len(numbers.unique()) == len(numbers)
    assert kolmogorov_smirnov(numbers) < 1.95
    assert kolmogorov_smirnov((numbers * 2**20) % 1) < 1.95

    one, many = torch.zeros(4096, dtype=torch.int64), torch.arange(4096)
    assert kolmogorov_smirnov(counter_uniform(42, 1, many, one)) < 1.95
    assert kolmogorov_smirnov(counter_uniform(42, 1, one, many)) < 1.95
    for counter in ("seed", "step"):
        values = [
            counter_uniform(**({"seed": 42, "step": 1} | {counter: value}), row=one[:1], position=one[:1])
            for value in range(1024)
        ]
        assert kolmogorov_smirnov(torch.cat(values)) < 1.95


def test_uniform_streams_are_independent() -> None:
    """Another seed, step, row or position, or two counters swapped: other numbers, uncorrelated."""
    row, position = grid(64, 64)
    streams = {
        "base": counter_uniform(1, 2, row, position),
        "seed": counter_uniform(2, 2, row, position),
        "step": counter_uniform(1, 3, row, position),
        "row": counter_uniform(1, 2, row + 64, position),
        "position": counter_uniform(1, 2, row, position + 64),
        "seed and step swapped": counter_uniform(2, 1, row, position),
        # Offsets keep the pairs apart: were the hash symmetric in row and position, these two would be equal.
        "row and position swapped": counter_uniform(1, 2, position + 128, row),
        "row and position not swapped": counter_uniform(1, 2, row, position + 128),
    }
    everything = torch.cat(list(streams.values()))
    assert len(everything.unique()) == len(everything)
    # Neighbouring positions and neighbouring rows of one stream must not correlate either.
    square = streams["base"].view(64, 64)
    pairs = {"positions": (square[:, :-1], square[:, 1:]), "rows": (square[:-1], square[1:])}
    pairs |= {f"{a} / {b}": (streams[a], streams[b]) for a, b in itertools.combinations(streams, 2)}
    for name, (first, second) in pairs.items():
        correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()
        assert abs(correlation) * math.sqrt(first.numel()) < 4, name


# sample_from


def naive_draw(probs: Tensor, uniform: float) -> int:
    """The first token whose cumulative mass exceeds ``uniform`` times the mass, one token after the other."""
    target = uniform * sum(probs.tolist())
    cumulative = 0.0
    for token, prob in enumerate(probs.tolist()):
        cumulative += prob
        if cumulative > target:
            return token
    raise AssertionError("no token")


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_draw_is_the_naive_one(vocabulary: int) -> None:
    """Equal everywhere on masses without rounding, including targets that fall exactly between two tokens."""
    masses = torch.randint(0, 4, (40, vocabulary), generator=generator(vocabulary))
    masses[:, vocabulary // 2] += 1
    uniforms = torch.randint(0, 1024, (40,), generator=generator(1)).double() / 1024
    uniforms[0], uniforms[1] = 0.0, BELOW_ONE
    for dtype in (torch.float32, torch.float64):
        found = sample_from(masses.to(dtype), uniforms)
        assert found.dtype == torch.int64
        assert found.tolist() == [naive_draw(row, u) for row, u in zip(masses, uniforms.tolist(), strict=True)]


def test_draw_between_two_tokens() -> None:
    """Tokens own half-open intervals: a target at the end of one, or of a block, is the next's."""
    probs = torch.zeros(1, 600)
    probs[0, [10, 255, 256, 599]] = 0.25
    for uniform, token in [(0.0, 10), (0.25, 255), (0.5, 256), (0.75, 599), (0.4999, 255), (BELOW_ONE, 599)]:
        assert sample_from(probs, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


@pytest.mark.parametrize(("dtype", "distance"), [(torch.float64, 1e-11), (torch.float32, 1e-7)])
def test_draw_is_as_fine_as_its_masses(dtype: torch.dtype, distance: float) -> None:
    """Targets just below and above the end of a token get that token and the next: within blocks and over them the
    masses are added up in float64, those of a block in their own dtype."""
    probs = torch.randn(1, 1000, generator=generator(12), dtype=torch.float64).softmax(-1).to(dtype)
    cumulative = probs.double().cumsum(-1).squeeze(0)
    tokens = torch.arange(0, 999, 7)
    uniforms = torch.cat([cumulative[tokens] - distance, cumulative[tokens] + distance]) / cumulative[-1]
    assert torch.equal(sample_from(probs.expand(len(uniforms), -1), uniforms), torch.cat([tokens, tokens + 1]))


@st.composite
def logit_batches(draw: st.DrawFn) -> Tensor:
    """float32 [n, V] of peaked, flat and sparse rows; a share of the logits is -inf, never all of a row."""
    vocabulary = draw(st.sampled_from(VOCABULARIES))
    scale = draw(st.sampled_from([0.0, 1.0, 10.0, 60.0]))
    removed = draw(st.sampled_from([0.0, 0.5, 0.99]))
    rows = draw(st.integers(1, 4))
    random = generator(draw(st.integers(0, 2**32)))
    logits = scale * torch.randn(rows, vocabulary, generator=random)
    kept = torch.randint(vocabulary, (rows, 1), generator=random)
    mask = (torch.rand(rows, vocabulary, generator=random) < removed).scatter(1, kept, False)
    return logits.masked_fill(mask, -math.inf)


UNIFORMS = st.lists(st.floats(0, BELOW_ONE), min_size=1, max_size=5)


def draw_each(probs: Tensor, uniforms: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """``(probs, uniforms, tokens)`` of every pair of a row and a number."""
    numbers = torch.tensor(uniforms, dtype=torch.float64).repeat(len(probs))
    probs = probs.repeat_interleave(len(uniforms), 0)
    return probs, numbers, sample_from(probs, numbers)


@property_test
@given(logits=logit_batches(), uniforms=UNIFORMS)
def test_draw_is_never_impossible(logits: Tensor, uniforms: list[float]) -> None:
    """Always a token of positive probability, at both ends of [0, 1) too."""
    probs, _, tokens = draw_each(logits.softmax(-1), [0.0, 2.0**-53, BELOW_ONE, *uniforms])
    assert ((tokens >= 0) & (tokens < probs.shape[1])).all()
    assert (probs.gather(1, tokens.unsqueeze(1)) > 0).all()


@property_test
@given(logits=logit_batches(), uniforms=UNIFORMS)
def test_draw_holds_its_target(logits: Tensor, uniforms: list[float]) -> None:
    """The token's interval of the cumulative mass holds the target, to the rounding of a block's float32 sum.

    Targets as close as that to the end of a block are left out: there the rounding of two sums decides.
    """
    probs, numbers, tokens = draw_each(logits.softmax(-1), uniforms)
    cumulative = probs.double().cumsum(-1)
    target = numbers * cumulative[:, -1]
    ends = torch.cat([cumulative[:, 255::256], cumulative[:, -1:]], 1)
    clear = ((target.unsqueeze(1) - ends).abs() > 1e-6).all(1)
    upper = cumulative.gather(1, tokens.unsqueeze(1)).squeeze(1)
    lower = upper - probs.double().gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert (lower - 1e-6 <= target)[clear].all()
    assert (target <= upper + 1e-6)[clear].all()


def test_draw_at_the_end_of_the_mass() -> None:
    """The largest number draws the last possible token, as the naive search does, not the likeliest one."""
    logits = 5 * torch.randn(32, 200, generator=generator(0), dtype=torch.float64)
    logits[:, 190:] = -math.inf
    logits[:, 189] = 0.0
    probs, numbers, tokens = draw_each(logits.softmax(-1), [BELOW_ONE])
    upper = probs.cumsum(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert (numbers <= upper + 1e-12).all()


@pytest.mark.parametrize("vocabulary", [5, 257, 1000])
def test_draw_frequencies(vocabulary: int) -> None:
    """Counts of 40,000 draws against the probabilities: chi-square within 4 deviations, seed fixed."""
    draws = 40_000
    logits = torch.randn(vocabulary, generator=generator(vocabulary))
    logits[::5] = -math.inf
    probs = logits.softmax(-1)
    position = torch.arange(draws)
    uniforms = counter_uniform(7, 1, torch.zeros_like(position), position)
    tokens = torch.cat([sample_from(probs.expand(len(part), -1), part) for part in uniforms.split(2000)])
    counts = tokens.bincount(minlength=vocabulary).double()
    possible = probs > 0
    assert not counts[~possible].any()
    expected = draws * probs[possible].double()
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum().item()
    freedom = int(possible.sum()) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


# sample_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocabulary", [1, 300])
def test_sample_tokens(dtype: torch.dtype, vocabulary: int) -> None:
    """Log-probs and entropy of torch's distribution, draws of sample_from."""
    n = 23
    logits = (3 * torch.randn(n, vocabulary, generator=generator(0))).to(dtype)
    if vocabulary > 1:
        logits[:, ::4] = -math.inf
    labels = torch.randint(vocabulary, (n,), generator=generator(1)) // 4 * 4 + (vocabulary > 1)
    uniforms = torch.rand(n, dtype=torch.float64, generator=generator(2))
    label_log_probs, sampled, sampled_log_probs, entropy = sample_tokens(logits, labels, uniforms, chunk_size=5)

    result_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for values in (label_log_probs, sampled_log_probs, entropy):
        assert values.dtype == result_dtype
    distribution = torch.distributions.Categorical(logits=logits.double())
    tolerance = 1e-5 if result_dtype == torch.float32 else 1e-12
    assert torch.isfinite(label_log_probs).all()
    torch.testing.assert_close(label_log_probs.double(), distribution.log_prob(labels), rtol=tolerance, atol=tolerance)
    of_sampled = distribution.log_prob(sampled)
    torch.testing.assert_close(sampled_log_probs.double(), of_sampled, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropy.double(), distribution.entropy(), rtol=tolerance, atol=tolerance)
    assert torch.equal(sampled, sample_from(torch.log_softmax(logits.to(result_dtype), -1).exp(), uniforms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample_tokens_does_not_depend_on_chunks(dtype: torch.dtype) -> None:
    """Bit for bit the same, and no gradient recorded."""
    n, vocabulary = 37, 700
    logits = (3 * torch.randn(n, vocabulary, generator=generator(3))).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (n,), generator=generator(4))
    uniforms = torch.rand(n, dtype=torch.float64, generator=generator(5))
    whole = sample_tokens(logits, labels, uniforms, chunk_size=n)
    assert not any(values.requires_grad for values in whole)
    for chunk_size in CHUNK_SIZES:
        for values, expected in zip(sample_tokens(logits, labels, uniforms, chunk_size), whole, strict=True):
            assert torch.equal(values, expected), chunk_size


# token_log_probs


def token_case(dtype: torch.dtype, n: int = 19, vocabulary: int = 31, tokens: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """``(logits, tokens, weights)``; every other row holds the same token twice."""
    logits = (2 * torch.randn(n, vocabulary, generator=generator(6), dtype=torch.float64)).to(dtype)
    chosen = torch.randint(vocabulary, (n, tokens), generator=generator(7))
    chosen[::2, -1] = chosen[::2, 0]
    weights = torch.randn(n, tokens, generator=generator(8), dtype=torch.float64)
    return logits, chosen, weights


def weighted_grad(logits: Tensor, tokens: Tensor, weights: Tensor, chunk_size: int | None) -> tuple[Tensor, Tensor]:
    """Log-probs and the gradient of their weighted sum; torch's own if ``chunk_size`` is None."""
    leaf = logits.clone().requires_grad_()
    if chunk_size is None:
        log_probs = torch.log_softmax(leaf, -1).gather(1, tokens)
    else:
        log_probs = token_log_probs(leaf, tokens, chunk_size)
    (grad,) = torch.autograd.grad((log_probs * weights.to(log_probs.dtype)).sum(), leaf)
    return log_probs.detach(), grad


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_token_log_probs_float64(chunk_size: int) -> None:
    """Values and gradient are torch's; a token that stands twice in a row collects both gradients."""
    logits, tokens, weights = token_case(torch.float64)
    found = weighted_grad(logits, tokens, weights, chunk_size)
    expected = weighted_grad(logits, tokens, weights, None)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)


def test_token_log_probs_gradcheck() -> None:
    """Against finite differences, through one token, several, and a repeated one."""
    logits, tokens, _ = token_case(torch.float64, n=5, vocabulary=6)
    for columns in (tokens[:, :1], tokens):
        assert torch.autograd.gradcheck(lambda x, c=columns: token_log_probs(x, c, 2), logits.requires_grad_())


def test_token_log_probs_repeated_token() -> None:
    """By hand: weights 2 and 3 on one token of two equally likely ones give +-(2 + 3) / 2."""
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    log_probs = token_log_probs(logits, torch.tensor([[1, 1]]), 1)
    (log_probs * torch.tensor([[2.0, 3.0]])).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[-2.5, 2.5]], dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_token_log_probs_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    """float32 log-probs exact to float32 even from bfloat16 logits; the gradient has the logits' dtype."""
    logits, tokens, weights = token_case(dtype)
    log_probs, grad = weighted_grad(logits, tokens, weights, 5)
    expected, expected_grad = weighted_grad(logits.double(), tokens, weights, None)
    assert log_probs.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_log_probs_does_not_depend_on_chunks(dtype: torch.dtype) -> None:
    """Values and gradient, bit for bit; the logits are left as they were."""
    logits, tokens, weights = token_case(dtype, n=37, vocabulary=300)
    before = logits.clone()
    whole = weighted_grad(logits, tokens, weights, 37)
    for chunk_size in CHUNK_SIZES:
        for values, expected in zip(weighted_grad(logits, tokens, weights, chunk_size), whole, strict=True):
            assert torch.equal(values, expected), chunk_size
    token_log_probs(logits, tokens, 5)
    sample_tokens(logits, tokens[:, 0], weights[:, 0].abs() % 1, 5)
    assert torch.equal(logits, before)


def test_token_log_probs_of_impossible_tokens() -> None:
    """A logit of -inf gives log-prob -inf; with weight 0, as rkl has there, the gradient stays finite."""
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    log_probs = token_log_probs(logits, torch.tensor([[1, 2]]), 4)
    assert log_probs[0, 0] == -math.inf
    (grad,) = torch.autograd.grad(log_probs, logits, torch.tensor([[0.0, 1.0]]))
    q = torch.tensor([1.0, math.e]) / (1 + math.e)
    torch.testing.assert_close(grad, torch.tensor([[-q[0], 0.0, 1 - q[1]]]))


# Memory


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest floating tensor above 2 bytes an element made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point() and value.element_size() > 2:
                self.numel = max(self.numel, value.numel())
        return result


@contextmanager
def at_most(numel: int) -> Iterator[None]:
    with LargestTensor() as largest:
        yield
    assert 0 < largest.numel <= numel


def test_memory_is_one_chunk() -> None:
    """From bfloat16 logits, no float32 tensor exceeds one chunk of tokens (vocabulary padded to blocks)."""
    n, vocabulary, chunk_size = 64, 1000, 4
    logits = torch.randn(n, vocabulary, generator=generator(9)).bfloat16()
    labels = torch.randint(vocabulary, (n,), generator=generator(10))
    uniforms = torch.rand(n, dtype=torch.float64, generator=generator(11))
    limit = chunk_size * 1024

    with pytest.raises(AssertionError), at_most(limit):  # the instrument does see whole-vocabulary float32
        torch.log_softmax(logits.float(), -1)
    with at_most(limit):
        _, sampled, _, _ = sample_tokens(logits, labels, uniforms, chunk_size)
    leaf = logits.requires_grad_()
    with at_most(limit):
        token_log_probs(leaf, torch.stack([labels, sampled], 1), chunk_size).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16


def test_nan_logits_surface_as_nan() -> None:
    """A broken row gives NaN, not an error of indices; the other rows are what they are without it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 300, generator=generator)
    labels, uniforms = torch.tensor([1, 2, 3, 4]), torch.rand(4, dtype=torch.float64, generator=generator)
    expected = sample_tokens(logits, labels, uniforms, 2)
    logits[1] = math.nan
    outputs = sample_tokens(logits, labels, uniforms, 2)
    for output, good in zip(outputs, expected, strict=True):
        assert torch.equal(output[[0, 2, 3]], good[[0, 2, 3]])
    assert torch.isnan(outputs[0][1])
    assert torch.isnan(outputs[2][1])
