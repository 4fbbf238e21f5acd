"""Context packs that calls refer to: a history holds the key, and not the text in every call."""

from __future__ import annotations

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

from workflows.models.errors import ErrorType
from workflows.stubs import STORE, GraphStub

with workflow.unsafe.imports_passed_through():
    from workflows.models.context import ContextPack, PackQuery


async def kept_pack(query: PackQuery) -> ContextPack:
    """Build a context pack, and let Valkey keep it; return what calls pass on.

    Raises:
        ActivityError: `GraphLost`.
    """
    options = STORE | {"summary": f"context pack {query.role} {query.phase}"}
    if workflow.patched("packs-kept-by-key"):
        return await workflow.execute_activity_method(GraphStub.keep_pack, query, **options)
    pack = await workflow.execute_activity_method(GraphStub.build_pack, query, **options)
    context = "\n\n".join(filter(None, (pack.context, query.background)))
    return pack.model_copy(update={"context": context})


def is_pack_missing(error: ActivityError) -> bool:
    """Return whether a call failed because Valkey does not have its context pack."""
    cause = error.cause
    return isinstance(cause, ApplicationError) and cause.type == ErrorType.PACK_MISSING
