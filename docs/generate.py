"""Writes docs/settings.md and docs/objectives.md from the declarations in the code.

    python docs/generate.py

A test fails where they are not what this writes.
"""

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hpd_verl.config import HPDConfig  # noqa: E402
from hpd_verl.field_text import allowed  # noqa: E402
from hpd_verl.objectives import OBJECTIVES, Objective  # noqa: E402
from hpd_verl.objectives.token import HPDParameters  # noqa: E402
from hpd_verl.teacher_server import TeacherServer  # noqa: E402

GENERATED = "<!-- Written by docs/generate.py: change the declarations in the code instead. -->"

SECTIONS: dict[str, list[str]] = {
    "What is optimised": ["objective", "on_policy_objective", *HPDParameters.model_fields],
    "Sampling and temperature": ["temperature", "teacher_temperature", "seed"],
    "Demonstrations and rollouts": [
        "on_policy_fraction",
        "rollouts_per_prompt",
        "missing_demonstration",
        "overlong_demonstration",
        "score_rollouts",
    ],
    "Computation": ["pipeline", "token_chunk_size", "exact_kl_metrics"],
    "Checkpoints": ["check_saved_model"],
    "The teacher": ["teachers", "teacher_key", "teacher_ema"],
    "The teacher's store": [name for name in HPDConfig.model_fields if name.startswith("teacher_cache")],
}
SEE = {"The teacher": "See [teachers](teachers.md), also for `data.teacher_prompt_key` and its siblings.\n\n"}
NOT_SETTINGS = {"objective_parameters", "teacher_server"}

SETTINGS = """# Settings

All are under `algorithm.hpd`, the same in main_ppo and the lean trainer (`configs/settings/hpd.yaml`). Parameters of
single objectives: [objectives.md](objectives.md). Defaults for verl's own keys: `configs/algorithm/hpd.yaml` and
`configs/sft_trainer.yaml`.

    python -m verl.trainer.main_ppo algorithm=hpd algorithm.hpd.temperature=2 \\
        'algorithm.hpd.objective={hpd: 1.0, sft: 0.1}' \\
        'algorithm.hpd.on_policy_fraction={start: 0, end: 1, steps: 100}' \\
        actor_rollout_ref.model.path=STUDENT actor_rollout_ref.ref.model.path=TEACHER data.train_files=train.parquet
"""

REPRODUCIBLE = """## Reproducibility

Two runs of one command on one machine give equal numbers; `seed` sets all random draws. Exceptions:

- vLLM seeds each answer, but the last bits of log-probs depend on the requests in a batch. A token may differ, rarely
  in float32, more often in bfloat16. `VLLM_BATCH_INVARIANT=1` prevents this on some GPUs and costs speed.
- sglang: rollouts have no seed.
- Nondeterministic GPU kernels: set `actor_rollout_ref.actor.fsdp_config.full_determinism=true` (lean trainer:
  `engine.full_determinism=true`).
"""

OBJECTIVES_PAGE = """# Objectives

`algorithm.hpd.objective` applies to demonstrations, `algorithm.hpd.on_policy_objective` to rollouts (default: the
same). Each is a name or a mixture; a mixture sums the objectives' gradients with factors, in one pass.

    algorithm.hpd.objective=fkl
    'algorithm.hpd.objective={hpd: 1.0, sft: 0.1}'
    algorithm.hpd.objective=skew_fkl algorithm.hpd.skew_fkl.skew=0.2
    algorithm.hpd.objective=path/file.py:my_objective     # or package.module:my_objective

Which one: [choosing.md](choosing.md). Your own: [CONTRIBUTING.md](../CONTRIBUTING.md#add-an-objective).

An objective weighs the student's log-likelihood: `loss = -sum w log q`, with detached weights; your own may return a
loss instead. `q` is the student, `p` the teacher, `y` the label, `a` the token that the student samples,
`gap(v) = q(v) (log p(v) - log q(v))`.

Parameters are `algorithm.hpd.<name>.<parameter>`, for `hpd` and `hpd_exact` `algorithm.hpd.<parameter>`. Parameters of
objectives not in use are rejected.

| | over tokens | over the vocabulary |
|---|---|---|
| weights | the label, for `hpd` also the sampled token | every token; nothing is sampled |
| teacher cost | forward and one dot product per token | forward and a product with its output layer |
| pipelines | one pass; staged, with several updates per batch | one pass |
| teacher's own temperature | no | `algorithm.hpd.teacher_temperature` |

Objectives that need more than log-probs (the step, a row's reward, ...) run in one pass; what each need costs and where
it works: [CONTRIBUTING.md](../CONTRIBUTING.md#add-an-objective).

Values and gradients agree with the authors' published code to 1e-13, except `akl` (see its entry) and those that follow
their papers' formulas: `symmetric_kl`, `tvd`, `power_opd`, `constant_negative`, `vopd`, `entropy_aware`, `top_k_tail`
and `taid`.
"""


