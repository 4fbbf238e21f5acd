"""Proposals and critiques written as Markdown, read tolerantly.

A model writes text best as text (docs/design/0017-answers-as-text.md). What a reader needs apart,
such as decisions and a verdict, is read from headings and lists where the model wrote them. Where
it did not, `Draft.missing` is the short question that completes the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import ValidationError

from activities.checks.fences import code_blocks
from activities.substance import MAX_COPIED_OF_ALL, copied, shares_words, words_of
from workflows.models.agents import Critique, CritiquePoint, Decision, Proposal

LONGEST_TITLE = 300
LONGEST_LINE = 4_000
LONGEST_TEXT = 64_000
"""Characters: the limits of a Title, a Line and a text of the API."""

MAX_DECISIONS = 5
MAX_POINTS = 8
SENTENCES = 8
SHOWN_CHARACTERS = 80
"""Sentences of an answer from which decisions are chosen, and how much of each is shown again."""

MIN_SENTENCE_WORDS = 5
MAX_SENTENCE_CHARACTERS = 280

Verdict = Literal["accept", "revise", "reject"]
Severity = Literal["low", "medium", "high"]

_HEADING = re.compile(
    r"^ {0,3}(?:#{1,6}[ \t]+(\S.*)|\*\*([^*\n]{1,60})\*\*:?|([A-Z]\w{3,20}):)[ \t]*$"
)
_APPROACH = re.compile(r"(?i)^[\W\d]*(?:the\s+)?(?:approach|idea|summary|overview)\b")
_DECISIONS = re.compile(r"(?i)^[\W\d]*(?:key\s+|the\s+|our\s+|main\s+|design\s+)?decisions?\b")
_ITEM = re.compile(r"^ {0,3}(?:[-*+•]|\d{1,2}[.)])[ \t]+(.+)$")
_ANY_ITEM = re.compile(r"^([ \t]*)(?:[-*+•]|\d{1,2}[.)])[ \t]+(.+)$")
"""An item at any depth."""

_PARTS = re.compile(
    r"^(?:\*\*(?P<bold>.+?)\*\*[ \t]*[:.–—-]?"
    r"|(?P<plain>[^:\n]{3,120}?):(?=\s)"
    r"|(?P<dash>[^\n]{3,120}?)\s[–—-]\s)[ \t]*(?P<rest>.*)$",
    re.DOTALL,
)
_AFFECTS = re.compile(r"\baffects:?[ \t]+([^()\n]{1,300})\)?[ \t.]*$", re.IGNORECASE)
_AFFECTS_LINE = re.compile(r"(?i)^[*_]*affects[*_]*[ \t]*:[*_]*[ \t]*(.+)$")
_RATIONALE = re.compile(r"(?i)^[*_]*(?:rationale|reason|why)[*_]*[ \t]*:[*_]*[ \t]*")
_SENTENCE_END = re.compile(
    r"(?<=[.!?])[\"')\]*_`]*\s+(?=[\"'(*_`]*(?:[A-Z0-9]|[^\x00-\x7f]))|(?<=[。！？])\s*(?=\S)"
)
_CHATTER = re.compile(
    r"(?i)^\W*(?:sure|certainly|of course|thank|let me|here(?:'s| is| are)|this is|you(?:'re|r)?|i"
    r"|(?:the|my|this) (?:\w+ )?(?:task|question|answer|response|proposal|critique|suggestion|story"
    r"|solution)s?)\b"
)
"""Sentences that are about the answer, or to its reader, and decide nothing."""

_ABOUT_ANSWER = re.compile(
    r"(?i)\b(?:your|my) (?:\w+ ){0,2}"
    r"(?:solution|answer|response|proposal|critique|message|code)s?\b"
    r"|\b(?:improved|revised|updated|original|previous) (?:\w+ )?"
    r"(?:version|solution|answer|response|proposal|message|code|implementation)s?\b"
    r"|\bthe (?:critique|colleague|feedback)\b|^\W*(?:i'm (?:glad|happy|sorry)|you're)\b"
)
"""Sentences about an answer, such as small models write instead of a better one."""

MAX_ABOUT_ANSWER = 0.5
"""The largest share of a solution's sentences that may be about an answer."""

