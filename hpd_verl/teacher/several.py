"""Several teachers, each for its own rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from tensordict import TensorDict

from hpd_verl.data import fields
from hpd_verl.data.response_tokens import column, row_numbers
from hpd_verl.head.features import TeacherFeatures
from hpd_verl.teacher.teacher import Teacher


class SeveralTeachers(Teacher):
    """Features of each row from the teacher that ``fields.TEACHER`` names.

    Args:
        teachers: by name, in the order of ``algorithm.hpd.teachers``.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.teachers = dict(teachers)

    def prepare(self) -> None:
        for teacher in self.teachers.values():
            teacher.prepare()

    def features(self, data: TensorDict, wanted: Sequence[int] | None = None) -> dict[int, TeacherFeatures]:
        numbers = row_numbers(data).tolist()
        found: dict[int, TeacherFeatures] = {}
        for teacher, own in self._shared_out(data, wanted):
            computed = teacher.features(data, own)  # with no rows too: another rank may have some
            found |= {numbers[row]: computed[numbers[row]] for row in own}
        return found

    def known_form(self) -> TeacherFeatures | None:
        """Of the first teacher whose form is known: each has one of its own."""
        forms = (each.known_form() for each in self.teachers.values())
        return next((form for form in forms if form is not None), None)

    def announce(self, data: TensorDict, wanted: Sequence[int] | None = None) -> None:
        for teacher, own in self._shared_out(data, wanted):
            teacher.announce(data, own)

    def _shared_out(self, data: TensorDict, wanted: Sequence[int] | None) -> list[tuple[Teacher, list[int]]]:
        """Each teacher with the rows that are its own."""
        of_row = column(data, fields.TEACHER).tolist()
        rows = range(len(of_row)) if wanted is None else wanted
        return [
            (teacher, [row for row in rows if of_row[row] == place])
            for place, teacher in enumerate(self.teachers.values())
        ]

    def follow(self) -> None:
        for teacher in self.teachers.values():
            teacher.follow()

    def save(self, folder: Path) -> None:
        for name, teacher in self.teachers.items():
            teacher.save(_of(folder, name))

    def resume(self, folder: Path) -> None:
        for name, teacher in self.teachers.items():
            teacher.resume(_of(folder, name))

    def metrics(self) -> dict[str, float]:
        """Those of each, as ``hpd/teachers/NAME/teacher_cache_rows``."""
        found = {}
        for name, teacher in self.teachers.items():
            for metric, value in teacher.metrics().items():
                group, _, rest = metric.partition("/")
                found[f"{group}/teachers/{name}/{rest}"] = value
        return found


def _of(folder: Path, name: str) -> Path:
    """The part of a checkpoint that is one teacher's."""
    return folder / "teachers" / quote(name, safe="")
