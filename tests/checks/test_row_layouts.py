"""Attention and packing of a run's models: chosen by a trial, and what is set is taken or refused."""

from pathlib import Path
from typing import Any

import pytest
from families import LONGEST, byte_tokenizer, lean_config, tiny_config, tiny_model

from hpd_verl.checks.row_layouts import Passes, choose_row_layout, model_nodes, write_row_layout
from hpd_verl.checks.start import sft_passes
from hpd_verl.engine import replica
from hpd_verl.engine.row_layout import RowLayout, default_attentions, layouts, try_layouts

PACKED, PADDED = RowLayout("packed_attention", True), RowLayout("packed_attention", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of some families, with a model's files."""
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "lfm2", "glm_moe_dsa", "phi3"):
        tiny_model(family, 1).save_pretrained(root / family)
        byte_tokenizer().save_pretrained(root / family)
    return root


def chosen(student: Path, teacher: Path, *overrides: str, **passes: Any) -> list[RowLayout]:
    config = lean_config(student.parent, f"model.path={student}", f"teacher.model.path={teacher}", *overrides)
    asked = Passes(**{**vars(sft_passes(config)), **passes})
    nodes = model_nodes(config.model, {"": config.teacher.model}, ("model", "teacher.model"))
    found = [choose_row_layout(model, asked) for model in nodes]
    for model, layout in zip(nodes, found, strict=True):
        write_row_layout(model, layout)
    for own, layout in zip((config.model, config.teacher.model), found, strict=True):
        assert own.use_remove_padding is layout.packed
        assert own.override_config.attn_implementation == layout.attention
    return found


def test_each_model_has_its_own(folder: Path) -> None:
    assert chosen(folder / "llama", folder / "lfm2") == [PACKED, PADDED]
    assert chosen(folder / "lfm2", folder / "llama") == [PADDED, PACKED]


def test_what_is_set_is_taken_where_it_is_right(folder: Path) -> None:
    """By the student for both, unless the teacher has its own or does not take it."""
    eager = "model.override_config.attn_implementation=eager"
    assert chosen(folder / "llama", folder / "llama", eager) == [RowLayout("eager", True)] * 2
    own = "+teacher.model.override_config.attn_implementation=sdpa"
    assert chosen(folder / "llama", folder / "llama", eager, own) == [RowLayout("eager", True), RowLayout("sdpa", True)]
    assert chosen(folder / "lfm2", folder / "lfm2", eager) == [RowLayout("eager", False)] * 2
    padded = "model.use_remove_padding=false"
    assert chosen(folder / "llama", folder / "llama", padded) == [PADDED, PADDED]