_VERDICT = re.compile(
    r"(?i)\bverdict\b[^\w(]{0,6}(?:\([^()\n]{0,60}\)\W{0,6})?\W{0,12}(?:is\W{1,5})?(accept|revise|reject)"
)
_VERDICTS = re.compile(r"(?i)\b(accept|revise|reject)")
_SEVERITY = re.compile(
    r"(?i)^\W{0,6}(?:severity\W{0,4})?(high|medium|low)\b"
    r"(?:\W{0,3}severity\b|(?=\s*(?:[:)\]*_.,;|–—]|-\s|$)))[\W_]*"
)
"""A severity ends at a sign: "High availability is missing" states none."""

_SUGGESTION = re.compile(r"(?i)^\W{0,6}suggestions?\b\W{0,6}")
_WRAPPER = re.compile(
    r"\A\s*(?:[^\n`~]{0,200}\n\s*)?(?P<fence>`{3,}|~{3,})(?:markdown|md)[ \t]*\n"
    r"(?P<text>.*)\n(?P=fence)\s*\Z",
    re.DOTALL,
)
_DATA_FENCE = re.compile(r"(?im)^[ \t]*</?data>[ \t]*$\n?")


@dataclass(frozen=True)
class Completion:
    """The question that completes an answer.

    Attributes:
        act: the prompt file.
        material: the variables of the file.
        schema: the JSON schema of its answer.
        complete: its answer, as JSON -> the fields of the whole; raises ValueError.
    """

    act: Literal["decide", "rate"]
    material: Mapping[str, str]
    schema: dict[str, Any]
    complete: Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Draft:
    """A text as it was read. `missing`: None if `fields` is the whole answer."""

    fields: dict[str, Any]
    missing: Completion | None = None


@dataclass(frozen=True)
class Asked:
    """What an answer is for.

    Attributes:
        given: what the agent was given, whose sentences are not its own.
        about: what the answer has to be about.
    """

    given: str = ""
    about: str = ""


UNKNOWN = Asked()


@dataclass(frozen=True)
class _Section:
    title: str
    heading: str
    lines: Sequence[str]


# --- proposals ------------------------------------------------------------------------------------


def proposal_draft(text: str, asked: Asked = UNKNOWN) -> Draft:
    """Read a proposal: its idea, its content, and its decisions if it has a list of them.

    Args:
        text: the answer.
        asked: what it is for. Sentences that are about something else are decisions only if no
            sentence is about it.

    Raises:
        ValueError: the text is empty.
    """
    text = without_preamble(without_wrapper(text))
    sections = _sections(text)
    approach = "\n".join(
        line for part in sections if _APPROACH.match(part.title) for line in part.lines
    ).strip()
    decisions = [
        decision
        for part in sections
        if _DECISIONS.match(part.title)
        for decision in _decisions(part.lines)
    ][:MAX_DECISIONS]
    content = "\n".join(_remaining(sections, bool(decisions))).strip()
    proposal = Proposal(
        approach=(approach or first_paragraph(content) or first_paragraph(text))[:LONGEST_TEXT],
        content=(content or text)[:LONGEST_TEXT],
        decisions=decisions,
    )
    if not proposal.content:
        raise ValueError("it has no text")
    statements = {} if decisions else dict(_statements(f"{approach}\n\n{content}"))
    own = [
        (sentence, rest)
        for sentence, rest in statements.items()
        if copied(sentence, [asked.given]) <= MAX_COPIED_OF_ALL
    ]
    about = [statement for statement in own if shares_words(statement[0], asked.about)]
    sentences = (about or own)[:SENTENCES]
    return Draft({"proposal": proposal}, _choice(proposal, sentences) if sentences else None)


def _remaining(sections: Sequence[_Section], has_decisions: bool) -> Iterator[str]:
    """Yield the lines that are neither the idea nor decisions that were read."""
    for part in sections:
        if _APPROACH.match(part.title) or (has_decisions and _DECISIONS.match(part.title)):
            continue
        if part.heading:
            yield part.heading
        yield from part.lines


