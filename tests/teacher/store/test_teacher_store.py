"""Storage of teacher features: exact, shared by processes, and never wrong after a crash."""

import errno
import json
import logging
import os
import random
import resource
import shutil
import struct
import time
import zlib
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from hpd_verl.teacher.store.disk import DiskStore
from hpd_verl.teacher.store.identity import StoreIdentity, teacher_identity, tokenisation_hash
from hpd_verl.teacher.store.records import Record, output_head_hash, row_key
from hpd_verl.teacher.store.store import MemoryStore, StoreStats, TeacherStore, check_memory_store

HIDDEN = StoreIdentity(
    teacher="0" * 64, temperature=1.0, vocabulary_size=100, format="hidden", dtype="bf16", top_k=0, teacher_dtype="bf16"
)
HIDDEN_FLOAT32 = replace(HIDDEN, dtype="float32")
TOP_K = replace(HIDDEN, format="topk", dtype="float32", top_k=5)
HYBRID = replace(HIDDEN, format="hybrid", dtype="e8_4", top_k=5)
IDENTITIES = {"bf16": HIDDEN, "float32": HIDDEN_FLOAT32, "topk": TOP_K, "hybrid": HYBRID}
MIB = 1 << 20


def make_key(number: int) -> bytes:
    return row_key(HIDDEN.digest, torch.tensor([number, 2, 3]), 2)


def make_record(identity: StoreIdentity, number: int, tokens: int = 3, hidden_size: int = 7) -> Record:
    """A function of its arguments, with values of all bit patterns that a dtype has of finite numbers."""
    generator = torch.Generator().manual_seed(number)
    shape: tuple[int, ...]
    schema: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"label_log_probs": (torch.float32, (tokens,))}
    if identity.format == "hidden":
        dtype = torch.bfloat16 if identity.dtype == "bf16" else torch.float32
        schema |= {"log_sum_exp": (torch.float32, (tokens,)), "hidden": (dtype, (tokens, hidden_size))}
    elif identity.format == "hybrid":
        schema |= {"shift": (torch.float32, (tokens,)), "packed": (torch.uint8, (tokens, 3 * hidden_size + 1))}
    else:
        shape = (tokens, identity.top_k)
        schema |= {"rest_log_prob": (torch.float32, (tokens,))}
        schema |= {"top_tokens": (torch.int32, shape), "top_log_probs": (torch.float32, shape)}
    record = {}
    for name, (dtype, shape) in schema.items():
        size = (*shape[:-1], shape[-1] * dtype.itemsize)
        values = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).view(dtype)
        record[name] = values.where(values.isfinite(), 0) if dtype.is_floating_point else values
    return record


def same(left: Record | None, right: Record) -> bool:
    """Equal names, dtypes, shapes and bits."""
    return (
        left is not None
        and left.keys() == right.keys()
        and all(
            left[name].dtype == right[name].dtype
            and left[name].shape == right[name].shape
            and torch.equal(left[name].contiguous().view(torch.uint8), right[name].contiguous().view(torch.uint8))
            for name in right
        )
    )


def parts(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"part-*.{suffix}"))


# Both stores


