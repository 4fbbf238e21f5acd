"""Results of bases, kept in the store: a base is measured once for all changes of all stories."""

from __future__ import annotations

from activities.workspace.kept_blobs import KeptBlob
from activities.workspace.store import Store, checked
from workflows.models.base import content_hash
from workflows.models.measurement import BaseResults
from workflows.models.workspace import Repository

DECIDING = {"image", "setup", "build", "unit", "e2e", "lint", "limits"}
"""Fields of a repository's entry that results depend on."""


class BaseResultsOf(KeptBlob[BaseResults]):
    """The kept results of one base, by the commands of its entry."""

    def __init__(self, store: Store, repository: Repository, commit: str) -> None:
        commands = content_hash(repository.model_dump(mode="json", include=DECIDING))
        super().__init__(store, f"refs/fleet-bases/{checked(commit)}/{commands}", BaseResults)
