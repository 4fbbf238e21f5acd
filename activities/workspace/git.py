"""git, run so that nothing in a repository, a working tree or a user's configuration is executed.

git runs programs that a repository names: hooks, filters, file system monitors, external diffs and
merges, text converters, remote helpers. Each needs a configuration entry, and git reads these from
many places. Here it reads none but CONFIG, which goes before every file, and the configuration of
the store, which this package writes. Attributes, which select filters and converters and change
line ends, are turned off by `info/attributes` of the store (see store.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

CONFIG: Final[Mapping[str, str]] = {
    # what would be executed
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.alternateRefsCommand": "",
    "core.pager": "cat",
    "core.editor": "false",
    "core.askPass": "",
    "core.gitProxy": "",
    "credential.helper": "",
    "diff.external": "",
    "gc.auto": "0",
    "fetch.unpackLimit": "1",
    "maintenance.auto": "false",
    "push.gpgSign": "false",
    "commit.gpgSign": "false",
    "tag.gpgSign": "false",
    "log.showSignature": "false",
    "protocol.allow": "never",
    "safe.bareRepository": "explicit",
    # other repositories
    "submodule.recurse": "false",
    "fetch.recurseSubmodules": "false",
    "push.recurseSubmodules": "no",
    "diff.ignoreSubmodules": "all",
    "http.followRedirects": "false",
    # what the file system and the transport may contain
    "core.protectHFS": "true",
    "core.protectNTFS": "true",
    "core.symlinks": "true",
    "core.fileMode": "true",
    "core.untrackedCache": "false",
    "core.splitIndex": "false",
    "core.bigFileThreshold": "16m",
    "transfer.fsckObjects": "true",
    # harmless faults that old but honest histories have
    "fetch.fsck.zeroPaddedFilemode": "ignore",
    "fetch.fsck.missingSpaceBeforeDate": "ignore",
    "fetch.fsck.badTimezone": "ignore",
    "fetch.fsck.missingSpaceBeforeEmail": "ignore",
    # bytes stay as they are
    "core.attributesFile": "/dev/null",
    "core.excludesFile": "/dev/null",
    "core.autocrlf": "false",
    "core.safecrlf": "false",
    "core.precomposeUnicode": "false",
    "core.quotePath": "false",
    "i18n.commitEncoding": "UTF-8",
    "color.ui": "false",
    # a store whose disk loses power keeps every commit that was reported
    "core.fsync": "committed,reference",
    "core.fsyncMethod": "fsync",
    # others hold the locks of refs for milliseconds, and that of all packed refs for seconds
    "core.filesRefLockTimeout": "2000",
    "core.packedRefsTimeout": "10000",
    # threads are of no use beside other workers' processes
    "pack.threads": "1",
    "advice.detachedHead": "false",
    "init.defaultBranch": "main",
}

SSH: Final = "ssh -F /dev/null -oBatchMode=yes -oConnectTimeout=20 -oPermitLocalCommand=no"
"""ssh without the user's configuration, which may name commands; it asks for nothing."""

_ENVIRONMENT: Final[Mapping[str, str]] = {
    "PATH": os.defpath,
    "HOME": "/dev/null",
    "XDG_CONFIG_HOME": "/dev/null",
    "LC_ALL": "C",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "false",
    "GIT_SSH_COMMAND": SSH,
    "GIT_SSH_VARIANT": "ssh",
    "GIT_EDITOR": "false",
    "GIT_PAGER": "cat",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_PROTOCOL_FROM_USER": "0",
    "GIT_ALLOW_PROTOCOL": "",
    "GIT_OPTIONAL_LOCKS": "0",
}

OUTPUT_BYTES = 256 * 1024**2
"""Limit of an answer, unless the caller gives another."""

_ERROR_BYTES = 4_096


class GitFailed(Exception):
    """git ended with an error.

    Attributes:
        code: its exit status; negative: the signal that ended it.
        output: what it had written to stdout.
        reason: the end of what it wrote to stderr.
    """

    def __init__(self, command: str, code: int, output: bytes, reason: str) -> None:
        super().__init__(f"git {command} failed ({code}): {reason or 'it gave no reason'}")
        self.command = command
        self.code = code
        self.output = output
        self.reason = reason


