"""Running a file of tests as a user without any privilege."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

REPOSITORY = Path(__file__).parents[2]

_USER = 4242


async def run_as_ordinary_user(file: str) -> str:
    """Run the tests of a file as an ordinary user, in a view where it can read Python.

    Returns:
        What pytest wrote.

    Raises:
        AssertionError: a test failed.
    """
    base = Path(sys.base_prefix)
    view = ["--dev-bind", "/", "/"]
    if base.is_relative_to("/root"):
        view += ["--tmpfs", "/root"]
        for parent in reversed(base.parents[:-2]):
            view += ["--dir", str(parent)]
        view += ["--ro-bind", str(base), str(base)]
    with TemporaryDirectory() as home:
        os.chown(home, _USER, _USER)
        process = await asyncio.create_subprocess_exec(
            *("bwrap", *view, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"),
            *("--die-with-parent", "setpriv", "--reuid", str(_USER), "--regid", str(_USER)),
            *("--clear-groups", "--inh-caps=-all", "--bounding-set=-all"),
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("--basetemp", f"{home}/tmp", file),
            cwd=REPOSITORY,
            env={"PATH": os.environ["PATH"], "HOME": home},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )

        output = (await process.communicate())[0].decode()

    assert process.returncode == 0, output[-5000:]
    return output
