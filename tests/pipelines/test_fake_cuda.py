"""Losses, draws and gradients on a device that is no CPU: a CPU's values, and mistakes that a CPU forgives are seen.

``fake_device.py`` says what the device is and what it cannot see.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_device import NAME, fake_device, is_available
from test_one_pass import PackedRows
from torch import Tensor
from torch.utils._pytree import tree_map_only
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.head.distillation_head import distillation_head
from hpd_verl.head.features import HiddenFeatures, TeacherFeatures, teacher_features, teacher_top_k
from hpd_verl.head.output_head import OutputHead
from hpd_verl.head.sampling import counter_uniform, sample_from, sample_tokens, token_log_probs
from hpd_verl.objectives import OBJECTIVES, TokenContext, TokenLogProbs, VocabularyLogProbs
from hpd_verl.pipelines.one_pass import OnePassLoss
from hpd_verl.pipelines.staged import StudentLoss, TeacherLogProbs

pytestmark = pytest.mark.skipif(not is_available, reason="this torch lets Python declare no device")

TOKENS, VOCABULARY, PADDING, HIDDEN = 13, 300, 4, 8  # more than a block of the draw's search
DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def there(value: Any) -> Any:
    """Tensors copied to the device, in whatever holds them."""
    return tree_map_only(Tensor, lambda each: each.detach().to(NAME).requires_grad_(each.requires_grad), value)


def check(function: Callable[..., Any], *arguments: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """A function of tensors gives on the device what it gives on the CPU, on the device."""
    expected = function(*arguments)
    with fake_device():
        found = function(*there(arguments))
        for here, other in zip(tensors(expected), tensors(found), strict=True):
            assert other.device.type == NAME
            assert other.dtype == here.dtype
            torch.testing.assert_close(other.cpu(), here, rtol=rtol, atol=atol)


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a result."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        return tensors(list(value.values()))
    if isinstance(value, list | tuple):
        return [each for part in value for each in tensors(part)]
    return [each for part in vars(value).values() for each in tensors(part)] if hasattr(value, "__dict__") else []


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def labels() -> Tensor:
    return torch.arange(TOKENS) * 17 % VOCABULARY


def uniforms() -> Tensor:
    index = torch.arange(TOKENS)
    return counter_uniform(1, 2, index, index).unsqueeze(1)


# Objectives


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objective(name: str) -> None:
    student, teacher = (random(TOKENS, VOCABULARY, seed=seed).log_softmax(-1) for seed in (0, 1))
    if OBJECTIVES[name].over == "vocabulary":

        def weigh(q: Tensor, p: Tensor, y: Tensor) -> Any:
            context = TokenContext.example(OBJECTIVES[name].needs, torch.ones_like(y, dtype=torch.bool), q.dtype)
            return OBJECTIVES[name](VocabularyLogProbs(q, p, y), context)

        check(weigh, student, teacher, labels())
        return
    y, a = student[:, 0], student[:, 1]
    check(
        lambda *log_probs: OBJECTIVES[name](TokenLogProbs(*log_probs)),
        *(y, teacher[:, 0], a, teacher[:, 1], torch.arange(TOKENS) % 5 == 0),
    )


# Draws


def test_counter_uniform() -> None:
    check(lambda row, position: counter_uniform(7, 3, row, position), torch.arange(TOKENS), torch.arange(TOKENS))


def test_sample_from() -> None:
    check(sample_from, random(TOKENS, VOCABULARY).softmax(-1), uniforms()[:, 0])


@each_dtype
def test_sample_tokens(dtype: torch.dtype) -> None:
    check(
        functools.partial(sample_tokens, chunk_size=5),
        random(TOKENS, VOCABULARY, dtype=dtype),
        labels(),
        uniforms()[:, 0],
    )


def log_probs_and_gradient(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = token_log_probs(logits, tokens, 5)
    return log_probs, torch.autograd.grad(log_probs.square().sum(), logits)[0]


@each_dtype
def test_token_log_probs(dtype: torch.dtype) -> None:
    logits = random(TOKENS, VOCABULARY, dtype=dtype).requires_grad_()
    check(log_probs_and_gradient, logits, torch.stack([labels(), labels() // 2], 1), rtol=1e-2)


# Output layer


def layers(dtype: torch.dtype, bias: bool) -> list[Tensor | None]:
    """Student's and teacher's hidden states, weight and bias."""
    rows = VOCABULARY + PADDING
    made: list[Tensor | None] = []
    for seed in (0, 1):
        made += [random(TOKENS, HIDDEN, dtype=dtype, seed=seed), random(rows, HIDDEN, dtype=dtype, seed=seed)]
        made.append(random(rows, dtype=dtype, seed=seed) if bias else None)
    return made


def features_of(form: str, config: HPDConfig, *arguments: Any) -> TeacherFeatures:
    common = (*arguments, config.temperature, config.token_chunk_size)
    if form == "bare":
        hidden, head, _ = arguments
        return HiddenFeatures(hidden, head, config.temperature)
    return teacher_features(*common) if form == "hidden" else teacher_top_k(*common, k=6)


def head_and_gradients(
    layer: dict[str, Any], config: HPDConfig, form: str, exact_kl: bool, *values: Any
) -> tuple[Any, Any]:
    """The head's output and the gradients of what requires one."""
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, y, u, scale, is_rollout = values
    head = OutputHead(weight, VOCABULARY, bias, **layer)
    teacher_head = OutputHead(teacher_weight, VOCABULARY, teacher_bias, **layer)
    teacher = features_of(form, config, teacher_hidden, teacher_head, y)
    arguments = (teacher, config.objectives, config.temperature, config.token_chunk_size, exact_kl)
    context = TokenContext.example(config.objectives.needs, is_rollout, torch.float32)
    output = distillation_head(hidden, head, y, u, scale, is_rollout, *arguments, context=context)
    inputs = [each for each in (hidden, weight, bias) if each is not None]
    return output, torch.autograd.grad(output.loss * 2, inputs)


