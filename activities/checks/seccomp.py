"""The sandbox's system call filter for x86-64, beyond namespaces and resource limits.

It refuses namespaces within the sandbox, mounts, tracing, the kernel's log, keyrings and programs,
memory that no resource limit counts (System V shared memory, memory files), and sockets other than
Unix and IP, because a virtual machine's host socket does not belong to a network namespace.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterator

_AUDIT_ARCH_X86_64 = 0xC000003E
_X32 = 0x40000000
_CLONE, _CLONE3, _SOCKET = 56, 435, 41
_NEW_NAMESPACE = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10

_REFUSED = {
    "shmget": 29,
    "shmat": 30,
    "semget": 64,
    "msgget": 68,
    "ptrace": 101,
    "syslog": 103,
    "pivot_root": 155,
    "mount": 165,
    "umount2": 166,
    "mq_open": 240,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "unshare": 272,
    "perf_event_open": 298,
    "fanotify_init": 300,
    "open_by_handle_at": 304,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "memfd_create": 319,
    "bpf": 321,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "memfd_secret": 447,
}

_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def supported() -> bool:
    """Return whether the filter supports this machine's system calls."""
    return platform.machine() == "x86_64"


def program() -> bytes:
    """Return the filter as an array of `struct sock_filter`, as `bwrap --seccomp` reads it."""
    return b"".join(struct.pack("HBBI", *instruction) for instruction in _instructions())


def _instructions() -> Iterator[tuple[int, int, int, int]]:
    """Yield the instructions: (operation, skip if true, skip if false, operand)."""
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    yield (_LOAD, 0, 0, _ARCH)
    yield (_JEQ, 1, 0, _AUDIT_ARCH_X86_64)
    yield (_RETURN, 0, 0, _KILL)
    yield (_LOAD, 0, 0, _NUMBER)
    yield (_JGE, 0, 1, _X32)
    yield (_RETURN, 0, 0, _KILL)
    for number in _REFUSED.values():
        yield (_JEQ, 0, 1, number)
        yield refuse
    yield (_JEQ, 0, 1, _CLONE3)  # a filter cannot read its flags; the C library falls back to clone
    yield (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
    yield (_JEQ, 0, 3, _CLONE)
    yield (_LOAD, 0, 0, _FIRST_ARGUMENT)
    yield (_JSET, 0, 7, _NEW_NAMESPACE)
    yield refuse
    yield (_JEQ, 0, 5, _SOCKET)
    yield (_LOAD, 0, 0, _FIRST_ARGUMENT)
    yield (_JEQ, 3, 0, _AF_UNIX)
    yield (_JEQ, 2, 0, _AF_INET)
    yield (_JEQ, 1, 0, _AF_INET6)
    yield refuse
    yield (_RETURN, 0, 0, _ALLOW)
