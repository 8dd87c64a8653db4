"""Runs whose teacher is in a server that dies: vLLM's, and a small one where the run shall stop."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import WORDS, FinishedRun, RunMainPPO, Tiny, make_model, read_steps
from pooling_server import PoolingServer
from test_several_teachers import rows_of_two
from test_sft_trainer import RunSFT, run_sft  # noqa: F401 (a fixture)
from vllm_server import VLLM

from hpd_verl.run.stopping import EXIT_CODE

STEPS = ("trainer.total_training_steps=24", "optim.lr=1e-4")
"""At the other tests' learning rate Adam turns differences of 1e-6 into others' draws within 7 steps."""


def when(condition: Callable[[], bool], deed: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a condition holds, beside the test."""

    def wait() -> None:
        deadline = time.monotonic() + 600
        while not condition():
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        deed()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 64, which vLLM's pooling takes on a CPU."""
    folder = tmp_path_factory.mktemp("served") / "teacher"
    return make_model(folder, seed=2, vocab_size=len(WORDS) + 7, head_dim=64)


@pytest.fixture
def vllm(teacher: Path, tmp_path: Path) -> Iterator[VLLM]:
    server = VLLM(teacher, tmp_path / "vllm.txt")
    yield server
    server.kill()


def test_vllm_is_killed_in_mid_run(run_sft: RunSFT, teacher: Path, vllm: VLLM, tmp_path: Path) -> None:  # noqa: F811
    """Every loss is that of a teacher beside the student, to 1e-4; a server that is started again is waited for."""
    overrides = (f"teacher.model.path={teacher}", "trainer.resume_mode=disable", *STEPS)
    colocated = run_sft(*overrides)
    assert colocated.returncode == 0, colocated.output[-3000:]
    vllm.wait()
    log = tmp_path / "metrics.jsonl"
    log.unlink()
    killed: list[int] = []

    def kill() -> None:
        vllm.kill()
        killed.append(len(read_steps(log)))
        vllm.start()

    when(lambda: len(read_steps(log)) >= 6, kill)
    served = run_sft(*overrides, f"algorithm.hpd.teacher_server.urls=[{vllm.url}]")
    assert served.returncode == 0, served.output[-3000:]
    assert killed
    assert 6 <= killed[0] < 22
    assert served.steps[-1]["hpd/teacher_server_retries"] > 0
    assert served.losses() == pytest.approx(colocated.losses(), abs=1e-4)


@pytest.fixture
def server(tiny: Tiny) -> Iterator[PoolingServer]:
    made = PoolingServer(tiny.teacher)
    yield made
    made.stop()


def test_the_lean_trainer_stops_and_goes_on(run_sft: RunSFT, server: PoolingServer, tmp_path: Path) -> None:  # noqa: F811
    """Without a server: a checkpoint of the last step, one line, exit code 75; with it the same losses as without.

    So it does where a signal asks for it while the run waits for the server, long before ``timeout_s``.
    """
    whole = run_sft(*STEPS, "trainer.resume_mode=disable", f"trainer.default_local_dir={tmp_path / 'other'}")
    log = tmp_path / "metrics.jsonl"
    log.unlink()
    when(lambda: len(read_steps(log)) >= 5, server.stop)
    url = f"algorithm.hpd.teacher_server.urls=[{server.url}]"
    stopped = run_sft(*STEPS, url, "algorithm.hpd.teacher_server.timeout_s=10")
    last = assert_stopped(stopped.returncode, stopped.output, stopped.steps, server, tmp_path)
    assert 5 <= last < 24
    server.start()
    server.misbehave = lambda number: 503 if len(read_steps(log)) >= 3 else None
    asked = run_sft(*STEPS, url, terminate_after_step=4)  # it has asked for one step more when the third is logged
    assert_asked(asked, last + 4, 24, tmp_path)
    server.misbehave = lambda number: None
    resumed = run_sft(*STEPS, url)
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert resumed.steps[0]["training/global_step"] == last + 5
    assert [*stopped.losses(), *asked.losses(), *resumed.losses()] == pytest.approx(whole.losses(), abs=1e-4)