def check_head(
    config: HPDConfig,
    dtype: torch.dtype,
    bias: bool = False,
    form: str = "hidden",
    exact_kl: bool = False,
    skip: bool = False,
    **layer: Any,
) -> None:
    made = layers(dtype, bias)
    for each in made[:3]:
        if each is not None:
            each.requires_grad_()
    scale = torch.full((TOKENS,), 1 / TOKENS)
    if skip:
        scale[::4] = 0.0
    is_rollout = torch.arange(TOKENS) % 3 == 0
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    check(
        functools.partial(head_and_gradients, layer, config, form, exact_kl),
        *(*made, labels(), uniforms(), scale, is_rollout),
        **tolerance,
    )


def configured(objective: str, **settings: Any) -> HPDConfig:
    return HPDConfig(objective=objective, token_chunk_size=5, **settings)


@each_dtype
@pytest.mark.parametrize("objective", sorted(name for name, each in OBJECTIVES.items() if not each.needs_rollouts))
def test_head(objective: str, dtype: torch.dtype) -> None:
    check_head(configured(objective), dtype)


@each_dtype
def test_head_with_everything(dtype: torch.dtype) -> None:
    """Biases, scaling, soft cap, another objective on rollouts, tokens that do not count, exact KL."""
    config = configured("hpd", on_policy_objective="fkl", temperature=1.5)
    check_head(config, dtype, bias=True, exact_kl=True, skip=True, scale=0.5, soft_cap=3.0)


@each_dtype
def test_head_with_a_mixture(dtype: torch.dtype) -> None:
    config = HPDConfig(objective={"hpd": 1.0, "fkl": 0.5, "tvd": 0.1}, token_chunk_size=5)
    check_head(config, dtype, form="bare", soft_cap=3.0)


@each_dtype
def test_head_with_top_k_features(dtype: torch.dtype) -> None:
    check_head(configured("hpd"), dtype, form="topk")
    check_head(configured("fkl"), dtype, form="topk")


@each_dtype
@pytest.mark.parametrize("form", ["hidden", "topk"])
def test_teacher_features(form: str, dtype: torch.dtype) -> None:
    def function(hidden: Tensor, weight: Tensor, y: Tensor) -> TeacherFeatures:
        return features_of(form, configured("hpd"), hidden, OutputHead(weight, VOCABULARY), y)

    check(function, *layers(dtype, bias=False)[:2], labels(), rtol=1e-2, atol=1e-3)


# Losses on verl's batches