def _decisions(lines: Sequence[str]) -> Iterator[Decision]:
    for item in _items(lines):
        head, *nested = item.split("\n")
        at_end = _AFFECTS.search(head)
        stated = head[: at_end.start()].rstrip(" \t(") if at_end else head
        affects = at_end or next(filter(None, map(_AFFECTS_LINE.match, nested)), None)
        reasons = [_RATIONALE.sub("", line) for line in nested if not _AFFECTS_LINE.match(line)]
        parts = _PARTS.match(stated)
        titles = (parts["bold"], parts["plain"], parts["dash"]) if parts else (stated,)
        title = next(filter(None, titles), "")
        rationale = " ".join([parts["rest"].strip() if parts else "", *reasons]).strip()
        if title := title.strip(" *_:.-"):
            yield Decision(
                title=title[:LONGEST_TITLE],
                rationale=rationale[:LONGEST_LINE],
                affects=_names(affects[1]) if affects else [],
            )


def _names(text: str) -> list[str]:
    names = (name.strip(" .`*") for name in re.split(r",|;|\band\b", text))
    return [name[:LONGEST_TITLE] for name in names if name][:10]


def _choice(proposal: Proposal, sentences: Sequence[tuple[str, str]]) -> Completion:
    """Return the question which of the answer's own sentences are decisions."""
    numbers = list(range(1, len(sentences) + 1))

    def complete(answer: Any) -> dict[str, Any]:
        chosen = answer.get("decisions") if isinstance(answer, dict) else None
        if not isinstance(chosen, list) or not chosen or any(n not in numbers for n in chosen):
            raise ValueError(f"decisions: must be numbers from 1 to {len(numbers)}")
        decisions = [
            Decision(title=sentences[n - 1][0], rationale=sentences[n - 1][1])
            for n in dict.fromkeys(chosen)
        ]
        return {"proposal": proposal.model_copy(update={"decisions": decisions[:MAX_DECISIONS]})}

    schema = _object(
        decisions={"type": "array", "items": {"enum": numbers}, "minItems": 1, "maxItems": 3}
    )
    listed = _numbered(sentence for sentence, _ in sentences)
    return Completion("decide", {"sentences": listed}, schema, complete)


def _statements(markdown: str) -> Iterator[tuple[str, str]]:
    """Yield each sentence that states something, with the rest of its paragraph."""
    for paragraph in paragraphs(without_code(markdown)):
        sentences = [each.strip() for each in _SENTENCE_END.split(paragraph) if each.strip()]
        for at, sentence in enumerate(sentences):
            words = words_of(sentence)
            fits = len(words) >= MIN_SENTENCE_WORDS and len(sentence) <= MAX_SENTENCE_CHARACTERS
            if fits and sentence.endswith((".", "!", "。", "！")) and not _CHATTER.match(sentence):
                yield sentence, " ".join(sentences[at + 1 :])[:LONGEST_LINE]


# --- critiques ------------------------------------------------------------------------------------


def critique_draft(text: str, asked: Asked = UNKNOWN) -> Draft:
    """Read a critique: its points with their severities, the suggestion, and the verdict.

    Args:
        text: the answer.
        asked: what it is for.

    Raises:
        ValueError: the text has no points, or its verdict contradicts them.
    """
    text = without_wrapper(text)
    verdict = _stated_verdict(text)
    body, suggestion = _without_suggestions(text)
    points = list(_points(body))[:MAX_POINTS]
    if not points:
        raise ValueError("it names no point; list the proposal's faults, or what makes it good")
    severities = [found[1].lower() if (found := _SEVERITY.match(p)) else "" for p in points]
    texts = [_SEVERITY.sub("", p, count=1).strip() or p for p in points]
    if verdict and all(severities):
        return Draft(_critique(texts, severities, verdict, suggestion))
    return Draft({}, _rating(texts, suggestion))


def _critique(
    points: Sequence[str], severities: Sequence[str], verdict: str, suggestion: str
) -> dict[str, Any]:
    """Build a critique.

    Raises:
        ValueError: the verdict accepts in spite of a point of high severity.
    """
    if verdict == "accept" and "high" in severities:
        worst = points[list(severities).index("high")]
        raise ValueError(
            f'verdict: "accept" contradicts the point of high severity "{worst[:200]}"; '
            "change the verdict, or the severity"
        )
    return {
        "critique": Critique(
            verdict=cast(Verdict, verdict),
            points=[
                CritiquePoint(severity=cast(Severity, severity), text=text[:LONGEST_TEXT])
                for severity, text in zip(severities, points, strict=True)
            ],
            suggestion=suggestion[:LONGEST_TEXT],
        )
    }


