"""A teacher with a context of its own, several teachers, and the student as its own teacher."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, Tiny, main_ppo_config, make_model, make_rows, write_parquet
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from pooling_server import PoolingServer
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.workers.config import TrainingWorkerConfig

from hpd_verl.checks.start import check_main_ppo, check_sft_run
from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.data.response_tokens import column, row_numbers
from hpd_verl.errors import Refused
from hpd_verl.head.features import TeacherFeatures
from hpd_verl.hydra_config import config_dir
from hpd_verl.objectives import registry
from hpd_verl.pipelines.one_pass import OnePass, OnePassLoss, StudentWorker
from hpd_verl.pipelines.updates import over_own_tokens
from hpd_verl.run.choices import with_dtype
from hpd_verl.sft.demonstrations import as_batch, read_demonstrations
from hpd_verl.sft.fill_store import fill
from hpd_verl.sft.start import teacher_settings, write_row_layouts
from hpd_verl.teacher.choice import make_teacher
from hpd_verl.teacher.of_student import AveragedStudent
from hpd_verl.teacher.rows import teacher_rows
from hpd_verl.teacher.several import SeveralTeachers
from hpd_verl.teacher.teacher import Teacher

pytestmark = pytest.mark.usefixtures("process_group")


def hint(row: dict[str, Any]) -> list[dict[str, str]]:
    words = row["prompt"][0]["content"].split()
    return [{"role": "user", "content": f"{row['prompt'][0]['content']} . is {int(words[0]) + int(words[2])}"}]


@pytest.fixture(scope="module")
def files(tiny: Tiny) -> dict[str, Path]:
    """The same rows: plain, with the teacher's prompts, with the names of two teachers, with both."""
    rows = make_rows(32)
    hinted = [{**row, "teacher_prompt": hint(row)} for row in rows]
    named = [{**row, "data_source": "maths" if index % 3 else "code"} for index, row in enumerate(rows)]
    both = [{**row, "teacher_prompt": hint(row)} for row in named]
    folder = tiny.folder / "of_teachers"
    folder.mkdir(exist_ok=True)
    made = {"plain": rows, "hinted": hinted, "named": named, "both": both}
    return {name: write_parquet(each, folder / f"{name}.parquet") for name, each in made.items()}


@pytest.fixture(scope="module")
def other(tiny: Tiny) -> Path:
    """A second teacher."""
    return make_model(tiny.folder / "other_teacher", seed=9)


def configured(tiny: Tiny, file: Path, *overrides: str) -> DictConfig:
    settings = [
        f"model.path={tiny.student}",
        f"data.train_files={file}",
        "data.train_batch_size=8",
        "data.max_prompt_length=16",
        "data.max_response_length=16",
        "data.num_workers=0",
        "optim.lr=1e-2",
        "trainer.total_training_steps=2",
        f"trainer.default_local_dir={tiny.folder / 'never'}",
        *overrides,
    ]
    if not any(word.startswith(("teacher.model.path=", "algorithm.hpd.teachers=")) for word in overrides):
        settings.append(f"teacher.model.path={tiny.teacher}")
    with initialize_config_dir(str(config_dir()), version_base=None):
        return compose("sft_trainer", overrides=settings)


def student_of(config: DictConfig) -> StudentWorker:
    engine = omega_conf_to_dataclass(with_dtype(config.engine))
    engine.use_dynamic_bsz = True
    engine.max_token_len_per_gpu = engine.infer_max_token_len_per_gpu = config.data.max_token_len_per_gpu
    optimiser = omega_conf_to_dataclass(config.optim)
    optimiser.total_training_steps = 10
    worker = StudentWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=omega_conf_to_dataclass(config.model),
            engine_config=engine,
            optimizer_config=optimiser,
            checkpoint_config=omega_conf_to_dataclass(config.checkpoint),
        )
    )
    worker.reset()
    return worker