def one_pass(batch: PackedRows, config: HPDConfig, dtype: torch.dtype, copied: Callable[[Any], Any]) -> list[Any]:
    """Loss, metrics and gradients of a micro-batch, everything the loss gets having been copied."""
    loss = OnePassLoss(config, "token-mean", None)
    if config.needs_teacher:
        teacher_head = OutputHead(copied(batch.teacher_weight.to(dtype)), batch.head().vocabulary_size)
        loss.teacher_features = {
            row: HiddenFeatures(
                **{
                    name: copied(value.to(dtype if name == "hidden" else torch.float32))
                    for name, value in each.tensors.items()
                },
                head=teacher_head,
                temperature=config.temperature,
            )
            for row, each in batch.features().items()
        }
    hidden = copied(torch.cat(batch.hidden).to(dtype)).requires_grad_()
    weight = copied(batch.weight.detach().to(dtype)).requires_grad_()
    data = batch.data()
    if copied is there:
        data = data.to(NAME)
    value, metrics = loss.from_hidden(hidden, OutputHead(weight, batch.head().vocabulary_size), data)
    gradients = torch.autograd.grad(value, [hidden, weight])
    numbers = {name: torch.as_tensor(metric.aggregate()) for name, metric in metrics.items()}
    return [value.detach(), *gradients, numbers]


@each_dtype
@pytest.mark.parametrize("objective", ["hpd", "sft", "fkl"])
def test_one_pass_loss(objective: str, dtype: torch.dtype) -> None:
    """From nested tensors to gradients, with the checks for NaN and the metrics."""
    config = configured(objective, on_policy_objective=None if objective == "sft" else "opd")
    batch = PackedRows(config)
    *expected, expected_metrics = one_pass(batch, config, dtype, lambda each: each)
    with fake_device():
        *found, metrics = one_pass(batch, config, dtype, there)
        assert {each.device.type for each in found} == {NAME}
        rtol, atol = (2e-2, 1e-3) if dtype == torch.bfloat16 else (1e-4, 1e-5)
        for other, here in zip(found, expected, strict=True):
            torch.testing.assert_close(other.cpu(), here, rtol=rtol, atol=atol)
        for name, number in metrics.items():
            torch.testing.assert_close(number.cpu(), expected_metrics[name], check_dtype=False, rtol=2e-2, atol=1e-3)


def staged(batch: PackedRows, config: HPDConfig, dtype: torch.dtype, device: str) -> list[Tensor]:
    """verl's three passes over a micro-batch, without its engine: the student's, the teacher's and the update's."""
    actor = FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    data = batch.data().to(device)
    vocabulary = batch.head().vocabulary_size
    logits, teacher_logits = (
        (torch.cat(hidden) @ weight.detach().T).to(dtype).to(device).unsqueeze(0)
        for hidden, weight in ((batch.hidden, batch.weight), (batch.teacher_hidden, batch.teacher_weight))
    )
    logits.requires_grad_()
    loss = StudentLoss(actor, config)

    def nested(values: Tensor, like: str) -> Tensor:
        return tu.nested_tensor_from_tensor_list(list(values.split(data[like].offsets().diff().tolist())))

    def keep(outputs: dict[str, Tensor]) -> None:
        for name, value in outputs.items():
            data[name] = nested(value.detach().squeeze(0), "input_ids")

    keep(loss(data, student_logits=logits.detach()))
    keep(TeacherLogProbs(config, vocabulary)(data, student_logits=teacher_logits))
    weights = torch.linspace(-1, 1, data["response_mask"].values().numel(), device=device)
    for name in (fields.LABEL_WEIGHTS, fields.SAMPLED_WEIGHTS):
        data[name] = nested(weights, "response_mask")
    log_probs = loss(data, student_logits=logits)
    output = {name: nested(value.squeeze(0), "input_ids") for name, value in log_probs.items()}
    value, _ = loss(data, model_output=output)
    teacher = [data[name].values() for name in (fields.TEACHER_LABEL_LOG_PROBS, fields.TEACHER_SAMPLED_LOG_PROBS)]
    sampled = [data[name].values() for name in (fields.SAMPLED_TOKENS, fields.STUDENT_SAMPLED_LOG_PROBS)]
    return [value.detach(), torch.autograd.grad(value, logits)[0], *teacher, *sampled, data[fields.ENTROPY].values()]


