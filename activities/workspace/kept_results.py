"""Results of agents' actions, kept in the store, so that no action runs twice.

The result of an agent's last action is a blob under a ref beside the agent's own. It is kept before
the agent's ref moves to the commit, so an attempt after a crash finds it. An attempt that was given
up, and ends after the next one, finds that one's.
"""

from __future__ import annotations

import asyncio

from temporalio.exceptions import ApplicationError

from activities.workspace.errors import store_errors
from activities.workspace.git import git
from activities.workspace.store import Store
from workflows.models.base import Model, content_hash
from workflows.models.errors import ErrorType
from workflows.models.ids import agent_ref
from workflows.models.implementation import ActionResult, RunActionInput
from workflows.models.workspace import Trailers

ABSENT = "0" * 40
"""The old value of a ref that must not exist."""


class KeptResult(Model):
    """The result of an agent's last action. `asked`: the hash of the request."""

    asked: str
    result: ActionResult


def request_hash(request: RunActionInput) -> str:
    """Return a hash of everything that a result depends on."""
    return content_hash(request.model_dump(mode="json", exclude={"repository": {"url"}}))


class KeptResults:
    """The kept result of one agent's work on a task."""

    def __init__(self, store: Store, agent: Trailers) -> None:
        self._store = store
        ref = agent_ref(agent.story, agent.task, agent.agent)
        self._ref = ref.replace("refs/fleet/", "refs/fleet-results/", 1)
        self._blob = ABSENT

    async def read(self) -> KeptResult | None:
        """Return the result of the last action; None if there is none."""
        blob = await asyncio.to_thread(self._store.loose, self._ref)
        if blob and (known := self._store.remembered.get((blob,))):
            self._blob = blob
            return KeptResult.model_validate_json(known)
        with store_errors():
            found = await self._git("cat-file", "--batch", stdin=f"{self._ref}\n".encode())
        about, _, data = found.partition(b"\n")
        if about.endswith(b" missing"):
            self._blob = ABSENT
            return None
        self._blob = about.split()[0].decode()
        return KeptResult.model_validate_json(data)

    async def keep(self, made: KeptResult) -> KeptResult:
        """Keep the result of an action and return it.

        If another attempt has kept one for the same request since `read`, that one is returned.

        Raises:
            ApplicationError: `RefMoved`: the work went on without this attempt.
        """
        try:
            with store_errors():
                data = made.model_dump_json().encode()
                words = ("hash-object", "-w", "--stdin")
                blob = (await self._git(*words, stdin=data)).decode().strip()
                await self._git("update-ref", self._ref, blob, self._blob)
                self._store.remembered.add((blob,), data)
        except ApplicationError as error:
            if error.type != ErrorType.REF_MOVED:
                raise
            other = await self.read()
            if other is None or other.asked != made.asked:
                raise
            return other
        return made

    async def _git(self, *args: str, stdin: bytes = b"") -> bytes:
        return await git(*args, git_dir=self._store.path, stdin=stdin)


async def move_agent(store: Store, agent: Trailers, parent: str, commit: str) -> None:
    """Move the agent's ref to a step's commit, wherever it is; a repetition moves nothing.

    After a reset of the history, the ref names later steps, which the store keeps.
    """
    if commit == parent:
        return
    head = await store.agent_head(agent.story, agent.task, agent.agent)
    if commit == head:
        return
    if head not in (None, parent):
        await store.place(agent.story, agent.task, agent.agent, parent)
    await store.advance(agent, parent, commit)
