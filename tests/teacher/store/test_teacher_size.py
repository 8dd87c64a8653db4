"""The size of the teacher's store, computed before there is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, make_rows, make_tokenizer, write_parquet
from omegaconf import OmegaConf
from torch.utils.data import TensorDataset

from hpd_verl.config import HPDConfig
from hpd_verl.data.dataset import HPDDataset
from hpd_verl.head.hybrid_code import HybridCode
from hpd_verl.head.output_head import OutputHead
from hpd_verl.teacher.store.disk import DiskStore, estimate_bytes
from hpd_verl.teacher.store.identity import teacher_identity
from hpd_verl.teacher.store.records import row_key
from hpd_verl.teacher.store.size import TokenCount, count_response_tokens, describe_size

GIB = 1 << 30


def test_bytes_a_token() -> None:
    """Of a 7B teacher with 3584 hidden units: 7,176 bytes a token, and an index entry a row."""
    settings = {"format": "hidden", "top_k": 64, "bits": 4, "hidden_size": 3584, "vocabulary_size": 152_064}
    settings |= {"rows": 40_000, "tokens": 40_000 * 4096}
    half = estimate_bytes(dtype="bf16", **settings)  # type: ignore[arg-type]
    assert half == 40_000 * 64 + 40_000 * 4096 * 7176
    assert estimate_bytes(dtype="float32", **settings) == half + 40_000 * 4096 * 7168  # type: ignore[arg-type]
    hybrid = estimate_bytes(dtype="bf16", **settings | {"format": "hybrid"})  # type: ignore[arg-type]
    assert hybrid == 40_000 * 64 + 40_000 * 4096 * 2071


@pytest.mark.parametrize("format", ["hidden", "topk", "hybrid"])
@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_estimate_is_what_a_store_takes(format: str, dtype: str, tmp_path: Path) -> None:
    kept: dict[str, Any] = {"format": format, "dtype": dtype, "top_k": 5, "bits": 3, "vocabulary_size": 100}
    identity = teacher_identity("", "", temperature=1.0, **kept)
    store = DiskStore(tmp_path, identity, GIB)
    lengths = [3, 0, 11, 200]
    code = HybridCode(OutputHead(torch.ones(100, 24), 100), 1.0, top_k=5, bits=3)
    packed = code.encode(torch.ones(1, 24), torch.zeros(1, dtype=torch.int64)).packed
    for number, tokens in enumerate(lengths):
        record = {}
        for name, field in store.schema.fields.items():
            width = {"hidden": 24, "topk": 5, "hybrid": packed.shape[1]}[format]
            record[name] = torch.ones((tokens, width) if field.wide else (tokens,), dtype=field.dtype)
        store.put(row_key(identity.digest, torch.arange(tokens + number + 1), tokens), record)
    found = sum(file.stat().st_size for file in tmp_path.glob("part-*"))
    assert estimate_bytes(rows=len(lengths), tokens=sum(lengths), hidden_size=24, **kept) == found


def make_dataset(folder: Path, count: int, limit: int = 16) -> HPDDataset:
    file = write_parquet(make_rows(count), folder / "train.parquet")
    data = {
        "train_files": str(file),
        "prompt_key": "prompt",
        "max_prompt_length": 16,
        "max_response_length": limit,
        "filter_overlong_prompts": False,
        "cache_dir": str(folder),
        "hpd": {"on_policy_fraction": 0.0, "missing_demonstration": "error", "overlong_demonstration": "truncate"},
    }
    return HPDDataset([str(file)], make_tokenizer(WORDS), OmegaConf.create(data))


def test_counts_a_small_data_set_exactly(tmp_path: Path) -> None:
    """Up to the limit of a response, which cuts longer ones."""
    expected = [len(row["demonstration"].split()) + 1 for row in make_rows(100)]
    dataset = make_dataset(tmp_path, 100)
    assert count_response_tokens(dataset, 16) == TokenCount(100, sum(expected), "counted")
    shortened = sum(min(length, 3) for length in expected)
    assert count_response_tokens(dataset, 3) == TokenCount(100, shortened, "counted")


def test_samples_a_large_one(tmp_path: Path) -> None:
    expected = sum(len(row["demonstration"].split()) + 1 for row in make_rows(1000))
    counted = count_response_tokens(make_dataset(tmp_path, 1000), 16, sample=100)
    assert (counted.rows, counted.source) == (1000, "from the lengths of 100 rows")
    assert counted.tokens == pytest.approx(expected, rel=0.1)


def test_another_data_set_counts_as_long_as_it_may_be() -> None:
    counted = count_response_tokens(TensorDataset(torch.zeros(40)), 4096)
    assert counted == TokenCount(40, 40 * 4096, "at most 4,096 each")


def test_what_is_said_of_a_store_that_is_too_small(tmp_path: Path) -> None:
    counts = [TokenCount(40_000, 40_000 * 4096, "at most 4,096 each")]
    config = HPDConfig(teacher_cache="disk", teacher_cache_dir=str(tmp_path / "not" / "there"))
    line, share = describe_size(config, 3584, 152_064, counts)
    needed = (40_000 * 64 + 40_000 * 4096 * 7176) / GIB
    assert share == pytest.approx(100 / needed)
    assert line.startswith(
        "the teacher's features of 40,000 rows with 163,840,000 response tokens (at most 4,096 each) need 1,095.0 GiB; "
        f"algorithm.hpd.teacher_cache_max_gib=100 keeps 9% of them; {tmp_path}/not/there holds 0 GiB, its disk has "
    )
    assert "for the others the teacher runs in every epoch: raise the limit or set" in line
    assert "\n" not in line


def test_what_is_said_of_one_that_is_large_enough(tmp_path: Path) -> None:
    config = HPDConfig(teacher_cache="memory")
    line, share = describe_size(config, 8, 36, [TokenCount(2, 10, "counted"), TokenCount(0, 0, "counted")])
    assert share == 1.0
    assert line == (
        "the teacher's features of 2 rows with 10 response tokens (counted) need 3.4e-07 GiB; "
        "algorithm.hpd.teacher_cache_max_gib=100 keeps 100% of them"
    )
    assert describe_size(config, 8, 36, [])[1] == 1.0