@pytest.fixture(params=["memory", "disk"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def open_store(kind: str, folder: Path, identity: StoreIdentity = HIDDEN, max_bytes: int = MIB) -> TeacherStore:
    return MemoryStore(identity, max_bytes) if kind == "memory" else DiskStore(folder, identity, max_bytes)


@pytest.mark.parametrize("identity", IDENTITIES.values(), ids=IDENTITIES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 256])
def test_round_trip_is_exact(kind: str, identity: StoreIdentity, tokens: int, tmp_path: Path) -> None:
    """Every bit of every tensor, for lengths that differ from row to row."""
    store = open_store(kind, tmp_path, identity)
    records = [make_record(identity, number, tokens + number) for number in range(4)]
    for number, record in enumerate(records):
        store.put(make_key(number), record)
    found = store.get([make_key(number) for number in (2, 0, 9, 3, 1, 1)])
    assert found[2] is None
    for given, number in zip([*found[:2], *found[3:]], (2, 0, 3, 1, 1), strict=True):
        assert same(given, records[number])


def test_misses_and_stats(kind: str, tmp_path: Path) -> None:
    store = open_store(kind, tmp_path)
    assert store.get([]) == []
    assert store.get([make_key(0)]) == [None]
    assert store.missing([make_key(1), make_key(0), make_key(1)]) == [make_key(1), make_key(0), make_key(1)]
    store.put(make_key(0), make_record(HIDDEN, 0))
    assert make_key(0) in store
    assert make_key(1) not in store
    assert store.missing([make_key(0), make_key(1)]) == [make_key(1)]
    store.get([make_key(0), make_key(1), make_key(0)])
    size = 3 * (4 + 4 + 7 * 2) + (64 if kind == "disk" else 0)
    assert store.stats == StoreStats(hits=2, misses=2, rows=1, bytes=size, refused=0, non_finite=0, damaged=0)


def test_first_record_of_a_key_stays(kind: str, tmp_path: Path) -> None:
    """A key names its features: storing it again changes nothing and costs nothing."""
    store = open_store(kind, tmp_path)
    store.put(make_key(0), make_record(HIDDEN, 0))
    size = store.stats.bytes
    store.put(make_key(0), make_record(HIDDEN, 1))
    assert same(store.get([make_key(0)])[0], make_record(HIDDEN, 0))
    assert store.stats.bytes == size


def test_stores_a_copy(kind: str, tmp_path: Path) -> None:
    """Views of a batch, not contiguous and with gradients, may be given and changed afterwards."""
    store = open_store(kind, tmp_path)
    batch = torch.randn(7, 6).to(torch.bfloat16)
    values = torch.randn(6, requires_grad=True)
    record = {"label_log_probs": values[::2], "log_sum_exp": values[::2] * 2, "hidden": batch.t()[::2]}
    copy = {name: tensor.detach().clone() for name, tensor in record.items()}
    store.put(make_key(0), record)
    batch.zero_()
    with torch.no_grad():
        values.zero_()
    (found,) = store.get([make_key(0)])
    assert same(found, copy)
    assert found is not None
    assert not any(tensor.requires_grad for tensor in found.values())


@pytest.mark.parametrize("identity", IDENTITIES.values(), ids=IDENTITIES)
def test_refuses_other_tensors(kind: str, identity: StoreIdentity, tmp_path: Path) -> None:
    """A record of another format, dtype or length is an error, not something to read back wrongly."""
    store = open_store(kind, tmp_path, identity)
    record = make_record(identity, 0)
    wide = {"hidden": "hidden", "topk": "top_tokens", "hybrid": "packed"}[identity.format]
    others: list[Record] = [
        {name: tensor for name, tensor in record.items() if name != wide},
        record | {"entropy": torch.zeros(3)},
        record | {"label_log_probs": torch.zeros(3, dtype=torch.float64)},
        record | {"label_log_probs": torch.zeros(4)},
        record | {"label_log_probs": torch.tensor(0.0)},
        record | {wide: record[wide].flatten()[0]},
        record | {wide: record[wide].to(torch.float16)},
        record | {wide: record[wide][:2]},
        record | {wide: record[wide].unsqueeze(0)},
    ]
    if identity.format == "topk":
        others.append(make_record(replace(identity, top_k=identity.top_k + 1), 0))
    for other in others:
        with pytest.raises(ValueError, match="a record"):
            store.put(make_key(0), other)
    assert store.stats.rows == 0


def test_size_limit(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A record that would exceed the limit is not stored, said once; a smaller one still is, and all are served."""
    overhead = 64 if kind == "disk" else 0
    sizes = [3 * 22 + overhead, 22 + overhead]
    store = open_store(kind, tmp_path, max_bytes=2 * sizes[0] + sizes[1])
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            store.put(make_key(number), make_record(HIDDEN, number))
        store.put(make_key(5), make_record(HIDDEN, 5, tokens=1))
        store.put(make_key(6), make_record(HIDDEN, 6, tokens=1))
    (warning,) = caplog.messages
    assert "algorithm.hpd.teacher_cache_max_gib" in warning
    assert store.stats.refused == 4
    assert store.stats.bytes == store.max_bytes
    assert store.missing([make_key(number) for number in range(7)]) == [make_key(number) for number in (2, 3, 4, 6)]
    for number in (0, 1):
        assert same(store.get([make_key(number)])[0], make_record(HIDDEN, number))


@pytest.mark.parametrize("identity", IDENTITIES.values(), ids=IDENTITIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_does_not_store_what_is_not_finite(
    kind: str, identity: StoreIdentity, value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One value of any tensor is enough; said once, counted, and the row may come again with finite values."""
    store = open_store(kind, tmp_path, identity)
    names = [name for name, tensor in make_record(identity, 0).items() if tensor.is_floating_point()]
    with caplog.at_level(logging.WARNING):
        for name in names:
            for position in (0, -1, 10):
                record = make_record(identity, 0, tokens=20)
                record[name].view(-1)[position] = value
                store.put(make_key(0), record)
    assert (store.stats.rows, store.stats.bytes, store.stats.non_finite) == (0, 0, 3 * len(names))
    (warning,) = caplog.messages
    assert warning.startswith(f"{names[0]} of a row's teacher features is NaN or infinite")
    assert store.get([make_key(0)]) == [None]
    store.put(make_key(0), make_record(identity, 0))
    assert same(store.get([make_key(0)])[0], make_record(identity, 0))


def test_a_store_in_memory_is_of_one_rank() -> None:
    for kind, ranks in (("memory", 1), ("disk", 8), ("off", 8)):
        check_memory_store(kind, ranks)
    with pytest.raises(
        ValueError, match=r"^algorithm\.hpd\.teacher_cache=memory: rows change between the 8 ranks .*; set .*=disk"
    ):
        check_memory_store("memory", 8)


# Keys and identities


def test_row_key() -> None:
    """Another identity, token, length or split into prompt and response is another row; the integer type is not."""
    tokens = torch.tensor([5, 6, 7])
    keys = {
        row_key("a", tokens, 1),
        row_key("b", tokens, 1),
        row_key("a", tokens, 2),
        row_key("a", torch.tensor([5, 6, 8]), 1),
        row_key("a", torch.tensor([6, 5, 7]), 1),
        row_key("a", torch.tensor([5, 6]), 1),
        row_key("a", torch.tensor([0, 5, 6, 7]), 1),
    }
    assert len(keys) == 7
    assert all(len(key) == 32 for key in keys)
    assert row_key(b"a", tokens.to(torch.int32), 1) == row_key("a", tokens, 1)
    assert row_key("a", torch.tensor([5, 0, 6, 0, 7])[::2], 1) == row_key("a", tokens, 1)


def identify(**changes: object) -> StoreIdentity:
    settings = {"temperature": 1.0, "vocabulary_size": 100, "format": "hidden", "dtype": "bf16", "top_k": 64}
    return teacher_identity("a", "b", **(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [{"temperature": 0.9}, {"vocabulary_size": 99}, {"format": "topk"}, {"dtype": "float32"}], ids=str
)
def test_identity_changes_with_a_setting(change: dict[str, object]) -> None:
    assert identify(**change) != identify()
    assert identify(**change).digest != identify().digest
    assert identify(teacher_dtype="bf16") != identify()


def test_identity_ignores_settings_of_the_other_format() -> None:
    assert identify(top_k=1) == identify()
    assert identify(format="topk", dtype="float32") == identify(format="topk")
    assert identify(format="topk", top_k=1) != identify(format="topk")
    assert identify(format="topk", top_k=500).top_k == 100
    assert identify(format="hybrid", dtype="float32") == identify(format="hybrid")
    assert identify(format="hybrid", top_k=1) != identify(format="hybrid") != identify(format="hybrid", bits=5)
    assert identify(bits=5) == identify()
    assert (identify(format="hybrid", top_k=500).top_k, identify(format="hybrid", bits=5).bits) == (100, 5)


# Sharing


def test_a_later_run_finds_the_records(tmp_path: Path) -> None:
    """Each writer has its own part."""
    for number in range(3):
        store = DiskStore(tmp_path, HIDDEN, MIB)
        store.put(make_key(number), make_record(HIDDEN, number))
        assert store.stats.rows == number + 1
        store.close()
    assert len(parts(tmp_path, "data")) == len(parts(tmp_path, "index")) == 3
    store = DiskStore(tmp_path, HIDDEN, MIB)
    for number in range(3):
        assert same(store.get([make_key(number)])[0], make_record(HIDDEN, number))
    assert len(parts(tmp_path, "data")) == 3  # reading makes none


def test_ranks_see_each_other(tmp_path: Path) -> None:
    """A key that is not known is looked for; the same key stored by both is harmless; the limit is common."""
    first, second = (DiskStore(tmp_path, HIDDEN, 4 * (66 + 64)) for _ in range(2))
    first.put(make_key(0), make_record(HIDDEN, 0))
    assert make_key(0) in second
    second.put(make_key(1), make_record(HIDDEN, 1))
    assert same(first.get([make_key(1)])[0], make_record(HIDDEN, 1))
    for store in (first, second):
        store.put(make_key(2), make_record(HIDDEN, 2))
    for store in (first, second):
        store.refresh()
        assert store.stats.bytes == store.max_bytes
        store.put(make_key(3), make_record(HIDDEN, 3))
        assert (store.stats.rows, store.stats.refused) == (3, 1)
        assert same(store.get([make_key(2)])[0], make_record(HIDDEN, 2))


def write_half_read_all(folder: Path, half: int, count: int) -> None:
    store = DiskStore(folder, HIDDEN, 64 * MIB)
    for number in range(half, count, 2):
        store.put(make_key(number), make_record(HIDDEN, number, 50, 64))
        for other in (number - 1, number + 1):
            (found,) = store.get([make_key(other)])
            assert found is None or same(found, make_record(HIDDEN, other, 50, 64))
    deadline = time.monotonic() + 60
    while store.missing([make_key(number) for number in range(count)]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for number in range(count):
        assert same(store.get([make_key(number)])[0], make_record(HIDDEN, number, 50, 64))
    assert store.stats.damaged == 0


def test_two_processes_at_once(tmp_path: Path, processes: ForkServerContext) -> None:
    """Each stores half of the rows, reads whatever it finds of the other's meanwhile, and all of them at the end."""
    workers = [processes.Process(target=write_half_read_all, args=(tmp_path, half, 300)) for half in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert DiskStore(tmp_path, HIDDEN, 64 * MIB).stats.rows == 300


def test_a_store_of_this_format_version_from_its_bytes(tmp_path: Path) -> None:
    """Records are values in a fixed order, without names: what version 2 has always been."""
    DiskStore(tmp_path, HIDDEN, MIB)
    label_log_probs, log_sum_exp = [-1.5, -0.25], [3.0, 7.5]
    hidden = struct.pack("<6H", 0x3F80, 0xC000, 0x0000, 0x4040, 0xBF80, 0x3F00)  # bfloat16: the upper half of a float32
    payload = struct.pack("<4f", *label_log_probs, *log_sum_exp) + hidden
    entry = struct.pack("<32sQQIII", make_key(0), 0, len(payload), 2, 3, zlib.crc32(payload))
    (tmp_path / "part-ab.data").write_bytes(payload)
    (tmp_path / "part-ab.index").write_bytes(entry + struct.pack("<I", zlib.crc32(entry)))
    expected = {
        "label_log_probs": torch.tensor(label_log_probs),
        "log_sum_exp": torch.tensor(log_sum_exp),
        "hidden": torch.tensor([[1.0, -2.0, 0.0], [3.0, -1.0, 0.5]], dtype=torch.bfloat16),
    }
    assert json.loads((tmp_path / "store.json").read_text())["format_version"] == 2
    assert same(DiskStore(tmp_path, HIDDEN, MIB).get([make_key(0)])[0], expected)


# Crashes and damage


def write_forever(folder: Path, start: int) -> None:
    store = DiskStore(folder, HIDDEN, 1 << 30)
    records = [make_record(HIDDEN, number, 200 + number, 512) for number in range(8)]
    for number in range(start, start + 10**6):
        store.put(make_key(number), records[number % 8])


def test_killed_writers(tmp_path: Path, processes: ForkServerContext) -> None:
    """SIGKILL at a random moment, several times in one folder: whatever is found is right, and nothing is lost but
    the row being written."""
    moments = random.Random(0)
    keys = {make_key(run * 10**6 + number): number % 8 for run in range(6) for number in range(500)}
    records = [make_record(HIDDEN, number, 200 + number, 512) for number in range(8)]
    known = 0
    for run in range(6):
        worker = processes.Process(target=write_forever, args=(tmp_path, run * 10**6))
        worker.start()
        while len(parts(tmp_path, "index")) <= run:
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.05))
        worker.kill()
        worker.join(30)
        assert worker.exitcode == -9
        store = DiskStore(tmp_path, HIDDEN, 1 << 30)
        entries = sum(file.stat().st_size // 64 for file in parts(tmp_path, "index"))
        assert known <= store.stats.rows == entries
        known = entries
        missing = set(store.missing(list(keys)))
        for key, number in keys.items():
            if key not in missing:
                assert same(store.get([key])[0], records[number])
        assert store.stats.damaged == 0
    assert known > 6


def make_small_store(folder: Path, identity: StoreIdentity) -> list[bytes]:
    """Two parts, of two records and of one."""
    for numbers in ((0, 1), (2,)):
        store = DiskStore(folder, identity, MIB)
        for number in numbers:
            store.put(make_key(number), make_record(identity, number, 2 + number, 3))
        store.close()
    return [make_key(number) for number in range(3)]


def check_and_complete(folder: Path, identity: StoreIdentity, keys: list[bytes]) -> int:
    """Nothing read is wrong; what is missing can be stored again and is then found, now and by a later run.

    Returns:
        How many records were missing.
    """
    store = DiskStore(folder, identity, MIB)
    records = [make_record(identity, number, 2 + number, 3) for number in range(3)]
    found = store.get(keys)
    for given, record in zip(found, records, strict=True):
        assert given is None or same(given, record)
    missing = [number for number, given in enumerate(found) if given is None]
    assert store.missing(keys) == [keys[number] for number in missing]
    for number in missing:
        store.put(keys[number], records[number])
    store.close()
    for reader in (store, DiskStore(folder, identity, MIB)):
        for given, record in zip(reader.get(keys), records, strict=True):
            assert same(given, record)
    return len(missing)


@pytest.mark.parametrize("identity", [HIDDEN, TOP_K, HYBRID], ids=["hidden", "topk", "hybrid"])
@pytest.mark.parametrize("suffix", ["data", "index"])
def test_truncation_at_every_byte(identity: StoreIdentity, suffix: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    keys = make_small_store(whole, identity)
    for file in parts(whole, suffix):
        for length in range(file.stat().st_size + 1):
            folder = tmp_path / f"{file.name}-{length}"
            shutil.copytree(whole, folder)
            os.truncate(folder / file.name, length)
            planned = len(DiskStore(folder, identity, MIB).missing(keys))
            missing = check_and_complete(folder, identity, keys)
            assert missing == planned  # known before anything is read
            assert (missing == 0) == (length == file.stat().st_size)
            shutil.rmtree(folder)


@pytest.mark.parametrize("suffix", ["data", "index"])
def test_every_bit_flip_is_detected(suffix: str, tmp_path: Path) -> None:
    """One record is missing, and the others are found."""
    whole = tmp_path / "whole"
    keys = make_small_store(whole, HIDDEN)
    for file in parts(whole, suffix):
        content = file.read_bytes()
        for position in range(0, len(content) * 8, 5):
            folder = tmp_path / "copy"
            shutil.copytree(whole, folder)
            changed = bytearray(content)
            changed[position // 8] ^= 1 << position % 8
            (folder / file.name).write_bytes(changed)
            assert check_and_complete(folder, HIDDEN, keys) == 1
            shutil.rmtree(folder)


def test_zeros_instead_of_what_was_written(tmp_path: Path) -> None:
    """What some file systems leave of the last blocks after a power failure."""
    for suffix in ("data", "index"):
        folder = tmp_path / suffix
        keys = make_small_store(folder, HIDDEN)
        for file in parts(folder, suffix):
            file.write_bytes(bytes(file.stat().st_size))
        assert check_and_complete(folder, HIDDEN, keys) == 3


def test_a_second_copy_stands_in_for_a_damaged_one(tmp_path: Path) -> None:
    stores = [DiskStore(tmp_path, HIDDEN, MIB) for _ in range(2)]
    for store in stores:
        store.put(make_key(0), make_record(HIDDEN, 0))
        store.close()
    for file in parts(tmp_path, "data"):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert (DiskStore(tmp_path, HIDDEN, MIB).get([make_key(0)])[0] is None) == (file == parts(tmp_path, "data")[1])
        if file == parts(tmp_path, "data")[0]:
            assert same(DiskStore(tmp_path, HIDDEN, MIB).get([make_key(0)])[0], make_record(HIDDEN, 0))


def test_damage_is_found_at_every_read(tmp_path: Path) -> None:
    """Also of a record that was read and found right before."""
    keys = make_small_store(tmp_path, HIDDEN)
    store = DiskStore(tmp_path, HIDDEN, MIB)
    assert all(record is not None for record in store.get(keys))
    for file in parts(tmp_path, "data"):
        file.write_bytes(bytes([255 - byte for byte in file.read_bytes()]))
    assert store.get(keys) == [None, None, None]
    assert store.stats.damaged == 3


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """One line that names the setting and says what to do, whether it was to be read or written."""
    gone = "it was there at the start and is gone"
    for use in (
        lambda store: store.get([make_key(9)]),
        lambda store: store.missing([make_key(9)]),
        lambda store: store.refresh(),
        lambda store: store.put(make_key(9), make_record(HIDDEN, 9)),
        lambda store: store.save_output_head(torch.randn(3, 2)),
    ):
        folder = tmp_path / "store"
        make_small_store(folder, HIDDEN)
        store = DiskStore(folder, HIDDEN, MIB)
        shutil.rmtree(folder)
        with pytest.raises(OSError, match=refusal(folder, gone)) as error:
            use(store)
        assert "\n" not in str(error.value)


def test_a_writers_own_part_is_removed(tmp_path: Path) -> None:
    """The next record goes to a new one, where others find it."""
    store = DiskStore(tmp_path, HIDDEN, MIB)
    store.put(make_key(0), make_record(HIDDEN, 0))
    for file in tmp_path.glob("part-*"):
        file.unlink()
    assert store.get([make_key(0), make_key(1)]) == [None, None]
    for number in range(2):
        store.put(make_key(number), make_record(HIDDEN, number))
    assert not DiskStore(tmp_path, HIDDEN, MIB).missing([make_key(0), make_key(1)])


def test_removed_parts_are_missing_rows(tmp_path: Path) -> None:
    """Also while the store is open."""
    make_small_store(tmp_path, HIDDEN)
    store = DiskStore(tmp_path, HIDDEN, MIB)
    for file in parts(tmp_path, "data"):
        file.unlink()
    assert store.get([make_key(0), make_key(2)]) == [None, None]
    store.put(make_key(0), make_record(HIDDEN, 0))
    assert same(store.get([make_key(0)])[0], make_record(HIDDEN, 0))
    assert DiskStore(tmp_path, HIDDEN, MIB).stats.rows == 1


def test_a_part_with_a_torn_end_is_never_continued(tmp_path: Path) -> None:
    """Writing fails midway (a real limit on the size of files): a clear error, then the next write begins anew."""
    store = DiskStore(tmp_path, HIDDEN, MIB)
    store.put(make_key(0), make_record(HIDDEN, 0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # in the middle of the second payload
    try:
        with pytest.raises(
            OSError, match=r"algorithm\.hpd\.teacher_cache_dir=.*: writing failed.*\(File too large\); "
        ):
            store.put(make_key(1), make_record(HIDDEN, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.missing([make_key(0), make_key(1)]) == [make_key(1)]
    store.put(make_key(1), make_record(HIDDEN, 1))
    assert [file.stat().st_size for file in sorted(parts(tmp_path, "data"), key=os.path.getsize)] == [66, 100]
    for reader in (store, DiskStore(tmp_path, HIDDEN, MIB)):
        for number in range(2):
            assert same(reader.get([make_key(number)])[0], make_record(HIDDEN, number))


# Errors at start


def refusal(folder: Path, found: str) -> str:
    """The pattern of an error: the setting, the folder, what was found, and something to do."""
    return rf"^algorithm\.hpd\.teacher_cache_dir={folder}: {found}.*; \w+"


def test_refuses_a_folder_it_cannot_make(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(ValueError, match=refusal(folder, r"cannot be written to \(")):
            DiskStore(folder, HIDDEN, MIB)


def test_refuses_a_folder_it_cannot_write_to() -> None:
    """/proc takes no files, not even from root."""
    folder = Path("/proc/self")
    with pytest.raises(ValueError, match=refusal(folder, r"cannot be written to \(")):
        DiskStore(folder, HIDDEN, MIB)


def test_refuses_a_limit_that_would_fill_the_disk(tmp_path: Path) -> None:
    """What is stored already needs no more space."""
    make_small_store(tmp_path, HIDDEN)
    too_much = shutil.disk_usage(tmp_path).total
    found = (
        rf"^algorithm\.hpd\.teacher_cache_max_gib={too_much / (1 << 30):g}: lets .* grow by [\d.]+ GiB, .*GiB free; "
    )
    with pytest.raises(ValueError, match=found):
        DiskStore(tmp_path, HIDDEN, too_much)
    assert DiskStore(tmp_path, HIDDEN, 0).stats.rows == 3  # full, and served
    os.truncate(parts(tmp_path, "data")[0], too_much)  # a hole: its size counts, the disk does not hold it
    assert DiskStore(tmp_path, HIDDEN, too_much + MIB).stats.rows == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher", "1" * 64),
        ("teacher_config", "1" * 64),
        ("temperature", 2.0),
        ("vocabulary_size", 101),
        ("dtype", "float32"),
        ("teacher_dtype", "fp32"),
        ("tokenisation", "1" * 64),
    ],
)
def test_refuses_a_store_of_something_else(name: str, value: Any, tmp_path: Path) -> None:
    """The message says which fields differ, and only those."""
    DiskStore(tmp_path, HIDDEN, MIB)
    found = rf"holds features of .*\({name}: stored {getattr(HIDDEN, name)}, this run {value}\)"
    with pytest.raises(ValueError, match=refusal(tmp_path, found)):
        DiskStore(tmp_path, replace(HIDDEN, **{name: value}), MIB)
    with pytest.raises(ValueError, match=refusal(tmp_path, r"holds .*\(dtype: .*; format: .*; top_k: .*\)")):
        DiskStore(tmp_path, TOP_K, MIB)
    DiskStore(tmp_path, HIDDEN, MIB)


def test_refuses_another_format_version(tmp_path: Path) -> None:
    DiskStore(tmp_path, HIDDEN, MIB)
    file = tmp_path / "store.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 1}))
    with pytest.raises(ValueError, match=refusal(tmp_path, "holds features in format version 1, .* reads version 2")):
        DiskStore(tmp_path, HIDDEN, MIB)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format_version": 1, "identity": 3}'])
def test_refuses_a_store_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(ValueError, match=refusal(tmp_path, r"its store\.json cannot be read")):
        DiskStore(tmp_path, HIDDEN, MIB)


def test_refuses_parts_of_unknown_origin(tmp_path: Path) -> None:
    make_small_store(tmp_path, HIDDEN)
    (tmp_path / "store.json").unlink()
    with pytest.raises(ValueError, match=refusal(tmp_path, r"holds stored features but no store\.json")):
        DiskStore(tmp_path, HIDDEN, MIB)


# Output head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_output_head(dtype: torch.dtype, with_bias: bool, tmp_path: Path) -> None:
    """Comes back exactly, from a view of a larger matrix too, and is written once."""
    store = DiskStore(tmp_path, HIDDEN, MIB)
    assert store.load_output_head() is None
    weight = torch.randn(12, 8).to(dtype)[:10, ::2]
    bias = torch.randn(10).to(dtype) if with_bias else None
    store.check_output_head(weight, bias)  # nothing to compare with
    store.save_output_head(weight, bias)
    written = (tmp_path / "output_head.safetensors").stat().st_mtime_ns
    store.save_output_head(weight, bias)
    assert (tmp_path / "output_head.safetensors").stat().st_mtime_ns == written
    stored = DiskStore(tmp_path, HIDDEN, MIB).load_output_head()
    assert stored is not None
    assert torch.equal(stored[0], weight)
    assert stored[0].dtype == dtype
    assert (stored[1] is None) == (bias is None)
    if bias is not None and stored[1] is not None:
        assert torch.equal(stored[1], bias)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["output_head.safetensors", "store.json"]


def test_output_head_of_another_teacher(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, HIDDEN, MIB)
    weight, bias = torch.randn(10, 4), torch.randn(10)
    store.save_output_head(weight, bias)
    changed = weight.clone()
    changed[9, 3] = torch.nextafter(changed[9, 3], torch.tensor(9.0))
    for other in ((changed, bias), (weight, None), (weight, weight[:, 0]), (weight.t(), bias), (weight.double(), bias)):
        assert output_head_hash(*other) != output_head_hash(weight, bias)
        for call in (store.check_output_head, store.save_output_head):
            with pytest.raises(ValueError, match=refusal(tmp_path, "its output head is not the teacher's")):
                call(*other)
    store.check_output_head(weight, bias)


def test_output_head_of_another_identity(tmp_path: Path) -> None:
    """A head that another teacher's run left in the folder is not taken for this one's."""
    (tmp_path / "other").mkdir()
    other = DiskStore(tmp_path / "other", replace(HIDDEN, teacher="1" * 64), MIB)
    other.save_output_head(torch.randn(10, 4))
    store = DiskStore(tmp_path / "store", HIDDEN, MIB)
    shutil.copy(other.folder / "output_head.safetensors", store.folder)
    found = r"its output_head\.safetensors is of another teacher or of other settings"
    with pytest.raises(ValueError, match=refusal(store.folder, found)):
        store.load_output_head()
    assert other.load_output_head() is not None


def open_at_once(folder: Path, teacher: str, start: Any, result: Any) -> None:
    start.wait()
    try:
        store = DiskStore(folder, replace(HIDDEN, teacher=teacher * 64), MIB)
        store.save_output_head(torch.full((3, 2), float(teacher)))
        result.put((teacher, "opened"))
    except ValueError as error:
        result.put((teacher, str(error)))


def test_two_teachers_open_a_new_folder_at_once(tmp_path: Path, processes: ForkServerContext) -> None:
    """One gets it, with its store.json and its head; the other is told of whose it is."""
    for attempt in range(6):
        folder, start, result = tmp_path / str(attempt), processes.Barrier(2), processes.Queue()
        workers = [processes.Process(target=open_at_once, args=(folder, name, start, result)) for name in "12"]
        for worker in workers:
            worker.start()
        outcomes = dict(result.get(timeout=60) for _ in workers)
        for worker in workers:
            worker.join(60)
        (winner,) = [name for name, outcome in outcomes.items() if outcome == "opened"]
        (refused,) = [outcome for outcome in outcomes.values() if outcome != "opened"]
        assert "holds features of another teacher" in refused
        stored = DiskStore(folder, replace(HIDDEN, teacher=winner * 64), MIB).load_output_head()
        assert stored is not None
        assert (stored[0] == float(winner)).all()
        assert sorted(file.name for file in folder.iterdir()) == ["output_head.safetensors", "store.json"]


def test_store_json_is_never_replaced(tmp_path: Path) -> None:
    """Of two that both found none, the second finds the first's: with links, and on a file system without them."""
    for links in (True, False):
        folder = tmp_path / str(links)
        with pytest.MonkeyPatch.context() as patch:
            if not links:
                patch.setattr(os, "link", _no_links)
            first = DiskStore(folder, HIDDEN, MIB)
            written = (folder / "store.json").read_bytes()
            first._create(folder / "store.json", "another\n")
            assert (folder / "store.json").read_bytes() == written
            DiskStore(folder, HIDDEN, MIB)
        assert [file.name for file in folder.iterdir()] == ["store.json"]


def _no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_what_a_kill_leaves_of_store_json_is_in_nobodys_way(tmp_path: Path) -> None:
    """A temporary file, whole or in part, or both names of the same file."""
    DiskStore(tmp_path / "whole", HIDDEN, MIB)
    text = (tmp_path / "whole" / "store.json").read_text()
    for content in ("", text[:20], text):
        folder = tmp_path / f"before link {len(content)}"
        folder.mkdir()
        (folder / "store.json.abc.tmp").write_text(content)
        make_small_store(folder, HIDDEN)
        assert DiskStore(folder, HIDDEN, MIB).stats.rows == 3
    os.link(tmp_path / "whole" / "store.json", tmp_path / "whole" / "store.json.abc.tmp")
    make_small_store(tmp_path / "whole", HIDDEN)
    assert DiskStore(tmp_path / "whole", HIDDEN, MIB).stats.rows == 3


def test_damaged_output_head(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, HIDDEN, MIB)
    store.save_output_head(torch.randn(10, 4))
    file = tmp_path / "output_head.safetensors"
    content = file.read_bytes()
    for damaged in (b"", content[:4], content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=refusal(tmp_path, r"its output_head\.safetensors is damaged")):
            store.load_output_head()


def test_tokenisation_hash_sees_vocabulary_and_template() -> None:
    first = tokenisation_hash({"a": 0, "b": 1}, "template")
    assert first == tokenisation_hash({"b": 1, "a": 0}, "template")
    assert len({first, tokenisation_hash({"a": 1, "b": 0}, "template"), tokenisation_hash({"a": 0, "b": 1}, None)}) == 3
