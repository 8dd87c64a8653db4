"""The teacher's interface: features of a batch's rows.

``ColocatedTeacher`` runs the model beside the student, ``StoredTeacher`` stores another teacher's features.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from tensordict import TensorDict

from hpd_verl.head.features import TeacherFeatures


class Teacher(ABC):
    """Per-token features of the teacher's distribution. All ranks call its methods together, each with its own rows."""

    @abstractmethod
    def features(self, data: TensorDict, wanted: Sequence[int] | None = None) -> dict[int, TeacherFeatures]:
        """Features of the response tokens of rows.

        Args:
            data: the rows of this rank, with ``fields.SEQUENCE_FIELDS``, and the settings that verl's passes read.
            wanted: indices of the rows whose features are needed, of this rank, perhaps none; None for all. Features of
                others may come with them.

        Returns:
            Row number to features, on the device.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Take now, once, the memory that features will need, before others count what is free."""

    def known_form(self) -> TeacherFeatures | None:
        """Features of no tokens, as ``features`` will give them; None where that is not known yet."""
        return None

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """For the log, since the run began."""
