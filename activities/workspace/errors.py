"""Errors of git, translated for Temporal's retries and the Web UI.

git reports errors as text. The first row of a table such as STORE with one of whose texts the
reason matches gives the type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from temporalio.exceptions import ApplicationError

from activities.workspace.git import GitFailed, OutputTooLong
from activities.workspace.metrics import count_store_error
from workflows.models.errors import ErrorType, application_error

_Table = tuple[tuple[str, ErrorType, str], ...]

_REFUSED = (
    r"Authentication failed|Permission denied|could not read (Username|Password)"
    r"|returned error: 40[13]|Host key verification failed"
)

STORE: _Table = (
    # what the reason contains, type, meaning and remedy; the first match counts
    (
        r"No space left|Read-only file system|Input/output error|Stale file handle|Quota exceeded"
        r"|Transport endpoint|not a git repository|Permission denied|[Uu]nable to create"
        r"|is missing",
        ErrorType.GIT_STORE_AWAY,
        "the store cannot be used now; check its disk or mount",
    ),
    (
        r"Not a valid object name|bad object|not a tree object|does not exist in|invalid object"
        r"|bad revision|no such path|failed to unpack tree object|has only \d+ line",
        ErrorType.NOT_FOUND,
        "not found: the store has no such commit, path or line",
    ),
    (
        r"cannot lock ref|reference already exists|but expected",
        ErrorType.REF_MOVED,
        "the ref has moved",
    ),
    (
        r"unrelated histories",
        ErrorType.MERGE_CONFLICT,
        "the commits have no common ancestor, so they cannot be merged; was the base replaced?",
    ),
    ("", ErrorType.GIT_FAILED, "git failed on the store"),
)

ADDING: _Table = (
    (
        r"invalid path|can only add regular files|open\(\".*\"\): Permission denied"
        r"|File name too long|beyond a symbolic link",
        ErrorType.TREE_REFUSED,
        "git does not store such a file; remove it, or change its name or mode",
    ),
    *STORE,
)
"""Of what adds the files of a working tree to the store."""

REMOTE: _Table = (
    (
        _REFUSED,
        ErrorType.REPOSITORY_AWAY,
        "the repository refuses the credentials; see the folder in REPOSITORY_CREDENTIALS",
    ),
    (
        r"couldn't find remote ref|Remote branch .* not found",
        ErrorType.BASE_MISSING,
        "base: the repository has no such branch; correct `base`, or create the branch",
    ),
    (
        r"\[rejected\]|\[remote rejected\]|failed to push some refs",
        ErrorType.PUSH_REFUSED,
        "the repository refuses the branch; remove or merge the branch of that name there",
    ),
    (
        r"not allowed",
        ErrorType.INVALID_CONFIG,
        "url: the transport is not allowed; use https, ssh or file",
    ),
    (
        r"fsck error",
        ErrorType.TREE_REFUSED,
        "the repository has objects that git refuses, such as a file in '.git'; repair its history",
    ),
    ("", ErrorType.REPOSITORY_AWAY, "the repository does not answer; check its `url`"),
)

SERVER: _Table = (
    (
        _REFUSED,
        ErrorType.GIT_STORE_AWAY,
        "the store's git server refuses the credentials; see STORE in REPOSITORY_CREDENTIALS",
    ),
    (
        r"not found|does not appear to be a git repository",
        ErrorType.GIT_STORE_AWAY,
        "the store's git server has no such repository; create an empty one of that name there",
    ),
    (
        r"\[remote rejected\]",
        ErrorType.GIT_STORE_AWAY,
        "the store's git server refuses a ref; let it accept forced pushes to all refs",
    ),
    ("", ErrorType.GIT_STORE_AWAY, "the store's git server does not answer; check WORKSPACE_STORE"),
)


@contextmanager
def store_errors(table: _Table = STORE, what: str = "") -> Iterator[None]:
    """Turn errors of git into ApplicationErrors; let others pass.

    Args:
        table: how the reason of git is understood.
        what: the thing that the caller works on.
    """
    try:
        yield
    except OutputTooLong as error:
        limit = f"{len(error.output):,} bytes"
        message = f"{what or error.command}: is over the limit of {limit}; ask for less"
        raise application_error(ErrorType.TOO_LARGE, message) from None
    except GitFailed as error:
        raise git_error(error, table, what) from None
    except OSError as error:
        if table in (REMOTE, SERVER):
            kind = ErrorType.REPOSITORY_AWAY if table is REMOTE else ErrorType.GIT_STORE_AWAY
            message = f"{what}: its credentials cannot be read; check REPOSITORY_CREDENTIALS"
            count_store_error(kind)
            raise application_error(kind, f"{message} ({error})") from None
        message = f"the store cannot be used now; check its disk or mount ({error})"
        count_store_error(ErrorType.GIT_STORE_AWAY)
        raise application_error(ErrorType.GIT_STORE_AWAY, message) from None


def git_error(error: GitFailed, table: _Table, what: str = "") -> ApplicationError:
    """Return the ApplicationError of a failed command."""
    kind, meaning = next(row[1:] for row in table if re.search(row[0], error.reason))
    where = f"{what}: " if what else ""
    count_store_error(kind)
    return application_error(kind, f"{where}{meaning} ({str(error)[:500]})")
