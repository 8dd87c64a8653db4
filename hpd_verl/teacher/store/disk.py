"""A store of the teacher's features in a folder that all ranks and later runs share.

    store.json                 what the records are features of, and the version of this format
    output_head.safetensors    optional: the teacher's output head, which turns hidden states into logits
    teacher_files.json         optional: hashes of the teacher's files, so that they need not be read again
    part-X.data, part-X.index  records of one writer: raw little-endian values, and one entry of fixed size a record

A part is only appended to, only by the process that created it, and data before their entry. A writer killed at any
byte leaves a part whose entries are all whole but perhaps the last. Entries and payloads have checksums, verified at
every read (0.3 s a GiB on one core of an AMD EPYC): what is torn or damaged is never returned, its row merely counts as
missing. Nor is what is NaN or infinite, which is not stored at all.

store.json appears whole and once: of two runs that open a new folder at the same time with different teachers, the
second finds the first's and is refused. The output head carries the identity too.
"""

import errno
import json
import os
import re
import secrets
import shutil
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpd_verl.errors import Refused, require
from hpd_verl.head.hybrid_code import token_bytes
from hpd_verl.teacher.store.identity import StoreIdentity, teacher_identity
from hpd_verl.teacher.store.records import Record, Schema, output_head_hash
from hpd_verl.teacher.store.store import DIR_SETTING, GIB, LIMIT_SETTING, StoreStats, TeacherStore

FORMAT_VERSION = 2
"""Records are bytes in a fixed order, without names."""

_ENTRY = struct.Struct("<32sQQIIII")
"""Index entry: key, payload's offset and length, T, width, crc32 of the payload, crc32 of the entry before it."""
_ENTRY_CRC = struct.Struct("<I")


@dataclass(slots=True)
class _Entry:
    """Where a record is."""

    part: str
    offset: int
    length: int
    tokens: int
    width: int
    crc: int


def estimate_bytes(
    *,
    format: str,
    dtype: str,
    top_k: int,
    bits: int,
    hidden_size: int,
    vocabulary_size: int,
    rows: int,
    tokens: int,
) -> int:
    """Size of a store on the disk, its output head left out.

    Args:
        format, dtype, top_k, bits: as of ``teacher_identity``.
        hidden_size, vocabulary_size: of the teacher.
        rows: how many rows.
        tokens: response tokens of all rows together.
    """
    identity = teacher_identity(
        "", "", temperature=1.0, vocabulary_size=vocabulary_size, format=format, dtype=dtype, top_k=top_k, bits=bits
    )
    width = {
        "hidden": hidden_size,
        "topk": identity.top_k,
        "hybrid": token_bytes(hidden_size, vocabulary_size, top_k, bits),
    }[format]
    return rows * _ENTRY.size + Schema(identity).size(tokens, width)


def check_space(folder: Path, max_bytes: int) -> None:
    """Check that the disk of a store has room for what the store may still grow by.

    Args:
        folder: the store's, which need not be there.
        max_bytes: limit of all its parts together.

    Raises:
        Refused: it has not.
    """
    folder = folder.absolute()
    more = max_bytes - sum(file.stat().st_size for file in folder.glob("part-*"))
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    require(
        free >= more,
        LIMIT_SETTING,
        f"{max_bytes / GIB:g}",
        f"lets {DIR_SETTING}={folder} grow by {more / GIB:.3g} GiB, but its disk has {free / GIB:.3g} GiB free; lower "
        "the limit, or give a folder on another disk",
    )


class _Part:
    """The part that this process writes."""

    def __init__(self, folder: Path) -> None:
        self.name = f"part-{secrets.token_hex(8)}"
        self.offset = 0
        self._data = open(folder / f"{self.name}.data", "xb", buffering=0)  # noqa: SIM115 (closed by the store)
        self._index = open(folder / f"{self.name}.index", "xb", buffering=0)  # noqa: SIM115

    def append(self, key: bytes, payload: bytes, tokens: int, width: int) -> _Entry:
        entry = _Entry(self.name, self.offset, len(payload), tokens, width, zlib.crc32(payload))
        fields = (key, entry.offset, entry.length, tokens, width, entry.crc)
        head = _ENTRY.pack(*fields, 0)[: -_ENTRY_CRC.size]
        _write(self._data.fileno(), payload)
        _write(self._index.fileno(), head + _ENTRY_CRC.pack(zlib.crc32(head)))
        self.offset += entry.length
        return entry

    def close(self) -> None:
        self._data.close()
        self._index.close()


