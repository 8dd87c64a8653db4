"""The teacher behind a URL: its features are those of the model beside the student, whatever its servers do."""

import concurrent.futures
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Tiny, make_model
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from pooling_server import Deed, PoolingServer
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.dataset_utils import SFTTensorCollator

from hpd_verl.checks import teacher_server as checks
from hpd_verl.checks.start import check_sft_run
from hpd_verl.config import HPDConfig
from hpd_verl.data.response_tokens import row_numbers
from hpd_verl.errors import Refused
from hpd_verl.head.features import TeacherFeatures, TopKFeatures
from hpd_verl.hydra_config import config_dir
from hpd_verl.run import stopping
from hpd_verl.run.stopping import learn_of_stops
from hpd_verl.sft.demonstrations import as_batch, read_demonstrations
from hpd_verl.sft.fill_store import fill
from hpd_verl.sft.start import teacher_settings, write_row_layouts
from hpd_verl.teacher.choice import make_teacher
from hpd_verl.teacher.served import client, waiting
from hpd_verl.teacher.served import teacher as served_teacher
from hpd_verl.teacher.served.probe import FILE
from hpd_verl.teacher.served.teacher import ServedTeacher
from hpd_verl.teacher.teacher import Teacher, TeacherUnavailable
from hpd_verl.teacher_server import KEY_VARIABLE

KEY = "sk-secret-0123456789"


pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(client, "PART_TOKENS", 24)  # several requests a batch


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[PoolingServer]:
    made = PoolingServer(tiny.teacher)
    yield made
    made.stop()


@pytest.fixture
def calm(server: PoolingServer) -> Iterator[PoolingServer]:
    yield server
    server.misbehave, server.key = (lambda number: None), None
    if not server.is_up:
        server.start()


def configured(tiny: Tiny, *urls: str, timeout: float = 120.0, overrides: tuple[str, ...] = ()) -> DictConfig:
    settings = [
        f"model.path={tiny.student}",
        f"teacher.model.path={tiny.teacher}",
        f"data.train_files={tiny.train}",
        "data.train_batch_size=8",
        "data.max_prompt_length=16",
        "data.max_response_length=16",
        "data.num_workers=0",
        f"algorithm.hpd.teacher_server.urls=[{','.join(urls)}]",
        f"algorithm.hpd.teacher_server.timeout_s={timeout}",
    ]
    with initialize_config_dir(str(config_dir()), version_base=None):
        config = compose("sft_trainer", overrides=[*settings, *overrides])
    write_row_layouts(config)
    return config


def teacher_and_batch(config: DictConfig, rows: int = 8) -> tuple[Teacher, TensorDict]:
    model = omega_conf_to_dataclass(config.model)
    dataset = read_demonstrations(config, model, config.data.train_files)
    batch = as_batch(
        config, model, SFTTensorCollator("no_padding")([dataset[index] for index in range(rows)]), step=1, steps=1
    )
    return make_teacher(teacher_settings(config), HPDConfig.from_config(config.algorithm.hpd), model), batch


@pytest.fixture(scope="module")
def colocated(tiny: Tiny) -> dict[int, TeacherFeatures]:
    teacher, batch = teacher_and_batch(configured(tiny))
    return teacher.features(batch)


def assert_equal(found: dict[int, TeacherFeatures], expected: dict[int, TeacherFeatures]) -> None:
    assert found.keys() <= expected.keys()
    for row, features in found.items():
        for name, tensor in expected[row].tensors.items():
            torch.testing.assert_close(features.tensors[name], tensor, atol=2e-5, rtol=1e-5)


