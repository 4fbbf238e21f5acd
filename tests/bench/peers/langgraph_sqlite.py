"""The calls as nodes of a LangGraph, which keeps the state after each step in a file of SQLite.

Each call is a node: an answer is stored even if another call of its wave fails. What LangGraph
leaves open is as it comes: the next step may start while the state of the last is being written.
"""

from __future__ import annotations

import asyncio
import operator
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from openai import AsyncOpenAI

from tests.bench.peers.rounds import given_calls, report
from tests.bench.replay import Body, repeat


class State(TypedDict):
    waves: list[list[Body]]
    answers: Annotated[list[str], operator.add]


def node(client: AsyncOpenAI, wave: int, seat: int) -> Callable[[State], Awaitable[Any]]:
    async def call(state: State) -> dict[str, list[str]]:
        reply = await repeat(client, state["waves"][wave][seat])
        return {"answers": [reply.text]}

    return call


def graph_of(client: AsyncOpenAI, sizes: list[int]) -> Any:
    """Return a graph with so many nodes in each wave; a wave starts when the last one is done."""
    graph = StateGraph(State)
    before: Any = START
    for wave, size in enumerate(sizes):
        names = [f"call-{wave}-{seat}" for seat in range(size)]
        for seat, name in enumerate(names):
            graph.add_node(name, node(client, wave, seat))
            graph.add_edge(before, name)
        before = names
    graph.add_edge(before, END)
    return graph


async def main() -> None:
    sizes = [len(wave) for wave in given_calls().waves]
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder:
        async with (
            AsyncOpenAI(max_retries=0) as client,
            AsyncSqliteSaver.from_conn_string(str(Path(folder) / "graph.sqlite")) as saver,
        ):
            graph = graph_of(client, sizes).compile(checkpointer=saver)

            async def deliberate(waves: list[list[Body]]) -> list[str]:
                thread = {"configurable": {"thread_id": uuid.uuid4().hex}}
                ended = await graph.ainvoke({"waves": waves, "answers": []}, thread)
                answers: list[str] = ended["answers"]
                return answers

            await report(deliberate)


if __name__ == "__main__":
    asyncio.run(main())