def _rating(points: Sequence[str], suggestion: str) -> Completion:
    """Return the question how bad each point is, and what follows."""

    def complete(answer: Any) -> dict[str, Any]:
        found = answer if isinstance(answer, dict) else {}
        severities, verdict = found.get("severities"), found.get("verdict")
        if not isinstance(severities, list) or len(severities) != len(points):
            raise ValueError(f"severities: must have {len(points)} values, one for each point")
        if not isinstance(verdict, str):
            raise ValueError("verdict: must be accept, revise or reject")
        try:
            return _critique(points, severities, verdict, suggestion)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"{first['loc'][-1]}: {first['msg']}") from error

    def rated(severities: Sequence[str], verdicts: Sequence[str]) -> dict[str, Any]:
        count = {"minItems": len(points), "maxItems": len(points)}
        return _object(
            severities={"type": "array", "items": {"enum": list(severities)}, **count},
            verdict={"enum": list(verdicts)},
        )

    # A verdict that contradicts a severity cannot be decoded.
    schema = {
        "anyOf": [
            rated(["low", "medium", "high"], ["revise", "reject"]),
            rated(["low", "medium"], ["accept"]),
        ]
    }
    listed = "\n".join(
        f"{n}. {point[:SHOWN_CHARACTERS]}" for n, point in enumerate(points, start=1)
    )
    return Completion("rate", {"points": listed}, schema, complete)


def _points(text: str) -> Iterator[str]:
    """Yield the items of the critique's lists; without a list, its paragraphs."""
    body = _VERDICT.sub("", text)
    lines = body.splitlines()
    items = [" ".join(item.split("\n")) for item in _items(lines) if item.strip(" *_:.-")]
    if items:
        yield from items
        return
    for paragraph in paragraphs(without_code(body)):
        if len(words_of(paragraph)) >= MIN_SENTENCE_WORDS:
            yield paragraph


def _stated_verdict(text: str) -> str:
    """Return the last verdict; empty if its line names another one too."""
    stated = [*_VERDICT.finditer(text)]
    if not stated:
        return ""
    line = text[stated[-1].start(1) :].partition("\n")[0]
    words = {word.lower() for word in _VERDICTS.findall(line)}
    return words.pop() if len(words) == 1 else ""


def _without_suggestions(text: str) -> tuple[str, str]:
    """Split a critique into what is not a suggestion, and its suggestions."""
    lines, kept, suggested, at = text.splitlines(), list[str](), list[str](), 0
    while at < len(lines):
        found = _SUGGESTION.match(lines[at])
        end = _end_of_suggestion(lines, at, lines[at][found.end() :]) if found else at + 1
        if found:
            suggested.append("\n".join([lines[at][found.end() :], *lines[at + 1 : end]]))
        kept.append("" if found else lines[at])
        at = end
    words = (_VERDICT.sub("", each).strip(" *_#\n") for each in suggested)
    return "\n".join(kept), "\n".join(filter(None, words))


def _end_of_suggestion(lines: Sequence[str], at: int, words: str) -> int:
    """Return where a suggestion ends: as a section, as an item of a list, or as a paragraph."""
    item = _ANY_ITEM.match(lines[at])
    depth = _depth(lines[at])
    is_section = not words.strip(" *_:#") and not item
    for end in range(at + 1, len(lines)):
        line = lines[end]
        if _HEADING.match(line) or _VERDICT.search(line):
            return end
        if is_section:
            continue
        is_deeper = _depth(line) > depth
        if not line.strip() or (not is_deeper and (item or depth or _ANY_ITEM.match(line))):
            return end
    return len(lines)


# --- Markdown -------------------------------------------------------------------------------------


def without_wrapper(text: str) -> str:
    """Remove a fence around the whole answer, and fences of the prompt that the model copied."""
    wrapped = _WRAPPER.match(text)
    return _DATA_FENCE.sub("", wrapped["text"] if wrapped else text).strip()


def without_preamble(text: str) -> str:
    """Remove first paragraphs that only talk about the answer, if an answer follows them."""
    left = text
    while True:
        first, _, rest = left.partition("\n\n")
        if _HEADING.match(first) or not rest.strip() or not is_about_answer(first):
            return left
        left = rest.lstrip("\n")


