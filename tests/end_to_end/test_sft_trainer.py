"""The lean trainer on tiny models, through torchrun."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from answers import by_transformers, by_vllm
from conftest import FinishedRun, RunMainPPO, Tiny, make_awkward_model, make_nan_model, read_steps, run_module
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed import TCPStore
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd_verl.run import stopping
from hpd_verl.teacher.store.disk import DiskStore
from hpd_verl.teacher.store.identity import StoreIdentity
from hpd_verl.tools.export import export

RunSFT = Callable[..., FinishedRun]


@pytest.fixture
def run_sft(tiny: Tiny, tmp_path: Path, processes: ForkServerContext) -> RunSFT:
    """Run ``hpd_verl.sft.trainer``, or another module, on the tiny models, with overrides.

    Each rank is a process of ``processes``, as torchrun starts them; all are killed after so many steps, or once one
    fails. A run that is sent SIGTERM is started by the package's torchrun itself.
    """

    def run(
        *overrides: str,
        ranks: int = 1,
        kill_after_step: int | None = None,
        terminate_after_step: int | None = None,
        module: str = "hpd_verl.sft.trainer",
    ) -> FinishedRun:
        log, output = tmp_path / "metrics.jsonl", tmp_path / "output.txt"
        log.unlink(missing_ok=True)
        output.write_text("")
        arguments = [
            *tiny.sft,
            "optim.lr=1e-2",
            "trainer.logger=[console,file]",
            "trainer.total_training_steps=4",
            "trainer.save_freq=-1",
            f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
            *overrides,
        ]
        environment = {**os.environ, "VERL_FILE_LOGGER_PATH": str(log)}
        if terminate_after_step is not None:
            command = [sys.executable, "-m", "hpd_verl.run.torchrun", "--standalone", f"--nproc_per_node={ranks}"]
            command += ["-m", module, *arguments]
            with open(output, "w") as stream:
                launcher = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=stream, stderr=stream)
            try:
                while len(read_steps(log)) < terminate_after_step and launcher.poll() is None:
                    time.sleep(0.02)
                launcher.terminate()
                launcher.wait(400)
            finally:
                if launcher.poll() is None:
                    for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
                        process.kill()
            return FinishedRun(launcher.wait(), output.read_text(), read_steps(log))

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the ranks are all clients of this store
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        started = []
        for rank in range(ranks):
            of_rank = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(processes.Process(target=run_module, args=(module, arguments, tmp_path, of_rank, output)))
            started[-1].start()
        deadline = time.monotonic() + 800
        try:
            while any(process.exitcode is None for process in started):
                assert time.monotonic() < deadline, output.read_text()[-3000:]
                if any(process.exitcode for process in started):
                    started[0].join(60)  # it speaks for all of them
                    break
                if kill_after_step is not None and len(read_steps(log)) >= kill_after_step:
                    break
                time.sleep(0.02)
        finally:
            for process in started:
                process.kill()
                process.join()
        codes = [process.exitcode or 0 for process in started]
        return FinishedRun(max(codes, key=abs), output.read_text(), read_steps(log))

    return run


def test_ranks_store_and_validation(run_sft: RunSFT, tiny: Tiny, tmp_path: Path) -> None:
    """The validation loss falls; 2 ranks and a full store give what 1 rank without a store gives, counts included.

    So do 2 ranks that share sequences out (Ulysses), which fill the store too.
    With fewer validation rows than a batch has, and an odd number of them. The checkpoint of 2 ranks, exported, is
    verl's own whole model, and vLLM answers with it as transformers does.
    """
    overrides = (
        "trainer.resume_mode=disable",
        f"data.val_files={tiny.validation}",
        "data.val_max_samples=5",
        "data.max_response_length=5",
        "trainer.test_freq=1",
    )
    cache = (
        "algorithm.hpd.teacher_cache=disk",
        f"algorithm.hpd.teacher_cache_dir={tmp_path / 'teacher'}",
        "algorithm.hpd.teacher_cache_dtype=float32",
        "algorithm.hpd.teacher_cache_max_gib=0.01",
    )
    plain = run_sft(*overrides)
    shared_out = "engine.ulysses_sequence_parallel_size=2"
    sharing = run_sft(*overrides, shared_out, ranks=2)
    filling = run_sft(*overrides, *cache, shared_out, module="hpd_verl.sft.fill_store", ranks=2)
    saved = ("trainer.save_freq=4", "checkpoint.save_contents=[model,hf_model]")
    full = run_sft(*overrides, *cache, *saved, ranks=2)
    for run in (plain, sharing, filling, full):
        assert run.returncode == 0, run.output[-3000:]
    assert "distinct rows" in filling.output
    for run in (full, sharing):
        assert len(run.steps) == 4
        assert run.losses() == pytest.approx(plain.losses(), rel=2e-4)
    assert [step["hpd/teacher_is_loaded"] for step in full.steps] == [0, 0, 0, 0]
    validation = [step["val/hpd/reverse_kl_k1"] for step in plain.steps]
    assert validation[-1] < validation[0]
    assert plain.steps[0]["val/hpd/student_nll"] > 0
    for one_rank, two_ranks in zip(plain.steps * 2, full.steps + sharing.steps, strict=True):
        assert 0 < one_rank["hpd/truncated_demonstrations"] < 8
        assert two_ranks["hpd/truncated_demonstrations"] == one_rank["hpd/truncated_demonstrations"]
        validated = {name for name in one_rank if name.startswith("val/")}
        assert "val/hpd/reverse_kl_k1" in validated
        for name in validated:
            assert two_ranks[name] == pytest.approx(one_rank[name], rel=2e-4, abs=1e-6), name

    exported = tmp_path / "exported"
    export(tmp_path / "checkpoints", exported, dtype="fp32")
    verls = tmp_path / "checkpoints" / "global_step_4" / "huggingface"
    whole = AutoModelForCausalLM.from_pretrained(verls, dtype=torch.float32).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(exported).state_dict().items():
        assert torch.equal(tensor, whole[name]), name
    card = (exported / "README.md").read_text()
    for said in (
        str(tiny.student),
        str(tiny.teacher),
        str(tiny.train),
        "| Objective | hpd |",
        "| Training steps | 4 |",
    ):
        assert said in card
    assert by_vllm(exported) == by_transformers(exported)


def test_hybrid_store(run_sft: RunSFT, tmp_path: Path) -> None:
    """Training from a filled store, without the teacher, has the losses of training beside it, bit for bit."""
    form = ("algorithm.hpd.teacher_cache_format=hybrid", "algorithm.hpd.teacher_cache_top_k=4")
    at = (
        "algorithm.hpd.teacher_cache=disk",
        f"algorithm.hpd.teacher_cache_dir={tmp_path / 'teacher'}",
        "algorithm.hpd.teacher_cache_max_gib=0.01",
    )
    mixture = "algorithm.hpd.objective={hpd: 1.0, rkl_exact: 0.5}"
    once = ("trainer.resume_mode=disable", mixture, "trainer.total_training_steps=2")
    beside = run_sft(*once, *form, "algorithm.hpd.teacher_cache=memory")
    filling = run_sft(*form, *at, module="hpd_verl.sft.fill_store")
    alone = run_sft(*once, *form, *at)
    for run in (beside, filling, alone):
        assert run.returncode == 0, run.output[-3000:]
    assert [step["hpd/teacher_is_loaded"] for step in alone.steps] == [0, 0]
    assert [step["hpd/teacher_is_loaded"] for step in beside.steps] == [1, 1]
    assert alone.losses() == beside.losses()
    of_another = run_sft(*once, *at)
    assert of_another.returncode != 0
    assert f"{tmp_path / 'teacher'}: holds features of another teacher or of other settings (dtype" in of_another.output
    assert "Traceback" not in of_another.output


def test_an_adapter_goes_on(run_sft: RunSFT, tiny: Tiny, tmp_path: Path) -> None:
    """On two ranks, with its own scaling, upon a student whose configuration says less than its files.

    To transformers alone, what is saved and exported has the validation loss of the last step. A checkpoint with a
    planted pickle is refused by the next start, and runs nothing.
    """
    own = make_awkward_model(tiny.student, tmp_path / "student")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(own)
    settings = LoraConfig(r=2, lora_alpha=12, use_rslora=True, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(base, settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(tmp_path / "start"))
    overrides = (
        f"model.path={own}",
        f"++model.lora_adapter_path={tmp_path / 'start'}",
        "model.lora_rank=2",
        "model.lora_alpha=12",
        "trainer.save_freq=2",
        f"data.val_files={tiny.validation}",
        "data.val_max_samples=5",
        "trainer.test_freq=4",
        "engine.dtype=float32",
        "checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        "checkpoint.load_contents=[model,optimizer,extra]",
    )
    run = run_sft(*overrides, ranks=2)
    assert run.returncode == 0, run.output[-3000:]
    root = tmp_path / "checkpoints"
    assert run.output.count("its log-probs are the trained model's") == 1, "of the first checkpoint alone"
    for lora in ("merge", "adapter"):
        said = export(root / "global_step_4", tmp_path / lora, dtype="fp32", lora=lora)
        assert "its log-probs are the trained model's" in said
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(own), str(tmp_path / "adapter"))
    for folder in (None, root / "global_step_4" / "huggingface", tmp_path / "merge"):
        rows = student_nlls(tiny, 5, AutoModelForCausalLM.from_pretrained(folder) if folder else adapted)
        mean = sum(map(sum, rows)) / sum(map(len, rows))
        assert run.steps[-1]["val/hpd/student_nll"] == pytest.approx(mean, rel=1e-5)

    planted = root / "global_step_4" / "optim_world_size_2_rank_0.pt"
    torch.save({"state": Planted(tmp_path / "ran")}, planted)
    refused = run_sft(*overrides, ranks=2)
    assert refused.returncode != 0
    line = f"Error: trainer.default_local_dir={root}: global_step_4: {planted.name} holds code, not only data"
    assert line in refused.output, refused.output[-3000:]
    assert not (tmp_path / "ran").exists()


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.file),)


def student_nlls(tiny: Tiny, rows: int, model: Any) -> list[list[float]]:
    """Negative log-likelihoods of the response tokens of the first validation rows, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.student)
    found = []
    for row in pd.read_parquet(tiny.validation).to_dict("records")[:rows]:
        prompt = tokenizer.apply_chat_template(list(row["prompt"]), tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        ids = torch.tensor([*prompt_ids, *tokenizer.encode(row["demonstration"]), tokenizer.eos_token_id])
        with torch.no_grad():
            log_probs = model(ids.unsqueeze(0)).logits[0].log_softmax(-1)
        found.append([-log_probs[t - 1, ids[t]].item() for t in range(len(prompt_ids), len(ids))])
    return found


def test_validation_counts_every_row_once(
    run_sft: RunSFT, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 rows: the same figures on 1 and 2 ranks, for any batch size, packed or not, and with each aggregation."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    rows = student_nlls(tiny, 5, AutoModelForCausalLM.from_pretrained(tiny.student))
    sums = [sum(row) for row in rows]
    tokens = sum(map(len, rows))
    expected = {
        "token-mean": sum(sums) / tokens,
        "token-sum": sum(sums),
        "seq-mean-token-sum": sum(sums) / 5,
        "seq-mean-token-sum-norm": sum(sums) / 5 / 16,  # data.max_response_length
        "seq-mean-token-mean": sum(sum(row) / len(row) for row in rows) / 5,
    }
    assert len({len(row) for row in rows}) > 1, "rows of one length would not tell the aggregations apart"
    orders = []
    for ranks in (1, 2):
        run = run_sft(
            "trainer.resume_mode=disable",
            "algorithm.hpd.objective=sft",
            f"data.val_files={tiny.validation}",
            "data.val_max_samples=5",
            "data.micro_batch_size_per_gpu=2",
            ranks=ranks,
            module="validate",
        )
        assert run.returncode == 0, run.output[-3000:]
        found = json.loads(run.output.split("RESULT ")[1].splitlines()[0])
        orders.append([found.pop("order 1"), found.pop("order 2")])
        assert len(found) == 20
        for name, metrics in found.items():
            assert metrics["val/hpd/loss"] == pytest.approx(expected[name.split(",")[0]], rel=1e-5), (ranks, name)
            assert metrics["val/hpd/student_nll"] == pytest.approx(expected["token-mean"], rel=1e-5), (ranks, name)
    for first, second in orders:
        assert first != second, "data.seed does not change the order of the rows"
    assert [orders[1][0], orders[0][0][::2]] == [orders[0][0][::2]] * 2


def test_killed_run_resumes_to_the_same_losses(
    run_sft: RunSFT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL some steps after a checkpoint, and again between the files of the third and its marker, then SIGTERM.

    With room for one checkpoint. The same command goes on from the last whole one each time, after SIGTERM from the
    step that was under way, and the losses of the steps that two runs have in common are the same, exactly.
    """
    overrides = ("trainer.total_training_steps=60", "trainer.save_freq=20", "trainer.max_ckpt_to_keep=1")
    killed = run_sft(*overrides, kill_after_step=23)
    assert killed.returncode != 0
    root = tmp_path / "checkpoints"
    (root / "global_step_90").mkdir(parents=True)  # torn
    (root / "latest_checkpointed_iteration.txt").write_text("90")

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    monkeypatch.setenv("KILLED_AT", "global_step_60/complete.tmp")
    killed_again = run_sft(*overrides, module="killed_at")
    assert killed_again.returncode != 0
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "60"
    stopped = run_sft(*overrides, terminate_after_step=3)
    assert stopped.returncode == stopping.EXIT_CODE, stopped.output[-3000:]
    last = int(stopped.steps[-1]["training/global_step"])
    assert 43 <= last < 57
    assert f"Stopped by SIGTERM after step {last} of 60: {root}/global_step_{last}, exit code 75" in stopped.output
    assert [marker.parent.name for marker in root.glob("*/complete")] == [f"global_step_{last}"]
    resumed = run_sft(*overrides)
    assert resumed.returncode == 0, resumed.output[-3000:]
    pairs = ((killed, killed_again, 21), (killed_again, stopped, 41), (killed_again, resumed, last + 1))
    for earlier, later, first in pairs:
        assert int(later.steps[0]["training/global_step"]) == first
        start = first - int(earlier.steps[0]["training/global_step"])
        again = earlier.losses()[start:]
        shared = min(len(again), len(later.steps))
        assert shared >= 3
        assert later.losses()[:shared] == again[:shared]
    assert int(resumed.steps[-1]["training/global_step"]) == 60
    assert [marker.parent.name for marker in root.glob("*/complete")] == ["global_step_60"]


def test_same_first_loss_as_main_ppo(run_sft: RunSFT, run_main_ppo: RunMainPPO, tiny: Tiny, tmp_path: Path) -> None:
    """All rows, SFT's objective, no teacher: both trainers see the same tokens and give the same loss and gradient."""
    settings = ("data.train_batch_size=64", "algorithm.hpd.objective=sft", "trainer.total_training_steps=1")
    lean = run_sft(*settings, "trainer.resume_mode=disable", "teacher.model.path=null")
    assert lean.returncode == 0, lean.output[-3000:]
    full = run_main_ppo(*settings, "trainer.resume_mode=disable", "actor_rollout_ref.ref.model.path=null")
    assert full.returncode == 0, full.output[-3000:]
    for name in ("hpd/loss", "actor/grad_norm", "hpd/response_tokens"):
        assert lean.steps[0][name] == pytest.approx(full.steps[0][name], rel=2e-4), name


def test_bad_settings(run_sft: RunSFT) -> None:
    """One line of one rank, before anything loads; test_check_*.py have all that is refused."""
    run = run_sft("teacher.model.path=/nowhere", ranks=2)
    assert run.returncode != 0
    errors = [line for line in run.output.splitlines() if line.startswith("Error")]
    assert errors == ["Error: teacher.model.path=/nowhere: no such folder; give an existing folder, or a hub name"]
    assert run.steps == []


def test_bad_store(run_sft: RunSFT, tmp_path: Path) -> None:
    """A store that cannot be used: one error before a step; test_teacher_store.py has all."""
    folder, file = tmp_path / "teacher", tmp_path / "file"
    other = StoreIdentity(teacher="0" * 64, temperature=1.0, vocabulary_size=36, format="hidden", dtype="bf16", top_k=0)
    DiskStore(folder, other, 1 << 20).close()
    file.touch()
    another_teacher = f"teacher_cache_dir={folder}: holds features of another teacher or of other settings (teacher"
    for place, message in ((folder, another_teacher), (file, f"{file} is not a folder; choose another place for the")):
        run = run_sft(
            "algorithm.hpd.teacher_cache=disk",
            "algorithm.hpd.teacher_cache_max_gib=0.01",
            f"algorithm.hpd.teacher_cache_dir={place}",
        )
        assert run.returncode != 0
        assert message in run.output, run.output[-3000:]
        assert "Traceback" not in run.output
        assert run.steps == []


def test_nan_logits_stop_the_run(run_sft: RunSFT, tiny: Tiny, tmp_path: Path) -> None:
    """A student with NaN logits: one error with step and rows, and no checkpoint."""
    broken = make_nan_model(tiny.student, tmp_path / "broken")
    run = run_sft(f"model.path={broken}", "trainer.save_freq=1")
    assert run.returncode != 0
    assert "step 1: NaN in the student's logits" in run.output
    assert not (tmp_path / "checkpoints").exists()
