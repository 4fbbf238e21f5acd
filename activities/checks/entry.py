"""The first program in the sandbox: sets its own limits, then runs the checked program.

Arguments: a file descriptor; the user to become, or nothing; `NAME:soft:hard` for each resource
limit, separated by spaces; then the program and its arguments. The program is executed; one that
starts with HERE is marshalled Python code in hexadecimal, which this interpreter runs itself,
because another one would take as long to start as most checks take.

It writes READY to the descriptor just before it runs the program, and appends the reason if the
program cannot be executed: anything but exactly READY means that nothing was run. It imports as
little as possible, because most of its run time is start-up.
"""

from __future__ import annotations

import os
import resource
import sys

READY = b"ready"

HERE = "here"
"""In place of a program's path: the next argument is the code."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType


def main() -> CodeType:
    """Execute the program, or return its code if it starts with HERE."""
    descriptor, user, limits, *argv = sys.argv[1:]
    ready = int(descriptor)
    os.set_inheritable(ready, False)
    # If the machine runs out of memory, the kernel kills this process first.
    with open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123  pathlib takes 10 ms
        score.write("1000")
    for limit in limits.split():
        name, soft, hard = limit.split(":")
        resource.setrlimit(getattr(resource, name), (int(soft), int(hard)))
    if user:
        uid = int(user)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    os.write(ready, READY)
    if argv[0] == HERE:
        import marshal

        os.close(ready)
        sys.argv = ["-c", *argv[2:]]
        code: CodeType = marshal.loads(bytes.fromhex(argv[1]))  # noqa: S302  the worker's
        return code
    try:
        # It gets no other variable.
        os.execve(argv[0], argv, {"PYTHONHASHSEED": os.environ["PYTHONHASHSEED"]})  # noqa: S606
    except OSError as error:
        os.write(ready, f": {error}".encode())
        raise


if __name__ == "__main__":
    exec(main(), {"__name__": "__main__", "__builtins__": __builtins__})  # noqa: S102
