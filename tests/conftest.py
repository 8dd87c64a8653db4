"""Tiny models and data that verl, vLLM and transformers run for real, and a runner for the real command.

``HPD_TEST_DEVICE=cuda`` runs the unit tests of ``ON_DEVICE`` there; ``HPD_TEST_DEVICE=meta`` on the device of
``fake_device.py``. Those but the last need neither verl nor transformers.
"""

import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

DEVICE = os.environ.get("HPD_TEST_DEVICE", "cpu")
"""Device of the unit tests in ``ON_DEVICE``."""
ON_DEVICE = ["test_objectives", "test_head", "test_sampling", "test_one_pass"]

if DEVICE != "cuda":
    os.environ["VERL_PLATFORM"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A package of vLLM's sets the root logger, and pytest's handlers, to this at its import; to ERROR without it.
os.environ.setdefault("SAGEMAKER_CONTAINER_LOG_LEVEL", "WARNING")
# torch, loaded above, has read it already; several processes share the cores.
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

WORDS = ["<pad>", "<end>", "<turn>", "user", "assistant", "is", "plus", "?", ".", *map(str, range(20))]
CHAT_TEMPLATE = (
    "{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant {% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in end_to_end as ``e2e``, and what neither is there nor marked ``slow`` as ``unit``.

    In this order they run: what takes long first, so that several processes have work until the end.
    """
    for item in items:
        if "end_to_end" in item.path.parts:
            item.add_marker("e2e")
        elif item.get_closest_marker("slow") is None:
            item.add_marker("unit")
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("e2e", "slow")])


class TensorsOfTests(TorchFunctionMode):
    """Tensors that a test makes are on ``DEVICE``; those of the code under test are where it puts them.

    Random numbers are drawn on the CPU, so that every device sees the same.
    """

    MODULES = (*ON_DEVICE, "reference")

    def __init__(self) -> None:
        super().__init__()
        self.makes_tensors = {*_device_constructors(), torch.from_numpy}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        in_a_test = sys._getframe(1).f_globals["__name__"] in self.MODULES
        if in_a_test and func in self.makes_tensors and "device" not in kwargs and "out" not in kwargs:
            gradient = kwargs.get("requires_grad", False)
            made = made.detach().to(DEVICE).requires_grad_(gradient)
        return made


@pytest.fixture(scope="module", autouse=True)
def tensors_on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """The tests of ``ON_DEVICE`` run on ``DEVICE``."""
    with ExitStack() as stack:
        if DEVICE != "cpu" and request.module.__name__ in ON_DEVICE:
            if DEVICE == "meta":
                from fake_device import fake_device

                stack.enter_context(fake_device())
            stack.enter_context(TensorsOfTests())
        yield


def make_tokenizer(words: list[str]) -> Any:
    """A word-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(
    folder: Path,
    seed: int,
    words: list[str] = WORDS,
    vocab_size: int | None = None,
    num_hidden_layers: int = 2,
    **config: Any,
) -> Path:
    """A randomly initialised Llama, saved with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(words)
    settings = {"max_position_embeddings": 128, "initializer_range": 0.3, "tie_word_embeddings": False}
    settings |= {"hidden_size": 64, "intermediate_size": 96, **config}  # heads of 32: vLLM's smallest on a CPU
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size or len(tokenizer),
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            **settings,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_nan_model(source: Path, folder: Path) -> Path:
    """A copy of a model whose logits are NaN."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def make_awkward_model(source: Path, folder: Path) -> Path:
    """A copy of a model whose configuration says less than its files, as some on the hub.

    It claims that the output layer is the embeddings, and its generation settings, with two end tokens, have a
    temperature without do_sample, which transformers refuses to save.
    """
    shutil.copytree(source, folder)
    for name, values in {
        "config.json": {"tie_word_embeddings": True},
        "generation_config.json": {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [1, 9]},
    }.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Additions of small numbers, in verl's columns with a demonstration."""
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        a, b = generator.randrange(10), generator.randrange(10)
        answer = f"{a} plus {b} is {a + b}" if index % 3 else f"{a + b}"
        rows.append(
            {
                "data_source": "tests/addition",
                "prompt": [{"role": "user", "content": f"{a} plus {b} ?"}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(a + b)},
                "extra_info": {"split": "train", "index": index},
                "demonstration": answer,
            }
        )
    return rows


def write_parquet(rows: list[dict[str, Any]], file: Path) -> Path:
    import pandas as pd

    pd.DataFrame(rows).to_parquet(file)
    return file


@dataclass
class Tiny:
    """Paths of the tiny models and data."""

    folder: Path
    student: Path
    teacher: Path
    train: Path
    validation: Path
    reward: Path

    @property
    def rows(self) -> list[str]:
        """Settings of both trainers for the rows."""
        lengths = ["data.max_prompt_length=16", "data.max_response_length=16"]
        return [f"data.train_files={self.train}", "data.train_batch_size=8", *lengths]

    @property
    def main_ppo(self) -> list[str]:
        """Settings of main_ppo for models and rows."""
        models = [f"actor_rollout_ref.model.path={self.student}", f"actor_rollout_ref.ref.model.path={self.teacher}"]
        return [*models, *self.rows]

    @property
    def sft(self) -> list[str]:
        """The same of the lean trainer."""
        return [f"model.path={self.student}", f"teacher.model.path={self.teacher}", *self.rows]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    reward = folder / "reward.py"
    reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    return float(str(ground_truth) in solution_str.split())\n"
    )
    return Tiny(
        folder=folder,
        student=make_model(folder / "student", seed=1),
        teacher=make_model(folder / "teacher", seed=2, vocab_size=len(WORDS) + 7),  # padded vocabulary
        train=write_parquet(make_rows(64), folder / "train.parquet"),
        validation=write_parquet(make_rows(8, seed=1), folder / "validation.parquet"),
        reward=reward,
    )


def main_ppo_config(*overrides: str) -> Any:
    """main_ppo's configuration with ``algorithm=hpd``."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", ["algorithm=hpd", *overrides])


def sft_config(*overrides: str) -> Any:
    """The lean trainer's configuration."""
    from hydra import compose, initialize_config_dir

    from hpd_verl.hydra_config import config_dir

    with initialize_config_dir(str(config_dir()), version_base=None):
        return compose("sft_trainer", list(overrides))


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """torch.distributed with this process alone."""
    from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

    from hpd_verl.sft.start import ALONE

    kept = dict(os.environ)
    os.environ.update(ALONE)
    initialize_global_process_group()
    yield
    destroy_global_process_group()
    os.environ.clear()
    os.environ.update(kept)


@dataclass
class FinishedRun:
    """A finished run of the command."""

    returncode: int
    output: str
    steps: list[dict[str, float]]
    """Metrics of each training step, from verl's file logger."""

    def losses(self) -> list[float]:
        return [step["hpd/loss"] for step in self.steps]


RunMainPPO = Callable[..., FinishedRun]


@pytest.fixture(scope="session")
def processes() -> Iterator[ForkServerContext]:
    """Processes that start quickly: forked from one that has imported verl, the trainers and the store."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hpd_verl.sft.fill_store", "hpd_verl.sft.trainer", "verl.trainer.main_ppo"])
    first = context.Process(target=int)
    first.start()
    first.join()  # the imports are nobody's waiting time
    yield context
    for process in multiprocessing.active_children():  # of a test that has failed
        process.kill()


def run_module(module: str, arguments: list[str], folder: Path, environment: dict[str, str], output: Path) -> None:
    """What ``python -m`` does, in a process of ``processes`` that leads a session of its own.

    Args:
        module: runs as ``__main__``.
        arguments: its words.
        folder: the working directory.
        environment: all of it.
        output: a file that stdout and stderr are appended to.
    """
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    multiprocessing.set_start_method(None, force=True)  # not that of the test
    sys.path[:0] = [str(folder), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start_module(
    processes: ForkServerContext, module: str, arguments: list[str], folder: Path, output: Path, **variables: str
) -> ForkServerProcess:
    """Start ``run_module`` with an empty output and, beside this process's environment, ``variables``."""
    output.write_text("")
    words = (module, arguments, folder, {**os.environ, **variables}, output)
    process = processes.Process(target=run_module, args=words)
    process.start()
    return process


@pytest.fixture
def run_main_ppo(tiny: Tiny, tmp_path: Path, processes: ForkServerContext) -> RunMainPPO:
    """Run ``verl.trainer.main_ppo algorithm=hpd`` on the tiny models, with overrides.

    Killed with all of its session, or its driver sent SIGTERM, after so many steps. With ``new_interpreter`` by
    ``python -m``; otherwise in a process of ``processes``, of which the imports alone are not its own.
    """

    def run(
        *overrides: str,
        kill_after_step: int | None = None,
        terminate_after_step: int | None = None,
        timeout: float = 800,
        new_interpreter: bool = False,
    ) -> FinishedRun:
        log, output = tmp_path / "metrics.jsonl", tmp_path / "output.txt"
        log.unlink(missing_ok=True)
        arguments = [
            "algorithm=hpd",
            *tiny.main_ppo,
            "actor_rollout_ref.actor.optim.lr=1e-2",
            "trainer.logger=[console,file]",
            "trainer.total_training_steps=2",
            "trainer.save_freq=-1",
            f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
            *overrides,
        ]
        variables = {"VERL_FILE_LOGGER_PATH": str(log), "HYDRA_FULL_ERROR": "1"}
        module, whole = "verl.trainer.main_ppo", {**os.environ, **variables}
        if new_interpreter:
            with open(output, "w") as stream:
                command = [sys.executable, "-m", module, *arguments]
                done = subprocess.run(command, cwd=tmp_path, env=whole, stdout=stream, stderr=stream, timeout=timeout)
            return FinishedRun(done.returncode, output.read_text(), read_steps(log))
        process = start_module(processes, module, arguments, tmp_path, output, **variables)
        assert process.pid is not None
        try:
            if kill_after_step is not None:
                _wait_for_step(process, log, kill_after_step, timeout)
                os.killpg(process.pid, signal.SIGKILL)
            elif terminate_after_step is not None:
                _wait_for_step(process, log, terminate_after_step, timeout)
                process.terminate()
            process.join(timeout)
        finally:
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
        assert process.exitcode is not None
        return FinishedRun(process.exitcode, output.read_text(), read_steps(log))

    return run


def read_steps(log: Path) -> list[dict[str, float]]:
    if not log.exists():
        return []
    whole = log.read_text().rpartition("\n")[0]  # a line may be in the middle of being written
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line["data"] for line in lines if "hpd/loss" in line["data"]]


def _wait_for_step(process: ForkServerProcess, log: Path, step: int, timeout: float) -> None:
    """Until so many steps are logged."""
    deadline = time.monotonic() + timeout
    while len(read_steps(log)) < step:
        assert process.exitcode is None, "the run ended before it could be ended"
        assert time.monotonic() < deadline, "no step was logged in time"
        time.sleep(0.05)