def test_features_are_those_of_the_model_beside_the_student(
    tiny: Tiny, calm: PoolingServer, colocated: dict[int, TeacherFeatures]
) -> None:
    """All rows, some, fetched ahead or not; by two servers that share them."""
    second = PoolingServer(tiny.teacher)
    try:
        teacher, batch = teacher_and_batch(configured(tiny, calm.url, second.url + "/v1/"))
        before = calm.rows
        found = teacher.features(batch)
        assert_equal(found, colocated)
        assert len(found) == 8
        assert calm.rows > before + 1
        assert second.rows > 1
        numbers = row_numbers(batch).tolist()
        assert_equal(some := teacher.features(batch, [5, 2]), colocated)
        assert {numbers[5], numbers[2]} <= some.keys()
        assert teacher.features(batch, []) == {}
        teacher.announce(batch)
        teacher.announce(batch, [1, 2, 3])
        assert isinstance(teacher, ServedTeacher)
        concurrent.futures.wait({future for future, _ in teacher._ahead.values()}, timeout=60)
        calm.stop()
        second.stop()
        assert_equal(some := teacher.features(batch, [1, 2, 3]), colocated)
        assert len(some) == 3
        metrics = teacher.metrics()
        tokens = int(metrics["hpd/teacher_server_tokens"])
        assert metrics["hpd/teacher_server_gib"] * 2**30 == tokens * 64 * 4
        assert metrics["hpd/teacher_server_retries"] == 0
    finally:
        second.stop()


def first(count: int, deed: Deed) -> Callable[[PoolingServer], Callable[[int], Deed]]:
    """What a server does at its first requests from now on, the probe left out."""

    def of(server: PoolingServer) -> Callable[[int], Deed]:
        last = server.requests + count
        return lambda number: deed if number <= last else None

    return of


