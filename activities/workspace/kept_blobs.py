"""Results that the store keeps under a ref, so that they are not made twice."""

from __future__ import annotations

from typing import Generic, TypeVar

from pydantic import ValidationError

from activities.workspace.errors import store_errors
from activities.workspace.git import git
from activities.workspace.refs import Move
from activities.workspace.store import Store
from workflows.models.base import Model

ModelT = TypeVar("ModelT", bound=Model)


class KeptBlob(Generic[ModelT]):
    """A model in a store, under a ref that names everything that it depends on."""

    def __init__(self, store: Store, ref: str, model: type[ModelT]) -> None:
        self._store = store
        self._model = model
        self.ref = ref

    async def read(self) -> ModelT | None:
        """Return the model; None if there is none, or it is in another version's form."""
        blob = await self._store.refs.value(self.ref)
        if blob is None:
            return None
        with store_errors():
            data = await self._git("cat-file", "blob", blob)
        try:
            return self._model.model_validate_json(data)
        except ValidationError:
            return None

    async def keep(self, value: ModelT) -> None:
        """Keep the model; that of another worker that made it at the same time is as good."""
        with store_errors():
            data = value.model_dump_json().encode()
            blob = (await self._git("hash-object", "-w", "--stdin", stdin=data)).decode().strip()
        await self._store.refs.move(Move(self.ref, blob))

    async def _git(self, *args: str, stdin: bytes = b"") -> bytes:
        return await git(*args, git_dir=self._store.path, stdin=stdin)
