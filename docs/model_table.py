"""Writes the table of docs/models.md from trials of tiny models of every family.

    python docs/model_table.py

tests/checks/test_row_layouts.py fails where the page is not what is found.
"""

import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from families import FAMILIES, LONGEST, tiny_config  # noqa: E402

from hpd_verl.engine.causal_lm import check_head, check_one_pass, offer_head  # noqa: E402
from hpd_verl.engine.on_meta import build  # noqa: E402
from hpd_verl.engine.replica import Replica  # noqa: E402
from hpd_verl.engine.row_layout import RowLayout, Tried, default_attentions, layouts, try_layouts  # noqa: E402
from hpd_verl.errors import Refused  # noqa: E402

START, END = "<!-- Written by docs/model_table.py -->", "<!-- end -->"


def _why(tried: Tried) -> str:
    reason = next(iter(tried.wrong.values()), "")
    if not reason:
        return "rows do not affect each other"
    if "off by" in reason:
        return "packed rows affect each other: state, chunks or positions"
    return "its code supports no other attention"


def table() -> str:
    """The rows, grouped by what is chosen and why."""
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    candidates = list(layouts(default_attentions(False), None))
    for family in FAMILIES:
        tried = try_layouts(tiny_config(family), candidates, LONGEST)
        right: RowLayout | None = tried.right
        if right is None:
            groups[
                "one row", "-", "padded rows affect each other too: rejected unless each micro-batch has one row"
            ].append(family)
        else:
            groups["packed" if right.packed else "padded", f"`{right.attention}`", _why(tried)].append(family)
    lines = ["| rows | attention | model types | why |", "|---|---|---|---|"]
    for (rows, attention, why), names in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {rows} | {attention} | {', '.join(f'`{name}`' for name in names)} | {why} |")
    return "\n".join(lines)


def refused() -> str:
    """A line a reason, of families that the trainers refuse for something else."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for family in FAMILIES:
        config = tiny_config(family)
        if not build(config).supports_gradient_checkpointing:
            reasons["`enable_gradient_checkpointing` is not supported: set it to false"].append(family)
        try:
            check_one_pass(model := Replica(config, LONGEST).model("eager"))
            offer_head(model)
            check_head(model)
        except Refused:
            reasons[
                "one pass does not support its output layer: use main_ppo with `algorithm.hpd.pipeline=staged`"
            ].append(family)
    return "\n".join(f"- {', '.join(f'`{name}`' for name in names)}: {reason}." for reason, names in reasons.items())


def main() -> None:
    page = ROOT / "docs" / "models.md"
    text = page.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    page.write_text(f"{before}{START}\n{table()}\n\nRejected for other reasons:\n\n{refused()}\n{END}{after}")


if __name__ == "__main__":
    main()