@pytest.mark.parametrize("deed", [500, 503, 429, "reset", "hang", "row left out", "wide"])
def test_a_request_that_fails_is_repeated(
    deed: Deed,
    tiny: Tiny,
    calm: PoolingServer,
    colocated: dict[int, TeacherFeatures],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, batch = teacher_and_batch(configured(tiny, calm.url))
    if deed == "hang":
        monkeypatch.setattr(client, "GIVEN_UP_AFTER", 0.02)
    calm.misbehave = first(2, deed)(calm)
    with caplog.at_level(logging.WARNING):
        assert_equal(teacher.features(batch), colocated)
    assert teacher.metrics()["hpd/teacher_server_retries"] > 0
    assert calm.url in caplog.text


def test_a_server_that_dies_and_comes_back(
    tiny: Tiny, calm: PoolingServer, colocated: dict[int, TeacherFeatures]
) -> None:
    """Alone it is waited for; with another, that one answers for it, and it takes part again later."""
    second = PoolingServer(tiny.teacher)
    try:
        alone, batch = teacher_and_batch(configured(tiny, calm.url))
        two, _ = teacher_and_batch(configured(tiny, calm.url, second.url))
        calm.stop()
        assert_equal(two.features(batch), colocated)
        threading.Timer(0.5, calm.start).start()
        assert_equal(alone.features(batch), colocated)
        before, deadline = calm.rows, time.monotonic() + 60
        while calm.rows < before + 2 and time.monotonic() < deadline:  # the other may be faster
            assert_equal(two.features(batch), colocated)
        assert calm.rows >= before + 2
    finally:
        second.stop()


def test_a_server_that_does_not_come_back(tiny: Tiny, calm: PoolingServer) -> None:
    teacher, batch = teacher_and_batch(configured(tiny, calm.url))
    assert isinstance(teacher, ServedTeacher)
    teacher.servers.timeout = 0.5
    calm.stop()
    start = time.monotonic()
    line = (
        rf"^algorithm.hpd.teacher_server.urls=\[{calm.url}\]: no answer for 0.5 s \({calm.url}: .*; start the teacher"
    )
    with pytest.raises(TeacherUnavailable, match=line):
        teacher.features(batch)
    assert 0.4 < time.monotonic() - start < 20
    calm.start()
    teacher.servers.timeout = 60
    assert len(teacher.features(batch)) == 8


@pytest.mark.parametrize("deed", [503, "hang", None], ids=["fails", "hangs", "not met yet"])
def test_a_run_that_shall_end_does_not_wait_for_a_dead_server(
    deed: Deed, tiny: Tiny, calm: PoolingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before ``timeout_s``; without being asked it waits on."""
    config = configured(tiny, calm.url, timeout=600)
    model = omega_conf_to_dataclass(config.model)
    teacher, batch = teacher_and_batch(config)
    calm.misbehave = lambda number: deed
    if deed is None:  # behind a store, servers are met when the first row is missing
        teacher = ServedTeacher(
            teacher_settings(config), HPDConfig.from_config(config.algorithm.hpd), model.hf_config.vocab_size
        )
        calm.stop()
    monkeypatch.setattr(served_teacher, "LOOK", 0.05)
    monkeypatch.setattr(waiting, "LOOK", 0.05)
    monkeypatch.setattr(waiting, "STOP_AFTER", 0.2)
    asked_at = time.monotonic() + 0.5
    monkeypatch.setattr(stopping, "_ask", [])
    learn_of_stops(lambda: time.monotonic() >= asked_at)
    with pytest.raises(TeacherUnavailable, match="the run shall end, and the teacher has not answered"):
        teacher.features(batch)
    assert 0.6 < time.monotonic() - asked_at + 0.5 < 20


@pytest.mark.parametrize("deed", [400, 401])
def test_what_repeating_does_not_mend_ends_at_once(deed: int, tiny: Tiny, calm: PoolingServer) -> None:
    teacher, batch = teacher_and_batch(configured(tiny, calm.url, timeout=600))
    calm.misbehave = lambda number: deed
    start = time.monotonic()
    with pytest.raises(TeacherUnavailable, match=f"status {deed} on purpose"):
        teacher.features(batch)
    assert time.monotonic() - start < 60


def test_another_model_is_refused(tiny: Tiny, calm: PoolingServer, tmp_path: Path) -> None:
    """When it comes back on the same address, as one of two, in a resumed run, and in front of a store."""
    other = PoolingServer(make_model(tmp_path / "other", seed=9, vocab_size=len(calm.tokenizer) + 7))
    try:
        teacher, batch = teacher_and_batch(configured(tiny, calm.url))
        teacher.features(batch)
        teacher.save(tmp_path)
        calm.model, kept = other.model, calm.model
        calm.misbehave = first(1, 500)(calm)
        with pytest.raises(TeacherUnavailable, match=r"not the model that answered before \(hidden states of a fixed"):
            teacher.features(batch)
        resumed, _ = teacher_and_batch(configured(tiny, calm.url))
        with pytest.raises(Refused, match=f"not the teacher that trained up to {tmp_path.name}"):
            resumed.resume(tmp_path)
        calm.model = kept
        resumed, _ = teacher_and_batch(configured(tiny, calm.url))
        resumed.resume(tmp_path)
        with pytest.raises(Refused, match="not the model that answered before"):
            teacher_and_batch(configured(tiny, calm.url, other.url))
    finally:
        other.stop()


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("nan", "NaN or infinity in what teacher answers"),
        ("normalised", 'they are normalised; start the server with "use_activation": false'),
        ("wide", "teacher answers .* bytes for .* tokens, 128 values each where the teacher has 64"),
        (400, "status 400"),
    ],
)
def test_a_wrong_server_is_refused_at_the_start(deed: Deed, message: str, tiny: Tiny, calm: PoolingServer) -> None:
    calm.misbehave = lambda number: deed
    with pytest.raises(Refused, match=message):
        teacher_and_batch(configured(tiny, calm.url))


def test_nan_is_not_hidden(tiny: Tiny, calm: PoolingServer) -> None:
    """The student's loss then names step and rows, as of a model beside it."""
    teacher, batch = teacher_and_batch(configured(tiny, calm.url))
    calm.misbehave = lambda number: "nan"
    for features in teacher.features(batch).values():
        assert features.tensors["label_log_probs"].isnan().all()


def test_the_key_is_sent_and_never_shown(
    tiny: Tiny, calm: PoolingServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calm.key = KEY
    with pytest.raises(Refused, match=f"status 401 .*set {KEY_VARIABLE} in the environment"):
        teacher_and_batch(configured(tiny, calm.url))
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    config = configured(tiny, calm.url)
    teacher, batch = teacher_and_batch(config)
    assert isinstance(teacher, ServedTeacher)
    with caplog.at_level(logging.DEBUG):
        assert len(teacher.features(batch)) == 8
        calm.misbehave = lambda number: 500
        teacher.servers.timeout = 0.5
        with pytest.raises(TeacherUnavailable, match=r"Bearer \*\*\*") as refusal:
            teacher.features(batch)
    assert KEY not in f"{caplog.text} {refusal.value} {config}"
    monkeypatch.setenv(KEY_VARIABLE, "two words")
    with pytest.raises(ValueError, match=f"^{KEY_VARIABLE}=\\*\\*\\*: holds characters that no key has"):
        teacher_and_batch(config)


def test_bfloat16_over_the_wire(tiny: Tiny, calm: PoolingServer, colocated: dict[int, TeacherFeatures]) -> None:
    precision = "{param_dtype: bf16, reduce_dtype: fp32, buffer_dtype: fp32}"
    teacher, batch = teacher_and_batch(
        configured(tiny, calm.url, overrides=(f"+teacher.engine.mixed_precision={precision}",))
    )
    for row, features in teacher.features(batch).items():
        hidden = features.tensors["hidden"]
        assert hidden.dtype == torch.bfloat16
        torch.testing.assert_close(hidden.float(), colocated[row].tensors["hidden"], atol=0.05, rtol=0.01)
    metrics = teacher.metrics()
    assert metrics["hpd/teacher_server_gib"] * 2**30 == metrics["hpd/teacher_server_tokens"] * 64 * 2


def test_a_store_in_front(tiny: Tiny, calm: PoolingServer, tmp_path: Path) -> None:
    """Filled by a server, it serves without one, knows its teacher by the probe, and refuses another."""
    store = tmp_path / "store"
    disk = (
        "algorithm.hpd.teacher_cache=disk",
        f"algorithm.hpd.teacher_cache_dir={store}",
        "algorithm.hpd.teacher_cache_max_gib=0.01",
    )
    config = configured(tiny, calm.url, overrides=disk)
    assert fill(config)["hpd/teacher_is_loaded"] == 1
    calm.stop()
    assert fill(config)["hpd/teacher_is_loaded"] == 0
    calm.start()
    saved = load_file(store / FILE)
    save_file({**saved, "hidden": saved["hidden"].flip(0).contiguous()}, store / FILE)
    with pytest.raises(ValueError, match="holds features of another teacher"):
        fill(config)


def stored_in(folder: Path, kind: str = "disk") -> tuple[str, ...]:
    """A store of the smallest form."""
    return (
        f"algorithm.hpd.teacher_cache={kind}",
        f"algorithm.hpd.teacher_cache_dir={folder}",
        "algorithm.hpd.teacher_cache_format=hybrid",
        "algorithm.hpd.teacher_cache_top_k=8",
        "algorithm.hpd.teacher_cache_max_gib=0.01",
    )


def test_a_hybrid_store_filled_by_a_server(
    tiny: Tiny, calm: PoolingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server it gives what a served teacher gives whose features are rounded as they come, bit for bit."""
    monkeypatch.setattr(checks, "BESIDE_A_STORE", 0.3)
    teacher, batch = teacher_and_batch(configured(tiny, calm.url, overrides=stored_in(tmp_path, "memory")))
    fresh = teacher.features(batch)
    config = configured(tiny, calm.url, overrides=stored_in(tmp_path / "store"))
    fill(config)
    calm.stop()
    check_sft_run(config)
    with pytest.raises(TeacherUnavailable, match=r"no answer for 0.2 s"):
        check_sft_run(configured(tiny, calm.url, timeout=0.2, overrides=stored_in(tmp_path / "other")))
    stored, batch = teacher_and_batch(config)
    found = stored.features(batch)
    assert found.keys() == fresh.keys()
    for row, features in found.items():
        for name, tensor in features.tensors.items():
            assert torch.equal(tensor, fresh[row].tensors[name]), name
    assert stored.metrics()["hpd/teacher_is_loaded"] == 0


def test_a_fill_that_has_stopped_goes_on(
    tiny: Tiny, calm: PoolingServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the same command, and asks for the rows that are not stored; it says how fast it is, and what is left."""
    config = configured(tiny, calm.url, overrides=stored_in(tmp_path))
    last = calm.requests + 30
    calm.misbehave = lambda number: 401 if number > last else None
    with pytest.raises(TeacherUnavailable, match="status 401"):
        fill(config)
    calm.misbehave = lambda number: None
    before = calm.rows
    metrics = fill(config)
    assert re.search(r"train\.parquet: 100%.* 64/64 .*row/s, [1-9][\d,]* tokens/s", capsys.readouterr().err)
    rows = int(metrics["hpd/teacher_cache_rows"])
    asked = calm.rows - before
    assert rows == 52
    assert 8 < asked <= rows - 8 + 1  # one is the probe
    calm.stop()
    assert fill(config)["hpd/teacher_cache_hit_fraction"] == 1


@pytest.fixture
def completing(calm: PoolingServer) -> Iterator[PoolingServer]:
    """The server, of a kind that cannot pool."""
    calm.pools = False
    yield calm
    calm.pools = True


TOP_K = ("algorithm.hpd.teacher_server.top_k=5",)


@pytest.mark.parametrize("features", ["auto", "topk"])
def test_top_k_where_a_server_cannot_pool(features: str, tiny: Tiny, completing: PoolingServer) -> None:
    """The log-probs are those of transformers over the tokenizer's tokens, the rest of the mass is beside them."""
    overrides = (*TOP_K, f"algorithm.hpd.teacher_server.features={features}")
    teacher, batch = teacher_and_batch(configured(tiny, completing.url, overrides=overrides))
    size = len(completing.tokenizer)
    for index, features_of_row in enumerate(teacher.features(batch).values()):
        assert isinstance(features_of_row, TopKFeatures)
        ids, labels = batch["input_ids"].unbind()[index], batch["responses"].unbind()[index]
        with torch.no_grad():
            logits = completing.model(ids.unsqueeze(0)).logits[0, -len(labels) - 1 : -1, :size]
        log_probs = logits.double().log_softmax(-1)
        top = log_probs.topk(5)
        expected = {
            "label_log_probs": log_probs.gather(1, labels.unsqueeze(1)).squeeze(1),
            "rest_log_prob": torch.log1p(-top.values.exp().sum(-1)),
            "top_log_probs": top.values,
        }
        for name, tensor in expected.items():
            torch.testing.assert_close(features_of_row.tensors[name].double(), tensor, atol=2e-4, rtol=1e-4)
        assert torch.equal(features_of_row.top_tokens, top.indices)
        assert features_of_row.vocabulary_size == size


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("algorithm.hpd.exact_kl_metrics=true", "algorithm.hpd.exact_kl_metrics=True"),
        ("algorithm.hpd.temperature=2.0", "algorithm.hpd.temperature=2.0"),
        ("algorithm.hpd.teacher_cache=memory", "algorithm.hpd.teacher_cache_format=hidden"),
    ],
)
def test_what_needs_more_than_top_k_is_refused(
    setting: str, message: str, tiny: Tiny, completing: PoolingServer
) -> None:
    """Also where only the server shows that it cannot pool, before anything starts."""
    line = rf"^{message}: algorithm.hpd.teacher_server.features=topk gives the server's top 5 log-probs"
    overrides = (*TOP_K, setting, "algorithm.hpd.teacher_server.features=topk")
    with pytest.raises(ValueError, match=line):
        HPDConfig.from_config(configured(tiny, completing.url, overrides=overrides).algorithm.hpd)
    refused(tiny, completing.url, line, *TOP_K, setting)


def test_a_server_that_can_neither(tiny: Tiny, completing: PoolingServer) -> None:
    line = "/pooling: status 404 .*; /v1/completions: status 400"
    completing.misbehave = lambda number: 400
    with pytest.raises(Refused, match=line):
        teacher_and_batch(configured(tiny, completing.url))


def test_a_top_k_store_filled_by_a_server(tiny: Tiny, completing: PoolingServer, tmp_path: Path) -> None:
    overrides = (
        *TOP_K,
        "algorithm.hpd.teacher_cache=disk",
        f"algorithm.hpd.teacher_cache_dir={tmp_path}",
        "algorithm.hpd.teacher_cache_format=topk",
        "algorithm.hpd.teacher_cache_top_k=5",
        "algorithm.hpd.teacher_cache_max_gib=0.01",
    )
    config = configured(tiny, completing.url, overrides=overrides)
    teacher, batch = teacher_and_batch(config)
    fresh = teacher.features(batch)
    completing.stop()
    stored, _ = teacher_and_batch(config)
    for row, features in stored.features(batch).items():
        assert isinstance(features, TopKFeatures)
        assert features.vocabulary_size == fresh[row].vocabulary_size
        assert_equal({row: features}, fresh)


def refused(tiny: Tiny, url: str, message: str, *overrides: str, timeout: float = 120.0) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        check_sft_run(configured(tiny, url, timeout=timeout, overrides=overrides))
    assert "\n" not in str(refusal.value)


def test_what_is_refused_before_anything_starts(tiny: Tiny, calm: PoolingServer, tmp_path: Path) -> None:
    save = f"trainer.default_local_dir={tmp_path / 'checkpoints'}"
    check_sft_run(configured(tiny, calm.url, overrides=(save,)))
    calm.max_model_len = 20
    refused(
        tiny, calm.url, r"takes 20 tokens \(max_model_len\), and data.max_prompt_length .* = 32; start it with", save
    )
    calm.max_model_len = 128

    folder = tmp_path / "teacher"
    shutil.copytree(tiny.teacher, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    here = f"teacher.model.path={folder}"
    refused(tiny, calm.url, f"serves {tiny.teacher}, whose config.json is not that of teacher.model.path", save, here)
    shutil.copy(tiny.teacher / "config.json", folder)
    check_sft_run(configured(tiny, calm.url, overrides=(save, here)))

    weights = load_file(folder / "model.safetensors")
    for layer, message in {
        "lm_head.weight": "is I8 .*; give the files of the unquantised model",
        "": r"no output layer in its safetensors files \(lm_head.weight\)",
    }.items():
        head = {layer: weights["lm_head.weight"].to(torch.int8)} if layer else {"x": torch.zeros(1)}
        save_file(head, folder / "model.safetensors", metadata={"format": "pt"})
        refused(tiny, calm.url, message, save, here)
    # The layers themselves need not be here.
    save_file({"lm_head.weight": weights["lm_head.weight"]}, folder / "model.safetensors", metadata={"format": "pt"})
    check_sft_run(configured(tiny, calm.url, overrides=(save, here)))
    (folder / "model.safetensors").unlink()
    refused(tiny, calm.url, r"teacher.model.path=.*: no model.safetensors or .*index.json there", save, here)

    calm.tokenizer.add_tokens(["Let"])
    refused(tiny, calm.url, "its tokenizer makes", save)
    calm.stop()
    refused(
        tiny, calm.url, rf"urls=\[{calm.url}\]: no answer for 0.3 s \(.*/v1/models: ConnectError", save, timeout=0.3
    )
