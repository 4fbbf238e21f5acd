"""Rebuilding of a story's part of the graph, and its timeline, from its histories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from temporalio.client import Client
from temporalio.exceptions import ApplicationError

from activities.graph.activities import Graph
from bridge.mirror.histories import StoryRuns, read
from bridge.mirror.recovered_events import GraphWrite, graph_writes
from workflows.models.deliberation import DeliberationRecord
from workflows.models.entries import OutcomeBatch, RecordBatch


@dataclass
class Rebuilt:
    """The result of a rebuild. refused: writes that the graph refuses for good, and why."""

    found: StoryRuns
    writes: int = 0
    refused: list[str] = field(default_factory=list)


async def rebuild(
    client: Client, graph: Graph, story_id: str, report: Callable[[str, int, int], None]
) -> Rebuilt:
    """Repeat the writes of the story's histories in the same order; existing data stays unchanged.

    Args:
        client: Temporal, with the fleet's data converter.
        graph: where to write.
        story_id: the story; '' for the deliberations that were started without a story.
        report: called with the step, how much of it is done, and of how much.

    Raises:
        RPCError: Temporal does not answer.
        ApplicationError: a store is down (retryable); what was written stays.
    """
    found = await read(client, story_id, lambda done, of: report("histories", done, of))
    done = Rebuilt(found)
    writes = graph_writes(found.runs, story_id)
    for number, write in enumerate(writes, 1):
        try:
            await _apply(graph, write)
        except ApplicationError as error:
            if not error.non_retryable:
                raise
            done.refused.append(f"{_named(write)}: {error.message}")
        else:
            done.writes += 1
        report("writes", number, len(writes))
    return done


async def _apply(graph: Graph, write: GraphWrite) -> None:
    match write:
        case OutcomeBatch():
            await graph.record_outcome(write)
        case RecordBatch():
            await graph.record(write)
        case DeliberationRecord():
            await graph.record_deliberation(write)
        case _:
            await graph.update_context(write)


def _named(write: GraphWrite) -> str:
    match write:
        case RecordBatch():
            return f"{write.owner}, entries from {write.first}"
        case DeliberationRecord():
            return f"{write.deliberation_id} {write.run_id}"
        case _:
            return write.update_id