@each_dtype
def test_staged_losses(dtype: torch.dtype) -> None:
    config = configured("hpd", pipeline="staged")
    batch = PackedRows(config)
    expected = staged(batch, config, dtype, "cpu")
    with fake_device():
        for other, here in zip(staged(batch, config, dtype, NAME), expected, strict=True):
            assert other.device.type == NAME
            torch.testing.assert_close(other.cpu(), here, rtol=1e-2, atol=1e-4)


# Mistakes


class Mistaken:
    """The module ``torch``, of which every function that makes a tensor forgets the device it is told."""

    MAKES = frozenset({"empty", "zeros", "ones", "full", "arange", "tensor", "empty_strided", "linspace"})

    def __init__(self) -> None:
        self.forgotten = 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(torch, name)
        if name not in self.MAKES:
            return function

        def mistaken(*args: Any, **kwargs: Any) -> Tensor:
            self.forgotten += kwargs.pop("device", None) is not None
            return function(*args, **kwargs)

        return mistaken


def one_pass_is_right() -> None:
    test_one_pass_loss("hpd", torch.float32)


@pytest.mark.parametrize(
    ("module", "test"),
    [
        ("head.distillation_head", lambda: check_head(configured("hpd"), torch.float32)),
        ("head.distillation_head", lambda: check_head(configured("fkl"), torch.bfloat16)),
        ("head.features", lambda: test_teacher_features("topk", torch.float32)),
        ("head.sampling", test_sample_from),
        ("pipelines.one_pass", one_pass_is_right),
        ("data.response_tokens", one_pass_is_right),
    ],
)
def test_a_forgotten_device_is_seen(module: str, test: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test above fails where a module leaves out ``device=``; all of them pass on a CPU."""
    mistaken = Mistaken()
    monkeypatch.setattr(importlib.import_module(f"hpd_verl.{module}"), "torch", mistaken)
    with pytest.raises((RuntimeError, AssertionError)) as error:
        test()
    assert mistaken.forgotten
    assert any(word in str(error.value) for word in ("device", NAME, "operands on")), error.value


ON_TWO_DEVICES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda there, here: there + here,
    "product": lambda there, here: there @ here,
    "cat": lambda there, here: torch.cat([there, here]),
    "where": lambda there, here: torch.where(there > 0, there, here),
    "gather": lambda there, here: there.gather(1, torch.zeros(4, 1, dtype=torch.int64)),
    "index_add_": lambda there, here: there.index_add_(0, torch.arange(4), here),
    "searchsorted": lambda there, here: torch.searchsorted(there, here),
    "bincount": lambda there, here: torch.bincount(there.flatten().long().abs(), here.flatten()),
    "out": lambda there, here: torch.exp(there, out=here),
}
OF_ANOTHER_DTYPE: dict[str, Callable[[Tensor], Any]] = {
    "product": lambda there: there @ there.bfloat16(),
    "out of a product": lambda there: torch.mm(there, there, out=there.double()),
    "out of log_softmax": lambda there: torch.log_softmax(there, -1, out=there.double()),
}


def fill_large(there: Tensor, here: Tensor) -> Tensor:
    there[there > 0.5] = 0.0
    return there


ALLOWED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number on the CPU": lambda there, here: there * here[0, 0],
    "an index on the CPU": lambda there, here: there[torch.arange(2)],
    "a copy": lambda there, here: there.copy_(here),
    "a number at chosen places": fill_large,
    "a part filled from the CPU": lambda there, here: there.index_put((torch.arange(2),), there[:2]),
}


@pytest.mark.parametrize("name", ON_TWO_DEVICES)
def test_two_devices_are_refused(name: str) -> None:
    with fake_device(), pytest.raises(RuntimeError, match=r"device|operands on"):
        ON_TWO_DEVICES[name](torch.rand(4, 4).to(NAME), torch.rand(4, 4))


@pytest.mark.parametrize("name", OF_ANOTHER_DTYPE)
def test_another_dtype_is_refused(name: str) -> None:
    with fake_device(), pytest.raises(RuntimeError, match="dtype"):
        OF_ANOTHER_DTYPE[name](torch.rand(4, 4).to(NAME))


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_gpu_allows_is_allowed(name: str) -> None:
    with fake_device():
        assert ALLOWED[name](torch.rand(4, 4).to(NAME), torch.rand(4, 4)).device.type == NAME


def test_the_device_is_seen_by_nothing_else() -> None:
    """torch does not take it for an accelerator, so other tests of the process run as without it."""
    assert not torch.accelerator.is_available()