def _text(description: str | None) -> str:
    return " ".join((description or "").replace("``", "`").replace("|", "\\|").split())


def _default(field: FieldInfo) -> str:
    return json.dumps(field.default)


def _row(name: str, field: FieldInfo) -> str:
    described: Mapping[str, Any] = field.json_schema_extra if isinstance(field.json_schema_extra, Mapping) else {}
    if name in ("objective", "on_policy_objective"):
        what = "name, module:name, file.py:name or {name: factor, ...}"
    else:
        what = str(described.get("remedy") or allowed(field))
    what = what.removeprefix("give ").removeprefix("choose ")
    return f"| `{name}` | `{_default(field)}` | {what} | {_text(field.description)} |"


def _table(fields: Mapping[str, FieldInfo]) -> str:
    rows = [_row(name, field) for name, field in fields.items()]
    return "\n".join(["| setting | default | values | |", "|---|---|---|---|", *rows])


def settings_page() -> str:
    """docs/settings.md."""
    fields = HPDConfig.model_fields
    listed = {name for names in SECTIONS.values() for name in names}
    missing = fields.keys() - listed - NOT_SETTINGS
    if missing:
        raise SystemExit(f"docs/generate.py: {', '.join(missing)} in no section")
    parts = [SETTINGS, GENERATED]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n\n{SEE.get(title, '')}{_table({name: fields[name] for name in names})}")
    served = {f"teacher_server.{name}": field for name, field in TeacherServer.model_fields.items()}
    parts.append(f"## A served teacher\n\nSee [served](served.md).\n\n{_table(served)}")
    parts.append(REPRODUCIBLE)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _objective(each: Objective) -> str:
    lines = [line.strip() for line in inspect.cleandoc(each.function.__doc__ or "").split("Args:")[0].splitlines()]
    properties = [
        "" if each.needs_teacher else "needs no teacher",
        "weighs the sampled token" if each.weighs_sample else "",
        "for the student's own rollouts only" if each.needs_rollouts else "",
        "its weights do not depend on the student" if each.is_likelihood else "",
        f"needs {', '.join(sorted(each.needs))}" if each.needs else "",
    ]
    parts = [f"### {each.name}", "\n".join(lines).strip()]
    facts = [text for text in properties if text]
    parts.append(f"*{'; '.join([f'Source: {each.source}', *facts])}.*")
    parameters = each.parameters.model_fields
    _, _, more = inspect.cleandoc(each.parameters.__doc__ or "").partition(". ")
    parts += [_text(more)] if more and each.has_own_node and parameters else []
    if each.has_own_node and parameters:
        parts.append(_table({f"{each.name}.{name}": field for name, field in parameters.items()}))
    elif parameters:
        parts.append(f"Parameters: {', '.join(f'`{name}`' for name in parameters)} ([settings](settings.md)).")
    return "\n\n".join(parts)


def _overview() -> str:
    """A table of all objectives."""
    rows = ["| objective | over | teacher | rows | sampled token | needs |", "|---|---|---|---|---|---|"]
    for each in OBJECTIVES.values():
        cells = [
            f"[{each.name}](#{each.name})",
            "tokens" if each.over == "token" else "vocabulary",
            "yes" if each.needs_teacher else "no",
            "rollouts" if each.needs_rollouts else "all",
            "yes" if each.weighs_sample else "no",
            ", ".join(f"`{need}`" for need in sorted(each.needs)),
        ]
        rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(rows)


def objectives_page() -> str:
    """docs/objectives.md."""
    parts = [OBJECTIVES_PAGE, GENERATED, "## Overview", _overview()]
    for title, over in (("Over tokens", "token"), ("Over the vocabulary", "vocabulary")):
        parts.append(f"## {title}")
        parts += [_objective(each) for each in OBJECTIVES.values() if each.over == over]
    return "\n\n".join(part.strip() for part in parts) + "\n"


PAGES = {"settings.md": settings_page, "objectives.md": objectives_page}


def main() -> None:
    for name, make in PAGES.items():
        (ROOT / "docs" / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
