"""The stores of all projects: where they are, and how one is made."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

from activities.workspace.errors import store_errors
from activities.workspace.git import git
from activities.workspace.git_server import ServerRefs
from activities.workspace.metrics import count_store_error
from activities.workspace.refs import FolderRefs, Refs
from activities.workspace.remembered import Remembered
from activities.workspace.store import Store
from workflows.models.errors import ErrorType, application_error
from workflows.models.workspace import Repository

ATTRIBUTES = (
    "* !text !eol !crlf !ident !filter !working-tree-encoding !diff !merge !export-ignore"
    " !export-subst\n"
)
"""No file's attributes count: bytes stay as they are, and no program is selected by them."""

EXCLUDED = """\
# What tools leave behind; it is stored only where the project already does.
__pycache__/
*.py[cod]
.coverage
.hypothesis/
.mypy_cache/
.nox/
.pytest_cache/
.ruff_cache/
.tox/
.venv/
node_modules/
"""


class Stores:
    """The stores of all projects, which every workspace worker reaches."""

    def __init__(self, root: Path, credentials: Path | None = None, server: str = "") -> None:
        """Use the stores in a folder, or on a git server.

        Args:
            root: the folder, which exists: one that is missing is a mount that is away. With a
                server, the folder of its mirrors on this machine.
            credentials: the folder of the repositories' credentials; see transports.py.
            server: the URL below which the server has a repository `KEY.git` for each project.
        """
        self._root = root
        self._credentials = credentials
        self._server = server.rstrip("/")
        self._remembered: defaultdict[str, Remembered] = defaultdict(Remembered)
        self._servers: dict[str, ServerRefs] = {}

    async def of(self, repository: Repository, *commits: str) -> Store:
        """Return the store of a repository, made by fetching its base if it is missing.

        Args:
            repository: the entry of the project.
            commits: what the caller works on, which other workers may have made.

        Raises:
            ApplicationError: GitStoreAway or RepositoryAway, which are retried; BaseMissing.
        """
        store = self.at(repository)
        with store_errors():
            self._require_root()
            if not (store.path / "HEAD").exists():
                await self._make(store, repository)
        await store.refs.hold(*commits)
        return store

    async def existing(self, repository: Repository) -> Store | None:
        """Return the store of a repository; None if there is none yet.

        Raises:
            ApplicationError: GitStoreAway.
        """
        self._require_root()
        exists = self._server or (self.at(repository).path / "HEAD").exists()
        return await self.of(repository) if exists else None

    def known(self) -> list[str]:
        """Return the keys of the stores in the folder, or of those that it mirrors."""
        return [path.stem for path in sorted(self._root.glob("*.git"))]

    async def answer(self, repositories: Iterable[Repository]) -> None:
        """Check that the stores of repositories can be used.

        Raises:
            ApplicationError: GitStoreAway.
        """
        self._require_root()
        for repository in repositories:
            await self.at(repository).refs.answers()

    def _require_root(self) -> None:
        if self._server:
            self._root.mkdir(parents=True, exist_ok=True)
        elif not self._root.is_dir():
            count_store_error(ErrorType.GIT_STORE_AWAY)
            raise application_error(
                ErrorType.GIT_STORE_AWAY,
                f"the store {self._root} is missing: mount it, or create the folder, or set "
                "WORKSPACE_STORE to where it is",
            )

    def at(self, repository: Repository) -> Store:
        """Return the store of a repository, which may not exist yet."""
        key = repository.key
        path = self._root / f"{key}.git"
        refs: Refs = FolderRefs(path)
        if self._server:
            refs = self._servers.setdefault(
                key, ServerRefs(path, f"{self._server}/{key}.git", self._credentials)
            )
        return Store(path, repository, self._credentials, self._remembered[key], refs)

    def imported_url(self, key: str) -> str:
        """Return the URL of a repository that was imported: its store is all that there is."""
        return (self._root / f"{key}.git").resolve().as_uri()

    async def import_commits(self, repository: Repository, commits: Collection[str]) -> Store:
        """Return a store with commits of a repository on this machine, and what they contain.

        Args:
            repository: its URL is the repository's folder.
            commits: in full.

        Raises:
            ApplicationError: GitStoreAway; RepositoryAway: a commit is missing.
        """
        store = self.at(repository)
        with store_errors():
            self._require_root()
            existed = (store.path / "HEAD").exists()
            if not existed:
                await self._make(store, repository, commits)
            if existed or self._server:
                await store.fetch_commits(commits)
        return store

    async def _make(
        self, store: Store, repository: Repository, commits: Collection[str] = ()
    ) -> None:
        """Make a store beside its place and rename it: other workers see all of it, or nothing.

        A mirror of a git server is empty at first.
        """
        path = self._root / f".{repository.key}.{uuid.uuid4().hex}"
        try:
            await git("init", "--quiet", "--bare", "--template=", str(path))
            (path / "info").mkdir(exist_ok=True)
            (path / "info" / "attributes").write_text(ATTRIBUTES)
            (path / "info" / "exclude").write_text(EXCLUDED)
            if not self._server:
                made = Store(path, repository, self._credentials)
                await (made.fetch_commits(commits) if commits else made.base_commit())
            try:
                path.rename(store.path)
            except OSError:
                if not (store.path / "HEAD").exists():
                    raise
        finally:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