def test_main_ppo_stops_and_goes_on(run_main_ppo: RunMainPPO, server: PoolingServer, tmp_path: Path) -> None:
    """The same of main_ppo; test_main_ppo_fetches_ahead goes on to the end."""
    log = tmp_path / "metrics.jsonl"
    when(lambda: len(read_steps(log)) >= 2, server.stop)
    settings = (
        "trainer.total_training_steps=6",
        f"algorithm.hpd.teacher_server.urls=[{server.url}]",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra]",
    )
    stopped = run_main_ppo(*settings, "algorithm.hpd.teacher_server.timeout_s=10")
    last = assert_stopped(stopped.returncode, stopped.output, stopped.steps, server, tmp_path)
    server.start()
    server.misbehave = lambda number: 503 if read_steps(log) else None
    asked = run_main_ppo(*settings, terminate_after_step=1)
    assert_asked(asked, last + len(asked.steps), 6, tmp_path)
    assert asked.steps[0]["training/global_step"] == last + 1


def assert_asked(run: FinishedRun, last: int, steps: int, folder: Path) -> None:
    assert run.returncode == EXIT_CODE, run.output[-3000:]
    saved = folder / "checkpoints" / f"global_step_{last}"
    line = f"Stopped by SIGTERM after step {last} of {steps}: {saved}, exit code {EXIT_CODE}"
    assert line in run.output, run.output[-3000:]
    assert "Error: " not in run.output
    assert (saved / "complete").is_file()


def assert_stopped(code: int, output: str, steps: list[dict[str, float]], server: PoolingServer, folder: Path) -> int:
    """The last step."""
    assert code == EXIT_CODE, output[-3000:]
    last = int(steps[-1]["training/global_step"])
    saved = folder / "checkpoints" / f"global_step_{last}"
    lines = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, output[-3000:]
    assert lines[0].startswith(f"Error: algorithm.hpd.teacher_server.urls=[{server.url}]: no answer for 10 s (")
    assert lines[0].endswith(f"(step {last} is saved: {saved}), exit code {EXIT_CODE}")
    assert (saved / "complete").is_file()
    assert (saved / "teacher_probe.safetensors").is_file()
    return last


def test_ranks_that_share_rows_with_a_served_and_a_stored_teacher(
    run_sft: RunSFT,  # noqa: F811
    server: PoolingServer,
    tiny: Tiny,
    tmp_path: Path,
) -> None:
    """Ulysses, with a served teacher and one whose store fills: the losses of one rank with both beside the student."""
    other = make_model(tmp_path / "other", seed=9, vocab_size=len(WORDS) + 7)
    shared = (
        f"data.train_files={rows_of_two(tmp_path, ('maths',))}",
        "teacher.model.path=null",
        "data.max_teacher_prompt_length=20",
        "trainer.total_training_steps=10",
        "trainer.resume_mode=disable",
        "optim.lr=1e-4",
    )
    both = f"algorithm.hpd.teachers={{maths: {{path: {tiny.teacher}}}, code: {{path: {other}}}}}"
    beside = run_sft(*shared, both)
    assert beside.returncode == 0, beside.output[-3000:]
    maths = f"maths: {{path: {tiny.teacher}, urls: [{server.url}]}}"
    mixed = run_sft(
        *shared,
        f"algorithm.hpd.teachers={{{maths}, code: {{path: {other}, teacher_cache: disk}}}}",
        f"algorithm.hpd.teacher_cache_dir={tmp_path / 'store'}",
        "algorithm.hpd.teacher_cache_dtype=float32",
        "algorithm.hpd.teacher_cache_max_gib=0.01",
        "engine.ulysses_sequence_parallel_size=2",
        ranks=2,
    )
    assert mixed.returncode == 0, mixed.output[-3000:]
    assert mixed.losses() == pytest.approx(beside.losses(), abs=1e-4)
    assert mixed.steps[-1]["hpd/teachers/maths/teacher_server_tokens"] > 0
    assert mixed.steps[-1]["hpd/teachers/code/teacher_cache_hit_fraction"] > 0


