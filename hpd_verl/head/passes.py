"""The two passes over products, compiled or on a few rows at a time."""

import torch
from torch.utils._pytree import tree_map, tree_map_only

from hpd_verl.head.bodies import Biases, Form, Kept, Part, Rows, Sums, read, write
from hpd_verl.head.compiling import NotCompilable, check_traceable, give_up, given_up, run_compiled
from hpd_verl.head.output_head import steps
from hpd_verl.objectives import TokenContext, VocabularyLogProbs


class Passes:
    """``read`` and ``write`` of ``bodies`` for one form.

    Args:
        form: what they are made for.
        biases: of the output layers.
        compiled: by ``torch.compile``. Where an objective cannot be, which is logged once, they run uncompiled.
    """

    def __init__(self, form: Form, biases: Biases, compiled: bool) -> None:
        self.form = form
        self.biases = biases
        self._wanted = compiled

    @property
    def compiled(self) -> bool:
        """Whether passes take any number of rows at once, without memory of their size."""
        return self._wanted and not given_up(self.form)

    def read(self, rows: Rows) -> tuple[Sums, Kept | None]:
        """First pass; what it keeps is for ``write`` of the same rows."""
        if self.compiled:
            try:
                return run_compiled(_read, self.form, rows, self.biases), None
            except NotCompilable as error:
                self._give_up(error)
        few = list(steps(rows.student))
        if len(few) == 1:
            return read(self.form, rows, self.biases)
        parts = [_read(self.form, _of(rows, step), self.biases) for step in few]
        return tree_map(lambda *each: None if each[0] is None else torch.cat(each), *parts), None

    def write(self, rows: Rows, kept: Kept | None) -> None:
        """Second pass."""
        if kept is not None:
            write(self.form, rows, self.biases, kept)
            return
        if self.compiled:
            try:
                run_compiled(write, self.form, rows, self.biases)
                return
            except NotCompilable as error:
                self._give_up(error)
        for step in steps(rows.student):
            write(self.form, _of(rows, step), self.biases)

    def _give_up(self, error: NotCompilable) -> None:
        parts = [part for parts in self.form.parts for part in parts]
        names = dict.fromkeys(part.objective.name for part in [part for part in parts if not _traces(part)] or parts)
        give_up(self.form, f"objective {', '.join(names)}" if names else "objectives over tokens", error)


def _read(form: Form, rows: Rows, biases: Biases) -> Sums:
    return read(form, rows, biases)[0]


def _of(rows: Rows, step: slice) -> Rows:
    return tree_map_only(torch.Tensor, lambda each: each[step], rows)


def _traces(part: Part) -> bool:
    student, teacher = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    example = VocabularyLogProbs(student, teacher, torch.arange(4), row_statistic=torch.zeros(4, 1))
    try:
        context = TokenContext.example(part.objective.needs, torch.ones(4, dtype=torch.bool), student.dtype)
        check_traceable(part.objective.weigh, example, context, **dict(part.arguments))
    except NotCompilable:
        return False
    return True