@pytest.mark.parametrize(
    ("student", "teacher", "overrides", "message"),
    [
        (
            "lfm2",
            "llama",
            ["model.use_remove_padding=true"],
            r"model\.use_remove_padding=True: with model\.path=\S+lfm2, packed_attention on packed rows does not "
            r"compute each row as it is alone \(logits are off by .*\); leave it out for packed_attention on padded",
        ),
        (
            "llama",
            "lfm2",
            ["+teacher.model.use_remove_padding=true"],
            r"teacher\.model\.use_remove_padding=True: with teacher\.model\.path=\S+lfm2, .*; leave it out for ",
        ),
        (
            "llama",
            "llama",
            ["model.override_config.attn_implementation=nothing"],
            r"model\.override_config\.attn_implementation=nothing: .*; leave it out for packed_attention on packed",
        ),
        (
            "llama",
            "llama",
            ["model.override_config.attn_implementation=flash_attention_2"],
            r"model\.override_config\.attn_implementation=flash_attention_2: flash attention needs a GPU; leave it out",
        ),
        (
            "glm_moe_dsa",
            "llama",
            [],
            r"model\.path=\S+glm_moe_dsa: .*, nor does any other .*; choose another model, or one row a micro-batch: "
            r"data\.use_dynamic_bsz=false data\.micro_batch_size_per_gpu=1",
        ),
        (
            "lfm2",
            "llama",
            ["model.enable_activation_offload=true"],
            r"model\.enable_activation_offload=True: model\.path=\S+lfm2 needs padded rows",
        ),
    ],
)
def test_what_is_wrong_is_refused(folder: Path, student: str, teacher: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(folder / student, folder / teacher, *overrides)


def test_rows_that_share_no_micro_batch(folder: Path) -> None:
    one_row = ("data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=1")
    assert chosen(folder / "lfm2", folder / "llama", *one_row) == [PACKED, PACKED]
    student, _ = chosen(folder / "glm_moe_dsa", folder / "llama", *one_row)
    assert student.attention == "eager"


def test_a_rope_that_switches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows on either side of its length share no micro-batch: by tokens the engine sees to it, a fixed size cannot."""
    monkeypatch.setattr("hpd_verl.checks.row_layouts.rope_switch", lambda config: 90)
    fixed = ("data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=2")
    assert chosen(folder / "phi3", folder / "llama") == [PACKED, PACKED]
    with pytest.raises(
        ValueError, match=r"data\.micro_batch_size_per_gpu=2: one row of more than 90 tokens .* in model\.path=\S+phi3;"
    ):
        chosen(folder / "phi3", folder / "llama", *fixed)
    assert chosen(folder / "phi3", folder / "llama", *fixed, longest_row=90) == [PACKED, PACKED]
    shared_out = "engine.ulysses_sequence_parallel_size=2"
    with pytest.raises(ValueError, match=rf"^{shared_out}: model\.path=\S+phi3 takes other rotary factors for rows of"):
        chosen(folder / "phi3", folder / "llama", shared_out)
    assert chosen(folder / "phi3", folder / "llama", shared_out, longest_row=90) == [PACKED, PACKED]


def test_ulysses_shares_out_packed_rows(folder: Path) -> None:
    """With what flash attention and packed_attention are told by the layer; another attention is not to be had."""
    shared_out = "engine.ulysses_sequence_parallel_size=2"
    assert chosen(folder / "llama", folder / "llama", shared_out) == [PACKED, PACKED]
    with pytest.raises(ValueError, match=rf"^{shared_out}: model\.path=\S+lfm2: packed_attention on packed rows does"):
        chosen(folder / "lfm2", folder / "llama", shared_out)
    one_row = ("data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=1")
    with pytest.raises(
        ValueError, match=rf"^{shared_out}: model\.path=\S+lfm2: .*mix tokens outside attention.* leave"
    ):
        chosen(folder / "lfm2", folder / "llama", shared_out, *one_row)
    with pytest.raises(ValueError, match=rf"model\.use_remove_padding=False: {shared_out} shares out packed rows"):
        chosen(folder / "llama", folder / "llama", "model.use_remove_padding=false", shared_out)
    for role, setting in (("", "model"), ("+", "teacher.model")):
        sdpa = f"{role}{setting}.override_config.attn_implementation=sdpa"
        with pytest.raises(
            ValueError, match=rf"^{sdpa.removeprefix('+')}: with {shared_out} each rank would see its own"
        ):
            chosen(folder / "llama", folder / "llama", sdpa, shared_out)
    # Layers that do not hand on their windows; sinks; a mask of the model's own.
    for family, packed in (("qwen2_moe", PACKED), ("gpt_oss", PACKED), ("opt", None)):
        assert try_layouts(tiny_config(family), [PACKED], LONGEST).right == packed
        assert try_layouts(tiny_config(family), [PACKED], LONGEST, shares_sequences_out=True).right is None


def test_a_model_that_has_no_small_replica_is_padded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replica, "AFFORDABLE", 10)
    # A length of its own, since trials are kept.
    models = (folder / "llama", folder / "llama")
    assert chosen(*models, longest_row=77) == [RowLayout("eager", False)] * 2
    assert chosen(*models, "model.use_remove_padding=true", longest_row=77)[0].packed
    sdpa = "model.override_config.attn_implementation=sdpa"
    assert chosen(*models, sdpa, longest_row=77)[0] == RowLayout("sdpa", False)
    assert "eager on padded rows, not tried before it loads: no replica of Llama" in caplog.text


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "deepseek_v3", "bamba", "qwen3_next", "gpt_oss", "jamba"])
def test_a_replica_decides_as_the_model_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller by layers, widths, heads and experts, the same layout is found right."""
    candidates = list(layouts(default_attentions(False), None))
    config = tiny_config(family)
    config.num_attention_heads, config.num_key_value_heads = 8, 8
    whole = try_layouts(config, candidates, 301)
    size = replica._parameters(replica.Replica(config, 301)._skeleton(replica.text_config(config)))
    monkeypatch.setattr(replica, "AFFORDABLE", 40_000_000)
    monkeypatch.setattr(replica, "_parameters", _as_if_above(size))
    small = replica.Replica(config, 302)
    assert small.config.vocab_size <= 272
    assert try_layouts(config, candidates, 302).right == whole.right


def _as_if_above(size: int) -> Any:
    """Counts a model of this many parameters as one that is too large."""

    def count(model: Any) -> int:
        found = sum(parameter.numel() for parameter in model.parameters())
        return 10**12 if found >= size else found

    return count


TABLE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_table_says_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/models.md holds what its script writes."""
    monkeypatch.syspath_prepend(str(TABLE.parent))
    import model_table

    for part in (model_table.table(), model_table.refused()):
        assert part in TABLE.read_text(), part