def test_main_ppo_fetches_ahead(run_main_ppo: RunMainPPO, server: PoolingServer, tiny: Tiny) -> None:
    """With the losses of a run that waits, bit for bit: after a kill, too, with a batch taken out of the next epoch."""
    steps = ("trainer.total_training_steps=10", "trainer.total_epochs=2")
    url, ahead = "algorithm.hpd.teacher_server.urls", "algorithm.hpd.teacher_server.prefetch"
    waits = run_main_ppo(*steps, f"{url}=[{server.url}]", f"{ahead}=0", "trainer.resume_mode=disable")
    assert waits.returncode == 0, waits.output[-3000:]
    killed = run_main_ppo(*steps, f"{url}=[{server.url}]", "trainer.save_freq=1", kill_after_step=8)
    last = int(killed.steps[-1]["training/global_step"])
    other = PoolingServer(tiny.teacher)  # which no request of the killed run reaches late
    try:
        resumed = run_main_ppo(*steps, f"{url}=[{other.url}]")
    finally:
        other.stop()
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert resumed.steps[0]["training/global_step"] == last + 1 <= 10
    assert [*killed.losses(), *resumed.losses()] == waits.losses()
    probes = 3  # of the driver, the trainer and the rank
    assert other.rows == 8 * (10 - last) + probes  # each row once: the rank asks for nothing


def test_main_ppo_fetches_rollouts_as_they_end(run_main_ppo: RunMainPPO, server: PoolingServer) -> None:
    """For two ranks, which then have nothing to ask for."""
    run = run_main_ppo(
        "algorithm.hpd.on_policy_fraction=0.5",
        "trainer.n_gpus_per_node=2",
        "trainer.total_training_steps=3",
        f"algorithm.hpd.teacher_server.urls=[{server.url}]",
    )
    assert run.returncode == 0, run.output[-3000:]
    assert [step["hpd/on_policy_fraction"] for step in run.steps] == [0.5] * 3
    probes = 3  # of the driver, the trainer and the first rank
    assert server.rows == 8 * 3 + probes
    assert run.steps[-1]["hpd/teacher_server_tokens"] > 0


def test_main_ppo_starts_the_server(
    run_sft: RunSFT,  # noqa: F811
    run_main_ppo: RunMainPPO,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in mid-run it is started again; nothing is left. Every loss is that of the lean trainer with the teacher
    beside the student: in batches of all rows, whose order does not matter, without draws."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HPD_TEST_RUN", str(tmp_path))
    log, server_log = tmp_path / "metrics.jsonl", tmp_path / "checkpoints" / "teacher_server_0.log"
    settings = (
        *("trainer.total_training_steps=8", "trainer.total_epochs=8", "trainer.resume_mode=disable"),
        *("data.train_batch_size=64", "algorithm.hpd.objective=fkl"),
    )
    colocated = run_sft(f"teacher.model.path={teacher}", "optim.lr=1e-4", *settings)
    assert colocated.returncode == 0, colocated.output[-3000:]
    log.unlink()

    killed: list[int] = []

    def kill() -> None:
        (server,) = (process for process, words in processes_of(tmp_path) if is_server(words))
        killed.append(len(read_steps(log)))
        os.kill(server, signal.SIGKILL)

    when(lambda: len(read_steps(log)) >= 3, kill)
    served = run_main_ppo(
        f"actor_rollout_ref.ref.model.path={teacher}",
        "algorithm.hpd.teacher_server.n_gpus_per_node=1",
        "actor_rollout_ref.actor.optim.lr=1e-4",
        *settings,
    )
    said = server_log.read_text()[-3000:] if server_log.exists() else ""
    assert served.returncode == 0, served.output[-3000:] + said
    assert killed
    assert 3 <= killed[0] < 8
    assert served.steps[-1]["hpd/teacher_server_retries"] > 0
    assert served.losses() == pytest.approx(colocated.losses(), abs=1e-4)
    deadline = time.monotonic() + 30
    while left := [words for _, words in processes_of(tmp_path) if "vllm" in words.lower()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def is_server(words: str) -> bool:
    return "vllm.entrypoints.openai.api_server" in words and "with_parent" not in words


def processes_of(run: Path) -> list[tuple[int, str]]:
    """The processes that have a run's environment, and their commands."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HPD_TEST_RUN={run}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append((int(folder.name), words))
    return found
