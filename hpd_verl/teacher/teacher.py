"""The teacher's interface: features of a batch's rows.

``ColocatedTeacher`` runs the model beside the student, ``ServedTeacher`` asks servers, ``StoredTeacher`` stores another
teacher's features, ``CurrentStudent`` and ``AveragedStudent`` are made of the student, ``SeveralTeachers`` share the
rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from tensordict import TensorDict

from hpd_verl.errors import Refused
from hpd_verl.head.features import TeacherFeatures


class TeacherUnavailable(Refused):
    """The teacher gives no features any more. The run ends with a checkpoint, and the same command goes on."""


class Teacher(ABC):
    """Per-token features of the teacher's distribution. All ranks call its methods together, each with its own rows."""

    @abstractmethod
    def features(self, data: TensorDict, wanted: Sequence[int] | None = None) -> dict[int, TeacherFeatures]:
        """Features of the response tokens of rows.

        Args:
            data: the rows of this rank, with ``fields.SEQUENCE_FIELDS``, and the settings that verl's passes read.
            wanted: indices of the rows whose features are needed, of this rank, perhaps none; None for all. Features of
                others may come with them. Under Ulysses each rank of a group wants others of the rows that they have in
                common.

        Returns:
            Row number to features, on the device.

        Raises:
            TeacherUnavailable: on all ranks, where one has none.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Take now, once, the memory that features will need, before others count what is free."""

    def known_form(self) -> TeacherFeatures | None:
        """Features of no tokens, in tensors of any shape, as ``features`` gives them; None while that is unknown."""
        return None

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """For the log, since the run began."""

    def announce(self, data: TensorDict, wanted: Sequence[int] | None = None) -> None:  # noqa: B027
        """Say which rows come next, so that what can be fetched in the background is; arguments as of ``features``.

        No collectives, and nothing is raised: what fails here is done again when the features are asked for. What was
        announced just before is kept, too.
        """

    def follow(self) -> None:  # noqa: B027
        """The student has taken a step: what is made of it moves, too; all ranks together."""

    def save(self, folder: Path) -> None:  # noqa: B027
        """Write what a resumed run needs of the teacher into a checkpoint's folder; all ranks together."""

    def resume(self, folder: Path) -> None:  # noqa: B027
        """Take up, or check, what ``save`` wrote; all ranks together.

        Raises:
            ValueError: the run's teacher was another.
        """
