"""One of the teachers of ``algorithm.hpd.teachers``."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from hpd_verl.errors import require
from hpd_verl.field_text import first_error, says
from hpd_verl.objectives import ObjectiveParameters
from hpd_verl.teacher_server import addresses, check_no_secrets

NODE = "algorithm.hpd.teachers"
STUDENT = "student"
"""A teacher's path: the student itself."""


class OneTeacher(ObjectiveParameters):
    """``algorithm.hpd.teachers.NAME``."""

    path: str = Field(min_length=1, json_schema_extra=says("give the teacher's folder or hub name, or student"))
    """Its model's folder or hub name, or student; with ``urls``, of the model that the servers run."""

    urls: list[str] = Field([], json_schema_extra=says("give a list of addresses, as [http://host:8000]"))
    """Servers of this teacher, as teacher_server.urls."""

    teacher_cache: Literal["off", "memory", "disk"] | None = Field(
        None, json_schema_extra=says('choose "off" (with quotes in a yaml file), memory or disk')
    )
    """Its store; null: as algorithm.hpd.teacher_cache."""

    @field_validator("urls", mode="after")
    @classmethod
    def _addresses(cls, value: list[str]) -> list[str]:
        return addresses(value)


def teachers_of(node: Any) -> dict[str, OneTeacher] | None:
    """Build from settings by name.

    Raises:
        ValueError: not one teacher a name, or a setting that none has; the message names the setting.
    """
    if node is None:
        return None
    require(
        isinstance(node, Mapping) and bool(node), NODE, node, "give {name: {path: folder or hub name}, ...}, or null"
    )
    found = {}
    for name, values in node.items():
        setting = f"{NODE}.{name}"
        if isinstance(values, OneTeacher):
            found[str(name)] = values
            continue
        require(isinstance(values, Mapping), setting, values, f"give settings by name: {', '.join(_NAMES)}")
        check_no_secrets(f"{setting}.urls", values.get("urls"))
        try:
            found[str(name)] = OneTeacher(**{str(key): value for key, value in values.items()})
        except ValidationError as error:
            if error.errors()[0]["type"] == "missing":
                require(False, f"{setting}.path", None, "give the teacher's folder or hub name, or student")
            raise ValueError(first_error(error, OneTeacher.model_fields, setting)) from None
    return found


_NAMES = tuple(OneTeacher.model_fields)
