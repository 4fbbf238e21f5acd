"""The `fleet` and `temporal` command lines, run as a person runs them."""

import asyncio
import json
import sysconfig
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tests.support.fleet import Environment
from workers.cli import app as cli

TEMPORAL = Path(sysconfig.get_path("scripts")) / "temporal"


class Result:
    """The result of a command. json: its stdout, parsed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def command(fleet: Environment, *arguments: str, stdin: str = "") -> Result:
    """Run `fleet` in a thread of this process."""
    ended = await asyncio.to_thread(CliRunner().invoke, cli.app, arguments, input=stdin, env=fleet)
    if ended.exception and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return Result(ended.exit_code, ended.stdout, ended.stderr)


async def done(fleet: Environment, *arguments: str, stdin: str = "") -> Result:
    """Run a command of `fleet` that must succeed."""
    ended = await command(fleet, *arguments, stdin=stdin)
    assert ended.code == 0, ended.out + ended.err
    return ended


async def refused(fleet: Environment, *arguments: str, stdin: str = "") -> str:
    """Run a command that must be refused (exit code 1, empty stdout); return its stderr."""
    ended = await command(fleet, *arguments, stdin=stdin)
    assert (ended.code, ended.out) == (1, ""), ended.out + ended.err
    return ended.err


async def token(fleet: Environment, actor: str, roles: str, days: str = "1") -> str:
    """Return a new token, by `fleet token create`."""
    arguments = ("--actor", actor, "--roles", roles, "--days", days)
    return (await done(fleet, "token", "create", *arguments)).out.strip()


async def temporal(fleet: Environment, *arguments: str) -> Result:
    """Run the `temporal` CLI."""
    process = await asyncio.create_subprocess_exec(
        TEMPORAL,
        *arguments,
        *("--address", fleet["TEMPORAL_ADDRESS"]),
        *("--namespace", fleet["TEMPORAL_NAMESPACE"]),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return Result(process.returncode or 0, out.decode(), err.decode())
