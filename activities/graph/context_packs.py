"""Context packs: what an agent knows about a story, by role and phase.

Each scope of the role and phase is lines of Markdown, most relevant first. A pack keeps as many
lines as its budget allows, and drops the last line of the least relevant scope first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import ceil

from activities.graph.scope_reads import READS, ScopeSection
from activities.graph.scopes import Scopes
from workflows.models.base import content_hash
from workflows.models.context import ContextPack, PackQuery

BYTES_PER_TOKEN = 2.5
"""UTF-8 bytes per token; see `count_tokens`."""

LONGEST_SHARE = 4
"""One line takes at most a quarter of the budget, so that no text displaces all others."""


def count_tokens(text: str) -> int:
    """Estimate the number of tokens without a tokenizer: UTF-8 bytes divided by 2.5.

    Measured with the tokenizer of SmolLM2: 3.0 bytes a token in packs like ours, 2.6 in Python and
    German, 2.4 in Russian, 2.0 in Chinese, 1.0 in bare digits. So the estimate is too high for
    packs in English; a larger vocabulary needs even fewer tokens.
    """
    return ceil(len(text.encode()) / BYTES_PER_TOKEN)


def with_summary(sections: Sequence[ScopeSection], summary: str) -> list[ScopeSection]:
    """Insert a summary of the story before the last answer of a council."""
    return [
        section._replace(lines=[summary, *section.lines])
        if summary and section.scope == "SUMMARY_LAST"
        else section
        for section in sections
    ]


def assemble(
    config: Scopes,
    query: PackQuery,
    token_budget: int,
    sections: Sequence[ScopeSection],
    redact: Callable[[str], str] = str,
) -> ContextPack:
    """Build the largest pack of these sections, most relevant first, that fits the budget.

    The system block is always included, so a budget that is smaller is exceeded. The pack's
    `scopes` are those that kept a line, or had no lines.

    Args:
        config: the scopes file.
        query: the story, role and phase.
        token_budget: the pack's size in tokens.
        sections: the sections, most relevant first.
        redact: removes secrets from each line before it is cut, because no rule detects half of a
            secret.
    """
    role = config.role(query.role)
    of_story = f" It is about story {query.story_id}." if query.story_id else ""
    in_phase = f" Phase: {query.phase}." if query.phase else ""
    system = f"You are an agent of the {role} council.{of_story}{in_phase}"
    tools = config.tools if query.story_id else ""
    if count_tokens(system) + count_tokens(tools) > token_budget:
        tools = ""
    room = token_budget - count_tokens(system) - count_tokens(tools)
    longest = int(token_budget * BYTES_PER_TOKEN / LONGEST_SHARE)
    lines = [
        (section, _cut(redact(line), longest)) for section in sections for line in section.lines
    ]
    kept = bisect_right(
        range(1, len(lines) + 1), room, key=lambda count: count_tokens(_render(lines[:count]))
    )
    context = _render(lines[:kept])
    there = {section.scope for section, _ in lines[:kept]}
    return ContextPack(
        system=system,
        context=context,
        tools=tools,
        scopes=[
            section.scope for section in sections if section.scope in there or not section.lines
        ],
        token_count=sum(count_tokens(block) for block in (system, context, tools)),
        version=content_hash([system, context, tools]),
    )


def _render(lines: Sequence[tuple[ScopeSection, str]]) -> str:
    text: list[str] = []
    scope = ""
    for section, line in lines:
        if section.scope != scope:
            scope = section.scope
            text.append(f"## {READS[section.scope].heading}")
        text.append(line)
    return "\n".join(text)


def _cut(line: str, longest: int) -> str:
    """Join the line's words in one paragraph, and cut it to at most `longest` UTF-8 bytes."""
    text = " ".join(line.split())
    if len(text.encode()) <= longest:
        return text
    return text.encode()[: max(0, longest - 3)].decode(errors="ignore") + "…"
