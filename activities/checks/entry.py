"""The first program in the sandbox: takes limits upon itself, then becomes the checked program.

Its only argument is JSON: `limits` ({resource name: [soft, hard]}), `uid` (null, or the user to
become), `ready` (a file descriptor) and `argv`. It writes READY to `ready` when nothing is left
but to run `argv`, and adds the reason where that cannot be run: without exactly READY, nothing
was run. Only the standard library is at hand here.
"""

import json
import os
import resource
import sys
from pathlib import Path

READY = b"ready"


def main() -> None:
    order = json.loads(sys.argv[1])
    ready = order["ready"]
    os.set_inheritable(ready, False)
    # Whatever the machine runs out of memory for, it is this that goes.
    Path("/proc/self/oom_score_adj").write_text("1000")
    for name, limit in order["limits"].items():
        resource.setrlimit(getattr(resource, name), tuple(limit))
    uid = order["uid"]
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    argv = order["argv"]
    os.write(ready, READY)
    try:
        # Sets and dicts then iterate alike in every run: the same program, the same output.
        os.execve(argv[0], argv, {"PYTHONHASHSEED": "0"})  # noqa: S606
    except OSError as error:
        os.write(ready, f": {error}".encode())
        raise


if __name__ == "__main__":
    main()