class OutputTooLong(GitFailed):
    """git wrote more than the caller takes; `output` is its beginning."""


async def git(
    *args: str,
    git_dir: Path | None = None,
    work_tree: Path | None = None,
    index: Path | None = None,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    config: Mapping[str, str] | None = None,
    protocol: str = "",
    limit_bytes: int = OUTPUT_BYTES,
    seconds: float = 900,
) -> bytes:
    """Run a git command and return what it writes to stdout.

    Args:
        args: the command and its arguments; paths are literal.
        git_dir: the repository; None: a command that needs none.
        work_tree: the working tree, in which it then runs; None: the command needs none.
        index: the index file; None: the repository's.
        stdin: its whole input.
        env: variables in addition, such as the dates of a commit.
        config: entries of configuration in addition, which no list of processes shows.
        protocol: the only transport that it may use; empty: none.
        limit_bytes: maximum size of the answer.
        seconds: after these it is killed.

    Raises:
        OutputTooLong: the answer is over its limit.
        GitFailed: its exit status is not 0, or its time is up.
    """
    variables = dict(_ENVIRONMENT) | {"GIT_ALLOW_PROTOCOL": protocol} | dict(env or {})
    if git_dir is not None:
        variables["GIT_DIR"] = str(git_dir)
    if work_tree is not None:
        variables["GIT_WORK_TREE"] = str(work_tree)
    if index is not None:
        variables["GIT_INDEX_FILE"] = str(index)
    variables |= _config_variables({**CONFIG, **(config or {})})
    folder = work_tree or git_dir or Path("/")
    try:
        process = await asyncio.create_subprocess_exec(
            "git",
            "--no-pager",
            *args,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=folder,
            env=variables,
            start_new_session=True,
        )
    except OSError as error:
        why = "git cannot be started; install it" if folder.is_dir() else f"{folder} is missing"
        raise GitFailed(args[0], -1, b"", f"{why} ({error.strerror})") from error
    return await _finished(process, args[0], stdin, limit_bytes, seconds)


async def _finished(
    process: asyncio.subprocess.Process,
    command: str,
    stdin: bytes,
    limit_bytes: int,
    seconds: float,
) -> bytes:
    if not (process.stdin and process.stdout and process.stderr):
        raise RuntimeError("git was started without its pipes")
    feeding = asyncio.create_task(_feed(process.stdin, stdin))
    reading = asyncio.create_task(_end_of(process.stderr))
    try:
        async with asyncio.timeout(seconds):
            output = await _start_of(process.stdout, limit_bytes)
            if len(output) > limit_bytes:
                reason = f"its output is over {limit_bytes:,} bytes"
                raise OutputTooLong(command, 0, output[:limit_bytes], reason)
            code = await process.wait()
            reason = (await reading).decode(errors="replace").strip()
    except TimeoutError as error:
        raise GitFailed(command, -signal.SIGKILL, b"", f"its {seconds:g} s are up") from error
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        while await process.stdout.read(1024**2):
            pass  # a full pipe would hide that git has ended
        feeding.cancel()
        reading.cancel()
        await process.wait()
    if code != 0:
        raise GitFailed(command, code, output, reason)
    return output


def _config_variables(entries: Mapping[str, str]) -> dict[str, str]:
    variables = {"GIT_CONFIG_COUNT": str(len(entries))}
    for number, (key, value) in enumerate(entries.items()):
        variables[f"GIT_CONFIG_KEY_{number}"] = key
        variables[f"GIT_CONFIG_VALUE_{number}"] = value
    return variables


async def _feed(pipe: asyncio.StreamWriter, data: bytes) -> None:
    with suppress(ConnectionError):  # git does not have to read its input
        pipe.write(data)
        await pipe.drain()
    pipe.close()


async def _start_of(pipe: asyncio.StreamReader, limit_bytes: int) -> bytes:
    """Return all of it, or a little more than the limit."""
    chunks, size = [], 0
    while size <= limit_bytes and (chunk := await pipe.read(1024**2)):
        chunks.append(chunk)
        size += len(chunk)
    return b"".join(chunks)


async def _end_of(pipe: asyncio.StreamReader) -> bytes:
    end = b""
    while chunk := await pipe.read(65_536):
        end = (end + chunk)[-_ERROR_BYTES:]
    return end
