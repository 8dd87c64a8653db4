"""A sandboxed process confines itself before it runs a program: limits, a user, a keyring, a system-call filter.

Runs inside the sandbox (``sandbox.py`` ships it there) with the standard library only. The program and its children
inherit all of it and cannot undo it.
"""

import ctypes
import errno
import os
import resource
import struct
from typing import Any, NamedTuple


class Unconfined(Exception):
    """This process cannot be confined here: no program may run in it."""


class Machine(NamedTuple):
    """The filter's constants of a processor."""

    audit: int
    """Its AUDIT_ARCH word."""
    column: int
    """Of ``REFUSED``."""
    first_foreign: int
    """From this number on calls are of another ABI (x32)."""


MACHINES = {"x86_64": Machine(0xC000003E, 0, 0x40000000), "aarch64": Machine(0xC00000B7, 1, 0x40000000)}

# Numbers of system calls on x86_64 and aarch64; None where a machine has no such call.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # Keys: the kernel keeps them beyond a process, and the caller's are a user's secrets.
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    # Memory and messages that outlive or belong to no process, so that no limit counts them.
    **{"shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "shmdt": (67, 197)},
    **{"semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192)},
    **{"msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180)},
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "vmsplice": (278, 75)},
    # Large parts of the kernel that programs of this kind have no use for.
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282)},
    **{"fanotify_init": (300, 262), "fanotify_mark": (301, 263), "lookup_dcookie": (212, 18)},
    # Other processes.
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    **{"pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448)},
    **{"move_pages": (279, 239), "migrate_pages": (256, 238)},
    # Namespaces and mounts.
    **{"unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41)},
    **{"mount": (165, 40), "umount2": (166, 39), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432)},
    **{"fspick": (433, 433), "open_tree": (428, 428), "move_mount": (429, 429), "mount_setattr": (442, 442)},
    **{"name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265)},
    # The machine.
    **{"syslog": (103, 116), "acct": (163, 89), "reboot": (169, 142), "vhangup": (153, 58)},
    **{"kexec_load": (246, 104), "kexec_file_load": (320, 294)},
    **{"init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106)},
    **{"swapon": (167, 224), "swapoff": (168, 225), "quotactl": (179, 60), "quotactl_fd": (443, 443)},
    **{"settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266)},
    **{"sethostname": (170, 161), "setdomainname": (171, 162), "nfsservctl": (180, 42)},
    **{"iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "uselib": (134, None)},
    **{"sysfs": (139, None), "_sysctl": (156, None), "ustat": (136, None), "create_module": (174, None)},
}
"""These fail with EPERM, whatever their arguments."""

_SOCKET, _SOCKETPAIR, _CLONE, _CLONE3, _IOCTL = (41, 198), (53, 199), (56, 220), (435, 435), (16, 29)
_LAST_KNOWN = 450
"""Calls that Linux has gained since 5.17 do not exist for a program: libraries know how to do without them."""
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW*
_TIOCSTI = 0x5412  # types into a terminal

_LOAD, _EQUAL, _ABOVE_OR_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16


def filter_of(machine: Machine) -> bytes:
    """The system-call filter, a classic BPF program of 8 bytes an instruction.

    A call of another architecture's kills its process. All arguments that are looked at are of 32 bits for the kernel
    too, so that nothing hides in the upper half.
    """
    program: list[bytes] = []

    def add(code: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        program.append(struct.pack("=HBBI", code, if_true, if_false, value))

    def fail(number: int) -> None:
        add(_RETURN, _ERROR | number)

    add(_LOAD, _ARCHITECTURE_AT)
    add(_EQUAL, machine.audit, 1)
    add(_RETURN, _KILL)
    add(_LOAD, _NUMBER_AT)
    add(_ABOVE_OR_EQUAL, machine.first_foreign, 0, 1)
    fail(errno.EPERM)
    add(_ABOVE_OR_EQUAL, _LAST_KNOWN + 1, 0, 1)
    fail(errno.ENOSYS)
    # Its flags are in memory, where a filter cannot look; the C library then takes clone.
    add(_EQUAL, _CLONE3[machine.column], 0, 1)
    fail(errno.ENOSYS)
    for numbers in REFUSED.values():
        number = numbers[machine.column]
        if number is not None:
            add(_EQUAL, number, 0, 1)
            fail(errno.EPERM)
    for numbers, argument, test, value, allowed_if_true, failure in (
        (_SOCKET, 0, _EQUAL, 1, True, errno.EAFNOSUPPORT),  # AF_UNIX
        (_SOCKETPAIR, 0, _EQUAL, 1, True, errno.EAFNOSUPPORT),
        (_CLONE, 0, _ANY_BIT, _NEW_NAMESPACES, False, errno.EPERM),
        (_IOCTL, 1, _EQUAL, _TIOCSTI, False, errno.EPERM),
    ):
        add(_EQUAL, numbers[machine.column], 0, 4)
        add(_LOAD, _ARGUMENTS_AT + 8 * argument)
        add(test, value, *((0, 1) if allowed_if_true else (1, 0)))
        add(_RETURN, _ALLOW)
        fail(failure)
    add(_RETURN, _ALLOW)
    return b"".join(program)


_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_JOIN_SESSION_KEYRING = 1
_PRCTL, _CAPSET = (157, 167), (126, 91)
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# Rights over files (all of version 1, then one more by version), the read-only ones among them.
_READ_RIGHTS, _FIRST_RIGHTS, _MORE_RIGHTS = 0b1101, (1 << 13) - 1, {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}


def confine(limits: dict[str, int], user: int | None, writable: str | None, hidden: bool) -> None:
    """Confine this process and all that it will start.

    Args:
        limits: names of ``resource`` with their values.
        user: number of the user to become; None to stay.
        writable: without bubblewrap, the one folder that may be written; None in bubblewrap's sandbox, where mounts
            say so.
        hidden: namespaces keep other processes out of its reach, so that Landlock may be missing.

    Raises:
        Unconfined: the kernel or Python lacks what is needed.
    """
    machine = MACHINES.get(os.uname().machine)
    if machine is None:
        raise Unconfined(f"no system-call filter for the processor {os.uname().machine}")
    libc = ctypes.CDLL(None, use_errno=True)

    def call(*words: Any) -> int:
        return int(libc.syscall(*(ctypes.c_long(each) if isinstance(each, int) else each for each in words)))

    def expect(result: int, what: str) -> None:
        if result != 0:
            raise Unconfined(f"{what}: {os.strerror(ctypes.get_errno())}")

    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    # Where the kernel has no keyrings, or a container forbids the call, there is nothing to leave: the filter refuses
    # the call to all programs.
    keyctl = REFUSED["keyctl"][machine.column]
    assert keyctl is not None
    call(keyctl, _JOIN_SESSION_KEYRING, 0)
    prctl = _PRCTL[machine.column]
    expect(call(prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if writable is not None:
        _give_up_capabilities(call, expect, machine)
        _restrict_files(call, expect, writable, hidden)
        expect(call(prctl, _PR_SET_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE")
    code = filter_of(machine)
    program = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(program)), 16)
    expect(call(prctl, _PR_SET_SECCOMP, 2, ctypes.byref(header), 0, 0), "the kernel takes no system-call filter")


def _give_up_capabilities(call: Any, expect: Any, machine: Machine) -> None:
    """Root without rights: no_new_privs keeps what it starts from regaining them."""
    if os.geteuid() == 0:
        header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
        expect(call(_CAPSET[machine.column], ctypes.byref(header), ctypes.create_string_buffer(24)), "capset")


def _restrict_files(call: Any, expect: Any, writable: str, hidden: bool) -> None:
    """Landlock: everything can be read, one folder written, and no process outside be looked into or be signalled."""
    version = call(_LANDLOCK_CREATE, 0, 0, 1)
    if version < 1 and hidden:
        return
    if version < 1:
        raise Unconfined(
            "the kernel has neither namespaces for this user nor Landlock, and programs could write what grades them"
        )
    rights = _FIRST_RIGHTS | sum(right for since, right in _MORE_RIGHTS.items() if version >= since)
    scopes = 0b11 if version >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("=QQQ", rights, 0, scopes)[: 24 if version >= 6 else 8]
    ruleset = call(_LANDLOCK_CREATE, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes), 0)
    if ruleset < 0:
        expect(-1, "Landlock")
    for path, allowed in (("/", _READ_RIGHTS), (writable, rights), (os.devnull, 0b110)):
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, opened), 12)
        expect(call(_LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0), "Landlock")
        os.close(opened)
    expect(call(_LANDLOCK_RESTRICT, ruleset, 0), "Landlock")
    os.close(ruleset)
