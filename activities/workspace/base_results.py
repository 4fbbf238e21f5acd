"""Results of bases, kept in the store: a base is measured once for all changes of all stories."""

from __future__ import annotations

from pydantic import ValidationError

from activities.workspace.errors import store_errors
from activities.workspace.git import GitFailed, git
from activities.workspace.store import Store, checked
from workflows.models.base import content_hash
from workflows.models.measurement import BaseResults
from workflows.models.workspace import Repository

DECIDING = {"image", "setup", "build", "unit", "e2e", "lint", "limits"}
"""Fields of a repository's entry that results depend on."""


class BaseResultsOf:
    """The kept results of one base, by the commands of its entry."""

    def __init__(self, store: Store, repository: Repository, commit: str) -> None:
        self._store = store
        commands = content_hash(repository.model_dump(mode="json", include=DECIDING))
        self.ref = f"refs/fleet-bases/{checked(commit)}/{commands}"

    async def read(self) -> BaseResults | None:
        """Return the results; None if there are none, or they are in another version's form."""
        with store_errors():
            try:
                data = await self._git("cat-file", "blob", self.ref)
            except GitFailed as failure:
                if failure.code != 128:
                    raise
                return None
        try:
            return BaseResults.model_validate_json(data)
        except ValidationError:
            return None

    async def keep(self, results: BaseResults) -> None:
        """Keep the results; those of another worker that measured at the same time are as good."""
        with store_errors():
            data = results.model_dump_json().encode()
            blob = (await self._git("hash-object", "-w", "--stdin", stdin=data)).decode().strip()
            await self._git("update-ref", self.ref, blob)

    async def _git(self, *args: str, stdin: bytes = b"") -> bytes:
        return await git(*args, git_dir=self._store.path, stdin=stdin)