def is_about_answer(paragraph: str) -> bool:
    """Return whether a paragraph introduces or praises an answer, and says nothing else."""
    sentences = [each.strip() for each in _SENTENCE_END.split(paragraph) if each.strip()]
    return bool(sentences) and all(
        _ABOUT_ANSWER.search(each) or (each.endswith(":") and _CHATTER.match(each))
        for each in sentences
    )


def talks_about_answer(markdown: str) -> bool:
    """Return whether a text without code is mostly about an answer, and not about its task."""
    if code_blocks(markdown):
        return False
    sentences = [
        sentence
        for paragraph in paragraphs(markdown)
        for sentence in _SENTENCE_END.split(paragraph)
        if sentence.strip()
    ]
    about = sum(bool(_ABOUT_ANSWER.search(sentence)) for sentence in sentences)
    return about > MAX_ABOUT_ANSWER * len(sentences)


def complete_part(text: str) -> str:
    """Return a text that was cut off, up to its last whole sentence, line or block."""
    lines = text.splitlines()
    fences = [n for n, line in enumerate(lines) if line.lstrip().startswith("```")]
    if len(fences) % 2:
        lines = lines[: fences[-1]]
    elif lines and fences[-1:] != [len(lines) - 1]:
        ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", lines[-1])]
        lines[-1] = lines[-1][: ends[-1]] if ends else ""
    while lines and (not lines[-1].strip() or _HEADING.match(lines[-1])):
        lines.pop()
    return "\n".join(lines).strip()


def without_code(markdown: str) -> str:
    """Return the text without its code blocks; a blank line is in their place."""
    lines = markdown.splitlines()
    for block in code_blocks(markdown):
        first = max(block.line - 2, 0)
        for at in range(first, min(block.line + block.lines, len(lines))):
            lines[at] = ""
    return "\n".join(lines)


def paragraphs(markdown: str) -> Iterator[str]:
    """Yield the paragraphs and list items of a text, each as one line, without headings."""
    waiting: list[str] = []
    for line in [*markdown.splitlines(), ""]:
        item = _ITEM.match(line)
        is_break = not line.strip() or item or _HEADING.match(line) or line.startswith("|")
        if is_break and waiting:
            yield " ".join(waiting)
            waiting = []
        if item:
            waiting = [item[1].strip()]
        elif line.strip() and not is_break:
            waiting.append(line.strip())


def first_paragraph(markdown: str) -> str:
    """Return the first paragraph, or an empty text."""
    return next(paragraphs(without_code(markdown)), "")


def _items(lines: Sequence[str]) -> Iterator[str]:
    """Yield the items of lists. What continues an item is in its line, a nested item in its own."""
    item, depth, is_apart = "", 0, False
    for line in lines:
        found = _ANY_ITEM.match(line)
        is_nested = bool(item) and _depth(line) > depth + bool(found)
        if found and not is_nested:
            if item:
                yield item
            item, depth = found[2].strip(), _depth(line)
        elif found:
            item = f"{item}\n{found[2].strip()}"
        elif item and line.strip():
            if is_apart and not is_nested:
                yield item
                item = ""
            else:
                item = f"{item} {line.strip()}"
        is_apart = not line.strip()
    if item:
        yield item


def _depth(line: str) -> int:
    """Return the number of columns by which a line is indented."""
    indented = line.expandtabs(4)
    return len(indented) - len(indented.lstrip())


def _sections(markdown: str) -> list[_Section]:
    """Split at headings outside code; the first section has no title."""
    lines = markdown.splitlines()
    in_code = [False] * len(lines)
    for block in code_blocks(markdown):
        for at in range(max(block.line - 2, 0), min(block.line + block.lines, len(lines))):
            in_code[at] = True
    starts = [(0, "")]
    for at, line in enumerate(lines):
        if not in_code[at] and (found := _HEADING.match(line)):
            starts.append((at, next(filter(None, found.groups())).strip(" \t#")))
    ends = [at for at, _ in starts[1:]] + [len(lines)]
    return [
        _Section(title, lines[at] if title else "", lines[at + bool(title) : end])
        for (at, title), end in zip(starts, ends, strict=True)
    ]


def _numbered(texts: Iterable[str]) -> str:
    return "\n".join(f"{n}. {text[:SHOWN_CHARACTERS]}" for n, text in enumerate(texts, start=1))


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