def batch_of(config: DictConfig, rows: int = 8) -> TensorDict:
    model = omega_conf_to_dataclass(config.model)
    dataset = read_demonstrations(config, model, config.data.train_files)
    collated = SFTTensorCollator("no_padding")([dataset[index] for index in range(rows)])
    batch = as_batch(config, model, collated, step=1, steps=1)
    tu.assign_non_tensor(batch, mini_batch_size=rows, epochs=1, seed=0, dataloader_kwargs={"shuffle": False})
    return batch


def teacher_of(config: DictConfig, student: StudentWorker | None = None) -> Teacher:
    hpd = HPDConfig.from_config(config.algorithm.hpd)
    return make_teacher(teacher_settings(config), hpd, omega_conf_to_dataclass(config.model), student)


def prompt_ids(tiny: Tiny, chat: list[dict[str, str]]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(tiny.student)
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("way", ["column", "template", "truncated"])
def test_the_teacher_reads_its_own_prompt(tiny: Tiny, files: dict[str, Path], way: str) -> None:
    """Its log-probs are those of transformers over teacher_prompt + response; the student's rows stay."""
    own = {
        "column": ("data.max_teacher_prompt_length=20",),
        "template": (
            "data.max_teacher_prompt_length=20",
            'data.teacher_prompt_template="{prompt} . is {answer}"',
        ),
        "truncated": ("data.max_teacher_prompt_length=5", "data.filter_overlong_prompts=false"),
    }[way]
    file = files["plain" if way == "template" else "hinted"]
    config = configured(tiny, file, *own)
    if way != "truncated":
        check_sft_run(config)
    write_row_layouts(config)
    batch = batch_of(config)
    student = batch["input_ids"].unbind()
    found = teacher_of(config).features(teacher_rows(batch))
    model = AutoModelForCausalLM.from_pretrained(tiny.teacher, dtype=torch.float32)
    worst = 0.0
    for index, (row, response) in enumerate(zip(make_rows(32), batch["responses"].unbind(), strict=False)):
        prompt = prompt_ids(tiny, hint(row))
        prompt = prompt[-5:] if way == "truncated" else prompt
        hidden = found[index]
        log_probs = hidden.log_probs(response.unsqueeze(1)).squeeze(1)
        expected = plain_log_probs(model, prompt, response, 29)
        worst = max(worst, (log_probs - expected).abs().max().item())
        assert student[index].tolist() == [*prompt_ids(tiny, row["prompt"]), *response.tolist()]
    assert worst < 2e-5
    print("largest difference of the teacher's log-probs", worst)
    assert column(batch, fields.TRUNCATED_TEACHER_PROMPT).sum() == (8 if way == "truncated" else 0)


def plain_log_probs(model: Any, prompt: list[int], response: Tensor, vocabulary: int) -> Tensor:
    """Of a transformers model, over the tokens that the student has, float32 [tokens]."""
    ids = torch.tensor([*prompt, *response.tolist()])
    with torch.no_grad():
        log_probs = model(ids.unsqueeze(0)).logits[0, :, :vocabulary].log_softmax(-1)
    return log_probs[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :].unsqueeze(1)).squeeze(1)


