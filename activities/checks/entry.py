"""The first program in the sandbox: takes limits upon itself, then becomes the checked program.

Arguments: a file descriptor; the user to become, or nothing; `NAME:soft:hard` for each resource
limit, with spaces between; then the program and its arguments. It writes READY to the descriptor
when nothing is left but to run the program, and adds the reason where that cannot be run: without
exactly READY, nothing was run. It imports next to nothing: starting is most of what it does.
"""

import os
import resource
import sys

READY = b"ready"


def main() -> None:
    descriptor, user, limits, *argv = sys.argv[1:]
    ready = int(descriptor)
    os.set_inheritable(ready, False)
    # Whatever the machine runs out of memory for, it is this that goes.
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
    try:
        # Sets and dicts then iterate alike in every run: the same program, the same output.
        os.execve(argv[0], argv, {"PYTHONHASHSEED": "0"})  # noqa: S606
    except OSError as error:
        os.write(ready, f": {error}".encode())
        raise


if __name__ == "__main__":
    main()