def _read_whole(file: Path) -> str:
    """The text of a file that ends with a line break, or what there is of it after a moment."""
    for _ in range(5):
        text = file.read_text()
        if text.endswith("\n"):
            break
        time.sleep(0.05)  # another process is writing it, on a file system without links
    return text


def _write(file: int, data: bytes) -> None:
    """Write all of ``data``; one call to the system may write less."""
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _read(file: int, offset: int, length: int) -> bytearray | None:
    """``length`` bytes, or None if the file ends before."""
    data = bytearray(length)
    done = 0
    while done < length:
        read = os.preadv(file, [memoryview(data)[done:]], offset + done)
        if not read:
            return None
        done += read
    return data


class DiskStore(TeacherStore):
    """Records in a folder, shared by ranks and runs.

    Other processes' new records are seen when a key is not known, or by ``refresh``. A key stored by two processes at
    once costs its space twice.

    Args:
        folder: made if it is not there.
        identity: of the features.
        max_bytes: limit of all parts together, as last seen: several ranks may exceed it by what they write between
            two refreshes. The output head does not count.

    Raises:
        ValueError: the folder cannot be written to, holds something else, or its disk is too small for the limit.
    """

    def __init__(self, folder: Path, identity: StoreIdentity, max_bytes: int) -> None:
        super().__init__(identity, max_bytes)
        self.folder = folder
        self._entries: dict[bytes, list[_Entry]] = {}
        self._sizes: dict[str, int] = {}  # of each file of a part
        self._index_read: dict[str, int] = {}  # bytes of each index that are in _entries
        self._part: _Part | None = None
        self._open_folder()
        self.refresh()
        check_space(self.folder, self.max_bytes)

    # Opening

    def _error(self, found: str, remedy: str) -> Refused:
        return Refused(f"{DIR_SETTING}={self.folder}: {found}; {remedy}")

    def _open_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f"probe-{secrets.token_hex(8)}"
            probe.touch(exist_ok=False)
            probe.unlink()
        except OSError as error:
            remedy = "give a folder that every rank can create and write to"
            raise self._error(f"cannot be written to ({error.strerror})", remedy) from error
        file = self.folder / "store.json"
        used = any(self.folder.glob("part-*"))  # looked at first: another rank writes store.json before its part
        if not file.exists():
            if used:
                remedy = "give another folder, or delete this one"
                raise self._error("holds stored features but no store.json that says of what", remedy)
            self._create(
                file,
                json.dumps({"format_version": FORMAT_VERSION, "identity": asdict(self.identity)}, indent=2) + "\n",
            )
        self._check_identity(file)

    def _create(self, file: Path, text: str) -> None:
        """Make a file, unless another process does first; it appears with its whole text, or not at all."""
        temporary = file.with_name(f"{file.name}.{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "x") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(temporary, file)
            except FileExistsError:
                pass
            except OSError:  # a file system without links: there, a crash within the next line leaves half a file
                with suppress(FileExistsError), open(file, "x") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
        except OSError as error:
            raise self._write_error(error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _check_identity(self, file: Path) -> None:
        try:
            content = json.loads(_read_whole(file))
            version, stored = content["format_version"], dict(content["identity"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            remedy = "give another folder, or delete this one"
            raise self._error(f"its store.json cannot be read ({error!r})", remedy) from error
        if version != FORMAT_VERSION:
            raise self._error(
                f"holds features in format version {version}, and this hpd-verl reads version {FORMAT_VERSION}",
                "give another folder, or use the hpd-verl that wrote it",
            )
        own = asdict(self.identity)
        differing = [
            f"{name}: stored {stored.get(name)}, this run {own.get(name)}"
            for name in sorted(own.keys() | stored.keys())
            if own.get(name) != stored.get(name)
        ]
        if differing:
            raise self._error(
                f"holds features of another teacher or of other settings ({'; '.join(differing)})",
                "give each its own folder, or delete this one",
            )

    @contextmanager
    def _replacing(self, file: Path) -> Iterator[Path]:
        """A temporary file that takes the place of ``file`` once it is written and on the disk."""
        temporary = file.with_name(f"{file.name}.{secrets.token_hex(8)}.tmp")
        try:
            yield temporary
            with open(temporary, "rb+") as stream:
                os.fsync(stream.fileno())
            temporary.replace(file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._write_error(error) from error

    def _lost(self, error: OSError) -> OSError:
        found = f"cannot be read any more ({error.strerror or error})" if self.folder.is_dir() else "is gone"
        return OSError(
            f"{DIR_SETTING}={self.folder}: it was there at the start and {found}; give a folder that stays, and start "
            "again: training resumes from its last checkpoint"
        )

    def _write_error(self, error: OSError) -> OSError:
        if not self.folder.is_dir():
            return self._lost(error)
        remedy = (
            f"free some, lower {LIMIT_SETTING}, or give another folder"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            else "give a folder that stays writable"
        )
        return OSError(
            f"{DIR_SETTING}={self.folder}: writing failed after {self._stored / GIB:.3g} GiB were stored "
            f"({error.strerror or error}); {remedy}"
        )

    # Records

    @property
    def _stored(self) -> int:
        return sum(self._sizes.values())

    def refresh(self) -> None:
        """Take in what other processes have stored: one ``stat`` a file, and the new end of each index.

        Raises:
            OSError: the folder is gone or cannot be read; the message names the setting.
        """
        sizes = {}
        try:
            for file in os.scandir(self.folder):
                if re.fullmatch(r"part-\w+\.(data|index)", file.name):
                    with suppress(FileNotFoundError):
                        sizes[file.name] = file.stat().st_size
        except OSError as error:
            raise self._lost(error) from error
        self._sizes = sizes
        if self._part is not None and f"{self._part.name}.data" not in sizes:
            self.close()  # removed: what is written to it now, nobody will find
        for name, size in sizes.items():
            if name.endswith(".index") and size - self._index_read.get(name, 0) >= _ENTRY.size:
                self._read_index(name)

    def _read_index(self, name: str) -> None:
        """Take in an index's whole new entries."""
        part, start = name.removesuffix(".index"), self._index_read.get(name, 0)
        try:
            with open(self.folder / name, "rb", buffering=0) as stream:
                stream.seek(start)
                tail = stream.read()
            data_size = os.stat(self.folder / f"{part}.data").st_size  # taken last: data are written before entries
        except FileNotFoundError:
            return
        tail = tail[: len(tail) // _ENTRY.size * _ENTRY.size]
        self._index_read[name] = start + len(tail)
        for position in range(0, len(tail), _ENTRY.size):
            key, offset, length, tokens, width, crc, entry_crc = _ENTRY.unpack_from(tail, position)
            whole = entry_crc == zlib.crc32(tail[position : position + _ENTRY.size - _ENTRY_CRC.size])
            if whole and offset + length <= data_size and length == self.schema.size(tokens, width):
                self._entries.setdefault(key, []).append(_Entry(part, offset, length, tokens, width, crc))

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        if any(key not in self._entries for key in keys):
            self.refresh()
        return [key for key in keys if key not in self._entries]

    def get(self, keys: Sequence[bytes]) -> list[Record | None]:
        self.missing(keys)
        with _OpenFiles(self.folder) as files:
            return self._count([self._load(key, files) for key in keys])

    def _load(self, key: bytes, files: "_OpenFiles") -> Record | None:
        entries = self._entries.get(key, [])
        while entries:
            payload = self._payload(entries[0], files)
            if payload is not None:
                return self.schema.unpack(payload, entries[0].tokens, entries[0].width)
            self._damaged += 1
            entries.pop(0)
        self._entries.pop(key, None)
        return None

    def _payload(self, entry: _Entry, files: "_OpenFiles") -> bytearray | None:
        """Its bytes, or None if it is not what was written."""
        try:
            payload = _read(files.open(f"{entry.part}.data"), entry.offset, entry.length)
        except FileNotFoundError:
            return None
        return payload if payload is not None and zlib.crc32(payload) == entry.crc else None

    def put(self, key: bytes, record: Record) -> None:
        """Store a copy of a record, unless its key is known, a value is NaN or infinite, or the store is full.

        Raises:
            ValueError: the tensors are not those of the store's format.
            OSError: writing failed, for example because the disk is full; the message names the setting.
        """
        assert len(key) == 32, "a key is 32 bytes: row_key"
        tokens, width = self.schema.check(record)
        size = self.schema.size(tokens, width)
        if key in self._entries or not self._is_finite(record) or not self._fits(self._stored, size + _ENTRY.size):
            return
        try:
            self._part = self._part or _Part(self.folder)
            entry = self._part.append(key, self.schema.pack(record), tokens, width)
        except OSError as error:
            self.close()  # a part with a torn end is never appended to
            raise self._write_error(error) from error
        self._entries[key] = [entry]
        index = f"{entry.part}.index"
        self._index_read[index] = self._index_read.get(index, 0) + _ENTRY.size
        self._sizes[index] = self._index_read[index]
        self._sizes[f"{entry.part}.data"] = self._part.offset

    def close(self) -> None:
        """End this process's part; a later ``put`` begins another."""
        if self._part is not None:
            self._part.close()
            self._part = None

    @property
    def stats(self) -> StoreStats:
        return self._make_stats(len(self._entries), self._stored)

    # Output head

    @property
    def _head_file(self) -> Path:
        return self.folder / "output_head.safetensors"

    def save_output_head(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Store the teacher's output head, if it is not there yet.

        Args:
            weight: floating [V, d].
            bias: floating [V], where the head has one.

        Raises:
            ValueError: another head is stored.
            OSError: writing failed; the message names the setting.
        """
        if self._head_file.exists():
            self.check_output_head(weight, bias)
            return
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"output_head_hash": output_head_hash(weight, bias), "identity": self.identity.digest}
        with self._replacing(self._head_file) as temporary:
            try:
                save_file(tensors, temporary, metadata=metadata)
            except SafetensorError as error:
                raise OSError(str(error)) from error

    def load_output_head(self) -> tuple[Tensor, Tensor | None] | None:
        """The stored output head, ``(weight [V, d], bias [V] or None)``; None if none is stored.

        Raises:
            ValueError: the file is damaged, or not this identity's.
        """
        if not self._head_file.exists():
            return None
        found, cause = "its output_head.safetensors is damaged", None
        metadata: dict[str, str] = {}
        try:
            with safe_open(self._head_file, framework="pt") as file:
                tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except SafetensorError as error:
            tensors, cause = {}, error
        weight, bias = tensors.get("weight"), tensors.get("bias")
        if weight is not None and metadata.get("identity") != self.identity.digest:
            raise self._error(
                "its output_head.safetensors is of another teacher or of other settings",
                "delete that file: it is written again from the teacher",
            )
        if weight is None or metadata.get("output_head_hash") != output_head_hash(weight, bias):
            raise self._error(found, "delete that file: it is written again from the teacher") from cause
        return weight, bias

    def check_output_head(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Check that the stored output head, if there is one, is the given teacher's.

        Raises:
            ValueError: it is not, or the file is damaged.
        """
        stored = self.load_output_head()
        if stored is None:
            return
        stored_hash, given_hash = output_head_hash(*stored), output_head_hash(weight, bias)
        if stored_hash != given_hash:
            raise self._error(
                f"its output head is not the teacher's (sha256 stored {stored_hash}, teacher {given_hash})",
                "give another folder, or delete this one",
            )


class _OpenFiles:
    """Files of a folder, each opened once and closed at the end: with many parts, none is held open for long."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, int] = {}
        self._stack = ExitStack()

    def open(self, name: str) -> int:
        """A file descriptor.

        Raises:
            FileNotFoundError: the file is gone.
        """
        if name not in self._files:
            self._files[name] = os.open(self._folder / name, os.O_RDONLY)
            self._stack.callback(os.close, self._files[name])
        return self._files[name]

    def __enter__(self) -> "_OpenFiles":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
