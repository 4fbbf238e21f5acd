"""Results of agents' actions, kept in the store, so that no action runs twice.

The result of an agent's last action is the message of a tag of its commit, under a ref beside the
agent's own. It is kept before the agent's ref moves to the commit, so an attempt after a crash
finds it, with the commit. An attempt that was given up, and ends after the next one, finds that
one's.
"""

from __future__ import annotations

from activities.workspace.errors import store_errors
from activities.workspace.git import git
from activities.workspace.refs import ABSENT, Move
from activities.workspace.store import Store
from workflows.models.base import Model, content_hash
from workflows.models.errors import ErrorType, application_error
from workflows.models.ids import agent_ref
from workflows.models.implementation import ActionResult, RunActionInput
from workflows.models.workspace import Trailers

_TAG = """\
object {commit}
type commit
tag result
tagger SWE AI Fleet <fleet@fleet.invalid> 0 +0000

{message}
"""


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
        self._kept = ABSENT

    async def read(self) -> KeptResult | None:
        """Return the result of the last action; None if there is none."""
        refs = self._store.refs
        kept = await refs.noted(self._ref) or await refs.value(self._ref)
        self._kept = kept or ABSENT
        if kept is None:
            return None
        with store_errors():
            data = await self._store.remembered.of((kept,), self._message)
        return KeptResult.model_validate_json(data)

    async def keep(self, made: KeptResult, step: Move | None = None) -> tuple[KeptResult, bool]:
        """Keep the result of an action, with the move of the agent's ref if that can be made.

        Args:
            made: the result.
            step: the move to the result's commit; None: the action changed nothing.

        Returns:
            The result, or that of another attempt at the same request since `read`; and whether
            the agent's ref was moved.

        Raises:
            ApplicationError: `RefMoved`: the work went on without this attempt.
        """
        message = made.model_dump_json()
        tag = _TAG.format(commit=made.result.commit, message=message)
        with store_errors():
            words = ("hash-object", "-w", "-t", "tag", "--stdin")
            kept = (await self._git(*words, stdin=tag.encode())).decode().strip()
        move, refs = Move(self._ref, kept, self._kept), self._store.refs
        stepped = step is not None and await refs.move(move, step)
        if stepped or await refs.move(move):
            self._store.remembered.add((kept,), message.encode())
            return made, stepped
        other = await self.read()
        if other is None or other.asked != made.asked:
            raise application_error(
                ErrorType.REF_MOVED,
                f"{self._ref}: the ref has moved: the work went on without this attempt",
            )
        return other, False

    async def _message(self, kept: str) -> bytes:
        found = await self._git("cat-file", "--batch", stdin=f"{kept}\n".encode())
        about, _, data = found.partition(b"\n")
        # A store that an earlier version wrote has the result as a blob.
        return data.partition(b"\n\n")[2] if about.split()[1] == b"tag" else data

    async def _git(self, *args: str, stdin: bytes = b"") -> bytes:
        return await git(*args, git_dir=self._store.path, stdin=stdin)


def next_step(request: RunActionInput, commit: str) -> Move | None:
    """Return the usual move of the agent's ref; None if the action changed nothing."""
    if commit == request.parent:
        return None
    agent = request.trailers
    ref = agent_ref(agent.story, agent.task, agent.agent)
    return Move(ref, commit, ABSENT if request.parent == request.base else request.parent)


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
