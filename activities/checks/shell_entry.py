"""The first programs in a sandbox that shows the system's own: they start sooner than Python does.

They do what entry.py does: a shell, setpriv and prlimit become each other, and then the program.
A shell cannot close a descriptor above 9, so READY is the start of the output instead. What comes
before it, or in its place, is why nothing was run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from resource import RLIM_INFINITY

READY = b"ready"

_SHELL = "/bin/sh"
_SETPRIV = "/usr/bin/setpriv"
_PRLIMIT = "/usr/bin/prlimit"

# If the machine runs out of memory, the kernel kills this process first. Python ignores these two
# signals, so a write to a closed pipe, or above the size of files, is an error in both cases.
_FIRST = 'trap "" PIPE XFSZ && echo 1000 > /proc/self/oom_score_adj && exec "$@"'
_LAST = f'printf {READY.decode()} && exec "$@"'


def installed() -> bool:
    """Return whether this machine has the programs."""
    return all(Path(program).is_file() for program in (_SHELL, _SETPRIV, _PRLIMIT))


def command(
    argv: Sequence[str], uid: int | None, limits: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Return the command that sets limits, becomes a user and executes a program.

    Args:
        argv: the program's absolute path, which exists, and its arguments.
        uid: the user; None: it stays who it is.
        limits: (soft, hard) by resource name.
    """
    user = [] if uid is None else [_SETPRIV, f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    bounds = [
        f"--{name.removeprefix('RLIMIT_').lower()}={_bound(soft)}:{_bound(hard)}"
        for name, (soft, hard) in limits.items()
    ]
    then = [*user, _PRLIMIT, *bounds, _SHELL, "-c", _LAST, "sh", *argv]
    return [_SHELL, "-c", _FIRST, "sh", *then]


def _bound(value: int) -> str:
    return "unlimited" if value == RLIM_INFINITY else str(value)
