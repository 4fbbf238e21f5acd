"""A node of the graph and its neighbourhood, for readers that are not agents.

Any system may have written the nodes and properties: every value is shown as text, and no value is
an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, LiteralString, NamedTuple

from neo4j import AsyncManagedTransaction

NODES_AT_MOST = 200
EDGES_AT_MOST = 2_000
"""Limits in addition to the node itself; the nearest nodes are shown."""

_SHOWN: LiteralString = (
    " AND coalesce(n.status, '') <> 'DELETED' "
    "RETURN elementId(n) AS key, labels(n) AS labels, properties(n) AS properties "
    "ORDER BY key LIMIT 1"
)

LOOK_UPS: dict[str, tuple[LiteralString, ...]] = {
    "PROJECT": ("MATCH (n:Project) WHERE $id IN [n.id, n.project_id]" + _SHOWN,),
    "EPIC": ("MATCH (n:Epic) WHERE $id IN [n.id, n.epic_id]" + _SHOWN,),
    "STORY": (
        "MATCH (n:Case) WHERE n.id = $id" + _SHOWN,
        "MATCH (n:Story) WHERE n.id = $id" + _SHOWN,
        "MATCH (n:Case|Story) WHERE $id IN [n.case_id, n.story_id]" + _SHOWN,
    ),
    "TASK": (
        "MATCH (n:Subtask) WHERE n.id = $id" + _SHOWN,
        "MATCH (n:Subtask|Task) WHERE $id IN [n.id, n.sub_id, n.subtask_id, n.task_id]" + _SHOWN,
    ),
}
"""Type -> the queries that look up a node, in turn: by our key first, then by others'."""

TYPES = {"Project": "Project", "Epic": "Epic", "Case": "Story", "Story": "Story"} | dict.fromkeys(
    ("Subtask", "Task"), "Task"
)
"""Label -> the displayed type; any other label is displayed as it is."""

TITLES = ("title", "name", "event_type", "gate", "approach")

NEIGHBOURS: LiteralString = """
MATCH (n)-[]-(m)
WHERE elementId(n) IN $frontier AND NOT elementId(m) IN $seen
  AND coalesce(m.status, '') <> 'DELETED'
RETURN DISTINCT elementId(m) AS key, labels(m) AS labels, properties(m) AS properties
ORDER BY key LIMIT $limit
"""

EDGES: LiteralString = """
MATCH (n)-[r]->(m) WHERE elementId(n) IN $keys AND elementId(m) IN $keys
RETURN elementId(n) AS source, elementId(m) AS target, type(r) AS type, properties(r) AS properties
ORDER BY source, target, type LIMIT $limit
"""


class Node(NamedTuple):
    """A node as displayed."""

    id: str
    labels: list[str]
    properties: dict[str, str]
    type: str
    title: str


class Edge(NamedTuple):
    """A relationship between two displayed nodes, by their ids."""

    source: str
    target: str
    type: str
    properties: dict[str, str]


class Neighbourhood(NamedTuple):
    """A node, its neighbours, and whether some were left out."""

    node: Node
    neighbours: list[Node]
    edges: list[Edge]
    cut: bool


async def read_neighbourhood(
    tx: AsyncManagedTransaction,
    node_type: str,
    node_id: str,
    depth: int,
    redact: Callable[[str], str],
) -> Neighbourhood | None:
    """Read a node and all nodes at most `depth` steps away; return None if it does not exist.

    Args:
        tx: used for reads only.
        node_type: one of LOOK_UPS.
        node_id: its id, or another system's key.
        depth: 1 or more.
        redact: removes secrets from a text.
    """
    found = None
    for look_up in LOOK_UPS[node_type]:
        found = found or await (await tx.run(look_up, id=node_id)).single()
    if found is None:
        return None
    nodes = {found["key"]: _node(found.data(), redact)}
    frontier, cut = [found["key"]], False
    for _ in range(depth):
        room = NODES_AT_MOST + 1 - len(nodes)
        result = await tx.run(NEIGHBOURS, frontier=frontier, seen=list(nodes), limit=room + 1)
        near = await result.data()
        cut = len(near) > room
        frontier = [row["key"] for row in near[:room]]
        nodes |= {row["key"]: _node(row, redact) for row in near[:room]}
        if cut or not frontier:
            break
    rows = await (await tx.run(EDGES, keys=list(nodes), limit=EDGES_AT_MOST + 1)).data()
    edges = [
        Edge(
            nodes[row["source"]].id,
            nodes[row["target"]].id,
            row["type"],
            _texts(row["properties"], redact),
        )
        for row in rows[:EDGES_AT_MOST]
    ]
    node, *neighbours = nodes.values()
    return Neighbourhood(node, neighbours, edges, cut or len(rows) > EDGES_AT_MOST)


def _node(row: dict[str, Any], redact: Callable[[str], str]) -> Node:
    properties = _texts(row["properties"], redact)
    labels = sorted(row["labels"])
    named = next((properties[key] for key in TITLES if properties.get(key)), "")
    key = next((properties[key] for key in _keys(labels) if properties.get(key)), row["key"])
    label = next((label for label in labels if label in TYPES), labels[0] if labels else "")
    return Node(key, labels, properties, TYPES.get(label, label), named or key)


def _keys(labels: list[str]) -> list[str]:
    """Return the properties that may be the id of a node with these labels."""
    if {"Case", "Story"} & set(labels):
        return ["id", "case_id", "story_id"]
    return ["id", *(f"{label.lower()}_id" for label in labels), "sub_id", "task_id", "role"]


def _texts(properties: dict[str, Any], redact: Callable[[str], str]) -> dict[str, str]:
    return {name: redact(as_text(value)) for name, value in properties.items() if value is not None}


def as_text(value: Any) -> str:
    """Convert a property's value: texts unchanged, times in ISO 8601, the rest as JSON."""
    match value:
        case str():
            return value
        case bool() | int() | float() | list() | dict():
            return json.dumps(value, ensure_ascii=False, default=as_text)
    iso_format = getattr(value, "iso_format", None)  # Neo4j's times and durations
    return str(iso_format() if iso_format else value)