BAD_FILES: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "null": (lambda row: {"teacher_prompt": None}, (), "teacher_prompt is null, expected a chat list"),
    "empty": (lambda row: {"teacher_prompt": []}, (), "teacher_prompt is an empty list, expected a chat list"),
    "text": (lambda row: {"teacher_prompt": "2"}, (), "teacher_prompt is str, expected a chat list"),
    "blank": (
        lambda row: {"teacher_prompt": [{"role": "user", "content": " "}]},
        (),
        "teacher_prompt has no text; write what the teacher shall read",
    ),
    "begins the answer": (
        lambda row: {"teacher_prompt": [*hint(row), {"role": "assistant", "content": "2"}]},
        (),
        "teacher_prompt ends with a message of the assistant, which begins the answer, and prompt does not; end",
    ),
    "no value": (
        lambda row: {"solution": None},
        ('data.teacher_prompt_template="{prompt} {solution}"',),
        "solution is null, and data.teacher_prompt_template has {solution}; give every row a text",
    ),
    "no column": (
        lambda row: {},
        ('data.teacher_prompt_template="{prompt} {solutoin}"',),
        "data.teacher_prompt_template: {solutoin} is no column of",
    ),
    "no such column": (
        lambda row: {},
        ("data.teacher_prompt_key=hint",),
        "no column 'hint' (data.teacher_prompt_key), there are",
    ),
    "nothing reads the length": (
        lambda row: {},
        ("data.max_teacher_prompt_length=20",),
        "data.max_teacher_prompt_length=20: no file has the column 'teacher_prompt' (data.teacher_prompt_key)",
    ),
    "too long": (
        lambda row: {"teacher_prompt": hint(row)},
        ("data.max_teacher_prompt_length=4",),
        "data.max_teacher_prompt_length=4: of 32 rows of data.train_files 32 prompts of the teacher are left out",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_prompts_of_the_teacher(tiny: Tiny, tmp_path: Path, case: str) -> None:
    """One line that names the row; parquet and JSON lines."""
    change, overrides, message = BAD_FILES[case]
    keys = set(change(make_rows(1)[0]))
    good = {"teacher_prompt": hint, "solution": lambda row: "2"}
    rows = [
        row | ({name: good[name](row) for name in keys} if index != 5 or case == "too long" else change(row))
        for index, row in enumerate(make_rows(32))
    ]
    files = [tmp_path / "rows.jsonl"]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    if case != "text":  # no column of two types
        files.append(write_parquet(rows, tmp_path / "rows.parquet"))
    for file in files:
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            check_sft_run(configured(tiny, file, *overrides))
        assert "\n" not in str(error.value)
        assert "row 5" in str(error.value) or case in (
            "no column",
            "no such column",
            "nothing reads the length",
            "too long",
        )


def test_files_with_and_without_the_column(tiny: Tiny, files: dict[str, Path]) -> None:
    mixed = f"[{files['plain']},{files['hinted']}]"
    with pytest.raises(ValueError, match=r"no column 'teacher_prompt', which .*hinted.parquet has; add it"):
        check_sft_run(configured(tiny, Path(mixed)))
    with pytest.raises(ValueError, match=r"data.val_files=.*: the column 'teacher_prompt' is not there, and in"):
        check_sft_run(configured(tiny, files["hinted"], f"data.val_files={files['plain']}"))


def of_two(tiny: Tiny, other: Path, *more: str) -> str:
    return f"algorithm.hpd.teachers={{maths: {{path: {tiny.teacher}}}, code: {{path: {other}{''.join(more)}}}}}"


def gradients(worker: StudentWorker) -> dict[str, Tensor]:
    return {name: each.grad.to_local().clone() for name, each in worker.engine.module.named_parameters()}


FOLLOWING = """
import torch
from hpd_verl.objectives import objective

seen = []

@objective("following", over="vocabulary", returns="loss", needs={"prefix", "position", "row.is_rollout"})
def following(log_probs, context):
    if len(log_probs.labels) > 5:
        seen.append(context)
    weight = torch.sigmoid(context.prefix_teacher / 9) + context.position / context.length - context.row["is_rollout"]
    return weight * (log_probs.teacher_probs * (log_probs.teacher - log_probs.student)).sum(-1)
"""


@pytest.fixture
def following(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An objective over the vocabulary that returns a loss and needs sums over the prefix, which it notes."""
    monkeypatch.setattr(registry, "OBJECTIVES", dict(registry.OBJECTIVES))
    (tmp_path / "following.py").write_text(FOLLOWING)
    return f"{tmp_path}/following.py:following"


def prefixes_seen(following: str) -> Tensor:
    """The sums over the prefix of all tokens that the objective was given."""
    seen = sys.modules[registry.find_objective(following).function.__module__].seen
    return torch.cat([context.prefix_teacher for context in seen])


def test_gradients_are_the_sum_of_separate_runs(
    tiny: Tiny, files: dict[str, Path], other: Path, following: str
) -> None:
    """One backward of a batch with two teachers, against a run for each teacher on its own rows of the same batch."""
    config = configured(tiny, files["both"], of_two(tiny, other), "data.max_teacher_prompt_length=20")
    check_sft_run(config)
    write_row_layouts(config)
    student, batch = student_of(config), batch_of(config)
    hpd = HPDConfig.from_config(config.algorithm.hpd)
    teacher = teacher_of(config)
    assert isinstance(teacher, SeveralTeachers)
    single = {}
    for name, path in (("maths", tiny.teacher), ("code", other)):
        alone = configured(tiny, files["both"], f"teacher.model.path={path}", "data.max_teacher_prompt_length=20")
        write_row_layouts(alone)
        single[name] = teacher_of(alone).features(teacher_rows(batch_of(alone)))
    found = teacher.features(teacher_rows(batch))
    of_row = column(batch, fields.TEACHER).tolist()
    assert set(of_row) == {0, 1}
    for row, place in zip(row_numbers(batch).tolist(), of_row, strict=True):
        for name, tensor in single[["maths", "code"][place]][row].tensors.items():
            torch.testing.assert_close(found[row].tensors[name], tensor, atol=1e-6, rtol=1e-6)
    measured = {}
    for objective in ("hpd", "fkl", "jsd_exact", following):
        mixed = hpd.model_copy(update={"objective": objective})
        whole = backward(student, mixed, batch, found)
        parts = [
            backward(student, mixed.model_copy(update={"teachers": None}), only(batch, of_row, place), found)
            for place in (0, 1)
        ]
        worst = 0.0
        for name, gradient in whole[1].items():
            together = parts[0][1][name] + parts[1][1][name]
            worst = max(worst, ((gradient - together).abs().max() / together.abs().max().clamp_min(1e-12)).item())
        assert whole[0] == pytest.approx(parts[0][0] + parts[1][0], rel=1e-5)
        assert worst < 1e-4
        measured[objective] = worst
    print("largest relative difference of gradients", measured)
    # Of the batch's rows and, after them, of each teacher's: the sums are by the row's own teacher and its prompt.
    sums = prefixes_seen(following)
    both, each = sums.chunk(2)
    assert torch.equal(both.sort().values, each.sort().values)
    assert sums.isfinite().all()
    assert sums.abs().max() > 0.1


def only(batch: TensorDict, of_row: list[int], place: int) -> TensorDict:
    """The rows of one teacher, in a batch whose numbers to divide by are the whole one's."""
    rows = [row for row, of in enumerate(of_row) if of == place]
    part = tu.index_select_tensor_dict(batch, rows)
    return part.exclude(fields.TEACHER)


def backward(
    student: StudentWorker, hpd: HPDConfig, batch: TensorDict, features: dict[int, TeacherFeatures]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a micro-batch, divided by the tokens of 8 rows."""
    loss = OnePassLoss(hpd, "token-mean", None)
    loss.teacher_features = features
    data = batch.exclude(fields.TEACHER_PROMPTS)
    tu.assign_non_tensor(data, use_remove_padding=True, use_dynamic_bsz=True, max_token_len_per_gpu=16384)
    tu.assign_non_tensor(data, batch_num_tokens=80, dp_size=1, global_batch_size=8)
    with student.engine.train_mode():
        student.engine.optimizer_zero_grad()
        output = student.engine.forward_step(data, loss, forward_only=False)
        output[0].backward()
        return output[0].item(), gradients(student)


def updates(config: DictConfig, steps: int, folder: Path | None = None) -> tuple[OnePass, list[dict[str, float]]]:
    """Train so many steps on one batch; with a folder, from what a checkpoint's folder has of the teacher."""
    write_row_layouts(config)
    student = student_of(config)
    hpd = HPDConfig.from_config(config.algorithm.hpd)
    one_pass = OnePass(student, teacher_of(config, student), hpd)
    if folder is not None:
        assert one_pass.teacher is not None
        one_pass.teacher.resume(folder)
    logged = []
    for _ in range(steps):
        output = one_pass.update(batch_of(config))
        logged.append(over_own_tokens({name: float(value) for name, value in metrics_of(output).items()}))
    return one_pass, logged


def metrics_of(output: TensorDict | None) -> dict[str, Any]:
    assert output is not None
    return {name: value for name, value in tu.get(output, "metrics").items() if isinstance(value, int | float)}


def weights(module: Any) -> dict[str, Tensor]:
    found = {name: each.detach() for name, each in module.named_parameters()}
    return {name: (each.to_local() if isinstance(each, DTensor) else each).clone() for name, each in found.items()}


def test_several_teachers_colocated_and_stored(tiny: Tiny, files: dict[str, Path], other: Path, tmp_path: Path) -> None:
    """One with a store that fill-store has filled, one without: the losses of two teachers beside the student."""
    plain = configured(tiny, files["both"], of_two(tiny, other), "data.max_teacher_prompt_length=20")
    _, expected = updates(plain, 2)
    stored = configured(
        tiny,
        files["both"],
        of_two(tiny, other, ", teacher_cache: 'off'"),
        "data.max_teacher_prompt_length=20",
        "algorithm.hpd.teacher_cache=disk",
        f"algorithm.hpd.teacher_cache_dir={tmp_path / 'store'}",
        "algorithm.hpd.teacher_cache_dtype=float32",
        "algorithm.hpd.teacher_cache_max_gib=0.01",
    )
    check_sft_run(stored, fills_store=True)
    assert fill(stored)["hpd/teacher_cache_rows"] > 0
    assert [each.name for each in (tmp_path / "store").iterdir()] == ["maths"]
    _, found = updates(stored, 2)
    for one, two in zip(expected, found, strict=True):
        assert two["hpd/loss"] == pytest.approx(one["hpd/loss"], rel=1e-6)
        for name in ("maths", "code"):
            for metric in ("token_fraction", "reverse_kl_k1", "teacher_nll", "student_nll"):
                key = f"hpd/teachers/{name}/{metric}"
                assert two[key] == pytest.approx(one[key], rel=1e-5), key
        assert two["hpd/teachers/maths/teacher_is_loaded"] == 0
        fractions = [one[f"hpd/teachers/{name}/token_fraction"] for name in ("maths", "code")]
        nlls = [one[f"hpd/teachers/{name}/teacher_nll"] for name in ("maths", "code")]
        assert sum(fractions) == pytest.approx(1)
        assert one["hpd/teacher_nll"] == pytest.approx(
            sum(f * n for f, n in zip(fractions, nlls, strict=True)), rel=1e-6
        )
        assert nlls[0] != pytest.approx(nlls[1], rel=1e-2)


def test_the_student_as_it_was_teaches(tiny: Tiny, files: dict[str, Path]) -> None:
    """path=student is the teacher of the student's own folder, in every step."""
    path = "data.max_teacher_prompt_length=20"
    expected = updates(configured(tiny, files["hinted"], f"teacher.model.path={tiny.student}", path), 3)[1]
    own = configured(tiny, files["hinted"], "teacher.model.path=student", path)
    check_sft_run(own)
    found = updates(own, 3)[1]
    assert [each["hpd/loss"] for each in found] == [each["hpd/loss"] for each in expected]
    assert found[0]["hpd/reverse_kl_k1"] != 0, "the teacher reads more than the student"


def test_the_current_student_teaches(tiny: Tiny, files: dict[str, Path], following: str) -> None:
    """teacher_ema=0: what the student gives where it reads the hint, before each step; no second copy, no gradient."""
    settings = ("teacher.model.path=student", "algorithm.hpd.teacher_ema=0", "data.max_teacher_prompt_length=20")
    config = configured(tiny, files["hinted"], *settings)
    check_sft_run(config)
    one_pass, logged = updates(config, 2)
    assert one_pass.teacher is not None
    batch = batch_of(config)
    before = weights(one_pass.student.engine.module)
    found = one_pass.teacher.features(teacher_rows(batch))
    assert all(torch.equal(each, before[name]) for name, each in weights(one_pass.student.engine.module).items())
    model = AutoModelForCausalLM.from_pretrained(tiny.student, dtype=torch.float32)
    model.load_state_dict({name: each.clone() for name, each in before.items()})
    worst = 0.0
    for index, (row, response) in enumerate(zip(make_rows(32), batch["responses"].unbind(), strict=False)):
        expected = plain_log_probs(model, prompt_ids(tiny, hint(row)), response, 29)
        worst = max(worst, (found[index].log_probs(response.unsqueeze(1)).squeeze(1) - expected).abs().max().item())
    print("largest difference from the current student's log-probs", worst)
    assert worst < 2e-5
    assert logged[0]["hpd/loss"] != logged[1]["hpd/loss"]
    unhinted = configured(tiny, files["plain"], *settings[:2], f"algorithm.hpd.objective={following}")
    (same,) = updates(unhinted, 1)[1]
    assert max(abs(same[name]) for name in ("hpd/reverse_kl_k1", "hpd/loss")) < 1e-6, "reading the same it is itself"
    assert prefixes_seen(following).abs().max() < 1e-4


def test_the_running_average_teaches(tiny: Tiny, files: dict[str, Path], tmp_path: Path) -> None:
    """Its weights are the recurrence of the student's, exactly; what a checkpoint holds goes on bit for bit."""
    kept = 0.75
    settings = ("teacher.model.path=student", f"algorithm.hpd.teacher_ema={kept}", "data.max_teacher_prompt_length=20")
    config = configured(tiny, files["hinted"], *settings)
    check_sft_run(config)
    write_row_layouts(config)
    student = student_of(config)
    one_pass = OnePass(student, teacher_of(config, student), HPDConfig.from_config(config.algorithm.hpd))
    teacher = one_pass.teacher
    assert isinstance(teacher, AveragedStudent)
    expected = weights(student.engine.module)
    worst = 0.0
    for _ in range(3):
        one_pass.update(batch_of(config))
        for name, each in weights(student.engine.module).items():
            expected[name] = expected[name].double() * kept + each.double() * (1 - kept)
        average = weights(teacher.worker.engine.module)
        worst = max(worst, max((average[name].double() - each).abs().max().item() for name, each in expected.items()))
    print("largest difference of the average's weights", worst)
    assert worst < 1e-6
    start = weights(student_of(config).engine.module)
    assert any((start[name] - average[name]).abs().max() > 1e-3 for name in average)

    teacher.save(tmp_path)
    features = teacher.features(teacher_rows(batch_of(config)))
    again = teacher_of(config, student_of(config))
    again.resume(tmp_path)
    for row, found in again.features(teacher_rows(batch_of(config))).items():
        for name, tensor in found.tensors.items():
            assert torch.equal(tensor, features[row].tensors[name]), name
    (saved,) = tmp_path.glob("*.safetensors")
    assert all(torch.equal(each, average[name]) for name, each in load_file(saved).items())
    with pytest.raises(Refused, match=r"algorithm.hpd.teacher_ema=0.75: .* has no teacher_ema_world_size_1_rank_0"):
        again.resume(tmp_path / "elsewhere")


BAD_SETTINGS = {
    "twice": (
        ("teacher.model.path=student", "algorithm.hpd.teachers={maths: {path: student}}"),
        "teacher.model.path=student: algorithm.hpd.teachers has the teachers, too; leave one of them out",
    ),
    "ema above 1": (
        ("teacher.model.path=student", "algorithm.hpd.teacher_ema=1.5"),
        "algorithm.hpd.teacher_ema=1.5: give a number of at least 0 and below 1, or null",
    ),
    "ema of another": (
        ("algorithm.hpd.teacher_ema=0.5",),
        "algorithm.hpd.teacher_ema=0.5: it is of the student as its teacher: set teacher.model.path=student",
    ),
    "ema and a store": (
        (
            "teacher.model.path=student",
            "algorithm.hpd.teacher_ema=0.5",
            "algorithm.hpd.teacher_cache=disk",
            "algorithm.hpd.teacher_cache_dir=/tmp/never",
        ),
        "algorithm.hpd.teacher_ema=0.5: the teacher changes with each step, and algorithm.hpd.teacher_cache=disk keeps",
    ),
    "ema of none": (
        ("algorithm.hpd.teachers={maths: {path: x}}", "algorithm.hpd.teacher_ema=0.5"),
        "algorithm.hpd.teacher_ema=0.5: it is of a teacher whose path is student, and algorithm.hpd.teachers has none",
    ),
    "ema and LoRA": (
        ("teacher.model.path=student", "algorithm.hpd.teacher_ema=0.5", "model.lora_rank=2"),
        "algorithm.hpd.teacher_ema=0.5: model.lora_rank=2: the running average of an adapter is not supported",
    ),
    "ema and servers": (
        (
            "teacher.model.path=student",
            "algorithm.hpd.teacher_ema=0.5",
            "algorithm.hpd.teacher_server.urls=[http://h:1]",
        ),
        "algorithm.hpd.teacher_ema=0.5: algorithm.hpd.teacher_server.urls=['http://h:1'] is of servers",
    ),
    "no path": (
        ("algorithm.hpd.teachers={maths: {urls: [http://h:1]}}",),
        "algorithm.hpd.teachers.maths.path=None: give the teacher's folder or hub name, or student",
    ),
    "unknown key": (
        ("algorithm.hpd.teachers={maths: {path: x, url: y}}",),
        "algorithm.hpd.teachers.maths.url=y: no such parameter; there are path, urls, teacher_cache",
    ),
    "no teachers": (("algorithm.hpd.teachers={}",), "algorithm.hpd.teachers={}: give {name: {path:"),
    "a secret": (
        ("algorithm.hpd.teachers={maths: {path: x, urls: ['http://me:pw@h:1']}}",),
        "algorithm.hpd.teachers.maths.urls=['http://***@h:1']: a name or password before the host",
    ),
    "servers of all": (
        ("algorithm.hpd.teachers={maths: {path: x}}", "algorithm.hpd.teacher_server.urls=[http://h:1]"),
        "algorithm.hpd.teacher_server.urls=['http://h:1']: algorithm.hpd.teachers has several teachers; give each its",
    ),
    "no model": (
        ("algorithm.hpd.teachers={maths: {path: /nowhere}, code: {path: student}}",),
        "algorithm.hpd.teachers.maths.path=/nowhere: no such folder; give an existing folder, or a hub name",
    ),
    "unknown teacher": (
        ("algorithm.hpd.teachers={maths: {path: student}}",),
        "row 0: data_source=code: no such teacher; algorithm.hpd.teachers has maths",
    ),
    "no column": (
        ("algorithm.hpd.teachers={maths: {path: student}}", "algorithm.hpd.teacher_key=subject"),
        "no column 'subject' (algorithm.hpd.teacher_key), there are data_source",
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_of_teachers(tiny: Tiny, files: dict[str, Path], case: str) -> None:
    overrides, message = BAD_SETTINGS[case]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_sft_run(configured(tiny, files["named"], *overrides))
    assert "\n" not in str(error.value)


def test_each_teacher_has_the_students_tokenizer(tiny: Tiny, files: dict[str, Path], tmp_path: Path) -> None:
    strange = make_model(tmp_path / "strange", seed=3, words=[*WORDS[:9], *reversed(WORDS[9:])])
    config = configured(tiny, files["named"], of_two(tiny, strange))
    with pytest.raises(ValueError, match=f"algorithm.hpd.teachers.code.path={strange}"):
        check_sft_run(config)


STAGED = "algorithm.hpd.pipeline=staged"
TWO_UPDATES = "actor_rollout_ref.actor.ppo_mini_batch_size=4"
ONE_PASS_ONLY = {
    "several": ((STAGED, "algorithm.hpd.teachers={maths: {path: student}}"), "named", "algorithm.hpd.teachers needs"),
    "average": (
        (STAGED, "actor_rollout_ref.ref.model.path=student", "algorithm.hpd.teacher_ema=0.5"),
        "plain",
        "algorithm.hpd.teacher_ema=0.5 needs",
    ),
    "template": (
        (STAGED, 'data.teacher_prompt_template="{prompt} {answer}"'),
        "plain",
        "data.teacher_prompt_template needs",
    ),
    "column": ((STAGED,), "hinted", "the column 'teacher_prompt'"),
    "column, several updates": ((TWO_UPDATES,), "hinted", "the column 'teacher_prompt'"),
}


@pytest.mark.parametrize("case", ONE_PASS_ONLY)
def test_staged_names_one_pass(tiny: Tiny, files: dict[str, Path], case: str, tmp_path: Path) -> None:
    overrides, file, message = ONE_PASS_ONLY[case]
    settings = [*tiny.main_ppo, f"data.train_files={files[file]}", f"trainer.default_local_dir={tmp_path / 'saved'}"]
    if case == "several":
        settings.append("actor_rollout_ref.ref.model.path=null")
    with pytest.raises(ValueError, match=r"^algorithm\.hpd\.pipeline=\w+: ") as error:
        check_main_ppo(main_ppo_config(*settings, *overrides))
    assert message in str(error.value)
    assert "algorithm.hpd.pipeline=one_pass" in str(error.value)
    if case.startswith("column"):
        check_main_ppo(main_ppo_config(*settings, *overrides[1:], TWO_UPDATES, "algorithm.hpd.pipeline=one_pass"))


def test_rows_of_the_teacher_fit_its_passes(tiny: Tiny, files: dict[str, Path], tmp_path: Path) -> None:
    """Of the model that runs them: the teacher's own, or the student."""
    settings = [
        *tiny.main_ppo,
        f"data.train_files={files['hinted']}",
        f"trainer.default_local_dir={tmp_path / 'saved'}",
    ]
    settings += ["actor_rollout_ref.ref.model.path=student", "data.max_teacher_prompt_length=20"]
    for ema, node in (("null", "ref"), ("0", "rollout")):
        short = f"actor_rollout_ref.{node}.log_prob_max_token_len_per_gpu"
        message = rf"^{short}=33: below data.max_teacher_prompt_length \+ data.max_response_length = 36; raise it"
        with pytest.raises(ValueError, match=message):
            check_main_ppo(main_ppo_config(*settings, f"algorithm.hpd.teacher_ema={ema}", f"{short}=33"))


def test_served_stored_and_colocated_mix(tiny: Tiny, files: dict[str, Path], other: Path, tmp_path: Path) -> None:
    """A served teacher with a store and one beside the student, with prompts of their own: features of two models."""
    own = "data.max_teacher_prompt_length=20"
    config = configured(tiny, files["both"], of_two(tiny, other), own)
    write_row_layouts(config)
    expected = teacher_of(config).features(teacher_rows(batch_of(config)))
    server = PoolingServer(tiny.teacher)
    try:
        mixed = configured(
            tiny,
            files["both"],
            f"algorithm.hpd.teachers={{maths: {{path: {tiny.teacher}, urls: [{server.url}], teacher_cache: disk}}, "
            f"code: {{path: {other}}}}}",
            own,
            f"algorithm.hpd.teacher_cache_dir={tmp_path / 'store'}",
            "algorithm.hpd.teacher_cache_dtype=float32",
            "algorithm.hpd.teacher_cache_max_gib=0.01",
        )
        check_sft_run(mixed)
        write_row_layouts(mixed)
        worst = 0.0
        for hits in (0, 1):
            teacher = teacher_of(mixed)
            assert isinstance(teacher, SeveralTeachers)
            teacher.announce(teacher_rows(batch_of(mixed)))
            for row, features in teacher.features(teacher_rows(batch_of(mixed))).items():
                difference = features.tensors["hidden"] - expected[row].tensors["hidden"]
                worst = max(worst, difference.abs().max().item())
            assert teacher.metrics()["hpd/teachers/maths/teacher_cache_hit_fraction"] == hits
            teacher.save(tmp_path / "saved")
            teacher.resume(tmp_path / "saved")
    finally:
        server.stop()
    print("largest difference of hidden states", worst)
    assert worst < 2e-5
