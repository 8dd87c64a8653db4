"""A store in front of any teacher: what it asks of the teacher behind it, and that stored features equal fresh ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from hpd_verl.data import fields
from hpd_verl.data.response_tokens import response_tokens
from hpd_verl.head.features import HiddenFeatures, TeacherFeatures, teacher_features, teacher_top_k
from hpd_verl.head.hybrid import HybridFeatures, teacher_hybrid
from hpd_verl.head.hybrid_code import HybridCode
from hpd_verl.head.output_head import OutputHead
from hpd_verl.teacher.store.disk import DiskStore
from hpd_verl.teacher.store.identity import StoreIdentity, teacher_identity
from hpd_verl.teacher.store.store import MemoryStore, TeacherStore
from hpd_verl.teacher.stored import StoredTeacher
from hpd_verl.teacher.teacher import Teacher

VOCABULARY, HIDDEN, TOP_K, TEMPERATURE = 23, 12, 5, 1.5
SCALING = (0.5, 4.0)
ROWS = [(11, 0, 3, 4), (4, 1, 1, 1), (7, 0, 5, 6), (0, 0, 2, 3)]
"""Row number, is a rollout, lengths of prompt and response."""
pytestmark = pytest.mark.usefixtures("process_group")


@dataclass
class Elsewhere(Teacher):
    """A teacher without a model here: its hidden states are a table by token, and it computes just what is wanted."""

    form: str = "hidden"
    seed: int = 0
    asked: list[list[int]] = field(default_factory=list)
    """Row numbers of each call."""
    prepared: int = 0
    form_of_features: TeacherFeatures | None = None

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        self.table = torch.randn(VOCABULARY, HIDDEN, generator=random)
        weight = torch.randn(VOCABULARY, HIDDEN, generator=random)
        self.head = OutputHead(weight, VOCABULARY, torch.randn(VOCABULARY, generator=random), *SCALING)
        self.code = HybridCode(self.head, TEMPERATURE, TOP_K)

    def prepare(self) -> None:
        self.prepared += 1

    def metrics(self) -> dict[str, float]:
        return {"elsewhere/calls": len(self.asked)}

    def features(self, data: TensorDict, wanted: Sequence[int] | None = None) -> dict[int, TeacherFeatures]:
        rows = list(range(len(data))) if wanted is None else list(wanted)
        numbers = [int(data[fields.ROW].flatten()[index]) for index in rows]
        self.asked.append(numbers)
        responses, ids = response_tokens(data), data["input_ids"].values()
        found: dict[int, TeacherFeatures] = {}
        for index, number in zip(rows, numbers, strict=True):
            of_row = responses.row == index
            labels, hidden = responses.labels[of_row], self.table[ids[responses.positions[of_row]]]
            if self.form == "topk":
                found[number] = teacher_top_k(hidden, self.head, labels, TEMPERATURE, k=TOP_K)
            elif self.form == "hybrid":
                found[number] = teacher_hybrid(hidden, self.code, labels)
            else:
                hidden = hidden.bfloat16().float()  # as the store keeps it
                found[number] = teacher_features(hidden, self.head, labels, TEMPERATURE)
            self.form_of_features = found[number][:0]
        return found

    def known_form(self) -> TeacherFeatures | None:
        return self.form_of_features


def batch(rows: Sequence[tuple[int, int, int, int]] = ROWS, step: int = 0) -> TensorDict:
    """Rows whose tokens depend on their number, and of a rollout on the step."""
    ids = []
    for number, is_rollout, prompt, response in rows:
        random = torch.Generator().manual_seed(number + 1000 * is_rollout * step)
        ids.append(torch.randint(VOCABULARY, (prompt + response,), generator=random))

    def nested(values: list[Tensor]) -> Tensor:
        return tu.nested_tensor_from_tensor_list(values)

    return tu.get_tensordict(
        {
            "input_ids": nested(ids),
            "prompts": nested([each[: row[2]] for each, row in zip(ids, rows, strict=True)]),
            "responses": nested([each[row[2] :] for each, row in zip(ids, rows, strict=True)]),
            "response_mask": nested([torch.ones(row[3], dtype=torch.int64) for row in rows]),
            fields.ROW: torch.tensor([[row[0]] for row in rows]),
            fields.IS_ROLLOUT: torch.tensor([[row[1]] for row in rows]),
        }
    )


def identity(form: str) -> StoreIdentity:
    return teacher_identity(
        "a", "b", temperature=TEMPERATURE, vocabulary_size=VOCABULARY, format=form, dtype="bf16", top_k=TOP_K
    )


def open_store(kind: str, folder: Path, form: str) -> TeacherStore:
    return MemoryStore(identity(form), 1 << 20) if kind == "memory" else DiskStore(folder, identity(form), 1 << 20)


def same(left: dict[int, TeacherFeatures], right: dict[int, TeacherFeatures]) -> bool:
    """Equal rows, forms, bits of every tensor, and answers about the whole vocabulary."""
    tokens = torch.arange(VOCABULARY + 2)
    return left.keys() == right.keys() and all(
        type(left[row]) is type(right[row])
        and left[row].tensors.keys() == right[row].tensors.keys()
        and all(torch.equal(value, right[row].tensors[name]) for name, value in left[row].tensors.items())
        and torch.equal(
            *(each.log_probs(tokens.expand(len(each), -1)) for each in (left[row], right[row])),
        )
        for row in left
    )


@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize("form", ["hidden", "topk", "hybrid"])
def test_each_demonstration_is_computed_once(kind: str, form: str, tmp_path: Path) -> None:
    """Stored features are fresh ones to the bit; rollouts are computed every time."""
    behind = Elsewhere(form)
    teacher = StoredTeacher(open_store(kind, tmp_path, form), behind, SCALING)
    teacher.prepare()
    assert behind.prepared == 1
    fresh = teacher.features(batch())
    assert behind.asked == [[11, 4, 7, 0]]
    assert teacher.metrics()["hpd/teacher_cache_hit_fraction"] == 0
    stored = teacher.features(batch())
    assert behind.asked[1:] == [[4]]
    assert same(stored, fresh)
    assert same({row: each for row, each in fresh.items() if row != 4}, teacher.features(batch(), wanted=[0, 2, 3]))
    assert len(behind.asked) == 2
    metrics = teacher.metrics()
    assert metrics["elsewhere/calls"] == 2
    assert metrics["hpd/teacher_cache_rows"] == 3
    assert metrics["hpd/teacher_cache_hit_fraction"] == 6 / 9
    assert metrics["hpd/teacher_is_loaded"] == 1


@pytest.mark.parametrize("form", ["hidden", "topk", "hybrid"])
def test_a_later_run_asks_for_missing_rows_only(form: str, tmp_path: Path) -> None:
    """With all rows stored the teacher behind is not even prepared; hidden states come with their stored head."""
    demonstrations = [row for row in ROWS if not row[1]]
    first = StoredTeacher(open_store("disk", tmp_path, form), Elsewhere(form), SCALING)
    fresh = first.features(batch(demonstrations[:2]))
    behind = Elsewhere(form)
    teacher = StoredTeacher(open_store("disk", tmp_path, form), behind, SCALING)
    teacher.prepare()
    assert same(teacher.features(batch(demonstrations[:2])), fresh)
    assert (behind.prepared, behind.asked, teacher.metrics()["hpd/teacher_is_loaded"]) == (0, [], 0)
    more = teacher.features(batch(demonstrations))
    assert behind.asked == [[0]]
    assert same({row: each for row, each in more.items() if row in fresh}, fresh)
    assert teacher.metrics()["hpd/teacher_is_loaded"] == 1
    joined = TeacherFeatures.cat([more[0], more[11]])  # one computed, one stored
    assert len(joined) == 3 + 4
    (again,) = teacher.features(batch(demonstrations[:1])).values()
    if isinstance(again, HiddenFeatures):  # the stored copy of the head is given up
        assert again.head is behind.head
    if isinstance(again, HybridFeatures):
        assert again.code is behind.code


@pytest.mark.parametrize("form", ["hidden", "hybrid"])
def test_the_head_that_is_stored_is_the_teachers(form: str, tmp_path: Path) -> None:
    """Taken from the first features, and compared with those of any later teacher before its rows are stored."""
    StoredTeacher(open_store("disk", tmp_path, form), Elsewhere(form), SCALING).features(batch(ROWS[:1]))
    other = StoredTeacher(open_store("disk", tmp_path, form), Elsewhere(form, seed=1), SCALING)
    with pytest.raises(ValueError, match="its output head is not the teacher's"):
        other.features(batch())
    assert open_store("disk", tmp_path, form).stats.rows == 1


def test_records_without_their_head(tmp_path: Path) -> None:
    """As after its file was deleted: the teacher is prepared, rows are computed again, then all are served."""
    fresh = StoredTeacher(open_store("disk", tmp_path, "hidden"), Elsewhere(), SCALING).features(batch(ROWS[:1]))
    (tmp_path / "output_head.safetensors").unlink()
    behind = Elsewhere()
    teacher = StoredTeacher(open_store("disk", tmp_path, "hidden"), behind, SCALING)
    teacher.prepare()
    for _ in range(2):
        assert same(teacher.features(batch(ROWS[:1])), fresh)
    assert (behind.prepared, behind.asked) == (1, [[11]])
    assert (tmp_path / "output_head.safetensors").exists()


def test_a_form_without_all_that_a_record_holds_is_refused(tmp_path: Path) -> None:
    """Not stored as something else."""

    class Incomplete(Elsewhere):
        def features(self, data: TensorDict, wanted: Sequence[int] | None = None) -> dict[int, TeacherFeatures]:
            whole = super().features(data, wanted)
            return {row: HiddenFeatures(each.tensors["hidden"], self.head, TEMPERATURE) for row, each in whole.items()}

    teacher = StoredTeacher(open_store("memory", tmp_path, "hidden"), Incomplete(), SCALING)
    with pytest.raises(ValueError, match="a record has the tensors label_log_probs, log_sum_exp, hidden, not hidden"):
        teacher.features(batch())
