"""The Definition of Ready: a story's text, scored against INVEST and its acceptance criteria.

The rules work on English words. They are deterministic, pure and linear in the text they read,
which is bounded: a brief of a megabyte costs no more than one that is slightly too long. A story
starts with 100 points; each finding names its cost and what to change.

The thresholds separate stories: a bare title stays below 50 (L0), a title with a good brief and no
acceptance criteria below 75 (L1), good criteria without naming for whom and why the story exists
reach at most 85 (L2), and 90 (L3) leaves room only for small wording problems.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from workflows.models.readiness import Finding, Readiness, StoryText

READ_CHARACTERS = 20_000
"""Characters of a brief that are read; a longer one is too long whatever it contains."""
READ_CRITERIA = 100
READ_CRITERION_CHARACTERS = 1_000

MIN_BRIEF_WORDS = 12
MAX_BRIEF_WORDS = 400
MIN_CRITERIA = 2
MAX_CRITERIA = 10
MIN_CRITERION_WORDS = 4
MIN_TITLE_WORDS = 3
MAX_TITLE_WORDS = 20


def _any_of(*phrases: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(phrases)})\b", re.IGNORECASE)


_WHO = _any_of(r"as an?", r"as the")
_WANT = _any_of(r"i want", r"i need", r"i can", r"i would like", r"we want", r"we need")
_WHY = _any_of(r"so that", r"in order to", r"because", r"so i can", r"so we can")
_VAGUE_TITLE = re.compile(
    r"(?:fix|change|update|improve|do|make|work on|misc|various)\s+"
    r"(?:it|this|that|things?|stuff|everything|some|misc|various|the (?:code|system|app))\b",
    re.IGNORECASE,
)
_VAGUE = _any_of(
    r"fast(?:er)?|quick(?:ly|er)?|slow(?:ly)?|eas(?:y|ily|ier)|simpl[ey]|intuitive(?:ly)?",
    r"(?:user-)?friendly|nice(?:ly|r)?|good|better|great|well|modern|seamless(?:ly)?|smooth(?:ly)?",
    r"robust(?:ly)?|flexibl[ey]|scalabl[ey]|efficient(?:ly)?|performant|reliabl[ey]|optimal(?:ly)?",
    r"appropriate(?:ly)?|adequate(?:ly)?|reasonabl[ey]|sufficient(?:ly)?|proper(?:ly)?|correct(?:ly)?",
    r"sometimes|several|various|etc|somehow|maybe|perhaps|possibly|probably|and/or|and so on",
    r"as needed|if possible|as soon as possible|best effort",
)
_UNDECIDED = re.compile(
    r"\b(?:tbd|tbc|todo|fixme|xxx|to be (?:decided|defined|determined|confirmed))\b|\?\?+",
    re.IGNORECASE,
)
_EPIC = _any_of(
    r"epic",
    r"(?:entire|whole|complete|full) (?:system|platform|application|app|product|website|site)",
    r"everything",
    r"all features",
    r"end-to-end solution",
    r"rewrite (?:it )?from scratch",
)
_DEPENDS = re.compile(
    r"(?<!not )(?<!n't )(?<!no longer )\b(?:depend(?:s|ing)? (?:up)?on|blocked by|blocked on|"
    r"waits? (?:for|until) (?:the )?(?:team|story|ticket|release)|"
    r"requires (?:the )?(?:story|ticket|issue)|"
    r"(?:after|once) (?:the )?(?:other )?(?:story|ticket|issue)|prerequisites?:?)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?;]\s|\n")
_DIGIT = re.compile(r"\d")


def score_story(text: StoryText) -> Readiness:
    """Score a story from 0 to 100, with findings; the same text always has the same score."""
    title = " ".join(text.title[:READ_CHARACTERS].split())
    brief = text.brief[:READ_CHARACTERS]
    criteria = [c[:READ_CRITERION_CHARACTERS] for c in text.acceptance_criteria[:READ_CRITERIA]]
    findings = [
        *_testable(criteria),
        *_valuable(title, brief),
        *_small(text, brief),
        *_clear(title, brief, criteria),
        *_independent("\n".join([title, brief, *criteria])),
    ]
    return Readiness(total=max(0, 100 - sum(f.weight for f in findings)), findings=findings)


def _testable(criteria: list[str]) -> Iterator[Finding]:
    if not criteria:
        yield Finding(
            code="AC_MISSING",
            weight=45,
            message="no acceptance criteria; add at least two that a test can verify, such as "
            "'Given ..., when ..., then ...'",
        )
        return
    if len(criteria) < MIN_CRITERIA:
        yield Finding(
            code="AC_MISSING",
            weight=10,
            message="one acceptance criterion; add at least one more, for a limit or a failure",
        )
    untestable = [n for n, c in enumerate(criteria, start=1) if not _verifiable(c)]
    if untestable:
        yield Finding(
            code="AC_MISSING",
            weight=max(1, round(30 * len(untestable) / len(criteria))),
            message=f"no test can verify acceptance criteria {_listed(untestable)}; say what is "
            "done and what is then returned, shown, stored or refused, and give numbers",
        )


def _verifiable(criterion: str) -> bool:
    return len(criterion.split()) >= MIN_CRITERION_WORDS and not _vague([criterion])


def _valuable(title: str, brief: str) -> Iterator[Finding]:
    words = len(title.split())
    if words < MIN_TITLE_WORDS or words > MAX_TITLE_WORDS or _VAGUE_TITLE.match(title):
        yield Finding(
            code="TITLE_VALUE",
            weight=10,
            message=f"the title names no value; say in {MIN_TITLE_WORDS} to {MAX_TITLE_WORDS} "
            "words what becomes possible, such as 'Limit each client's requests'",
        )
    voice = f"{title}\n{brief}"
    missing = [
        part
        for pattern, part in (
            (_WHO, "for whom ('As a ...')"),
            (_WANT, "what they want ('I want ...')"),
            (_WHY, "why ('so that ...')"),
        )
        if not pattern.search(voice)
    ]
    if missing:
        yield Finding(
            code="TITLE_VALUE",
            weight=5 * len(missing),
            message=f"the story does not say {', '.join(missing)}; begin the brief with "
            "'As a ..., I want ..., so that ...'",
        )


def _small(text: StoryText, brief: str) -> Iterator[Finding]:
    if len(text.brief) > READ_CHARACTERS or len(brief.split()) > MAX_BRIEF_WORDS:
        yield Finding(
            code="SMALL",
            weight=15,
            message=f"the brief has more than {MAX_BRIEF_WORDS} words; split the story, or move "
            "what is background elsewhere",
        )
    if len(text.acceptance_criteria) > MAX_CRITERIA:
        yield Finding(
            code="SMALL",
            weight=15,
            message=f"{len(text.acceptance_criteria)} acceptance criteria; more than "
            f"{MAX_CRITERIA} are more than one story: split it",
        )
    wants = len(_WANT.findall(brief))
    if wants > 2 or _EPIC.search(f"{text.title[:READ_CHARACTERS]}\n{brief}"):
        yield Finding(
            code="SMALL",
            weight=15,
            message="this reads like an epic; split it into stories that each bring one value",
        )


def _clear(title: str, brief: str, criteria: list[str]) -> Iterator[Finding]:
    words = len(brief.split())
    if words < MIN_BRIEF_WORDS:
        yield Finding(
            code="AMBIGUOUS",
            weight=20,
            message=f"a brief of {words} words is too short to estimate the story by; "
            f"say in {MIN_BRIEF_WORDS} or more what is there today and what is to change",
        )
    if vague := _vague([title, *_SENTENCE_END.split(brief)]):
        yield Finding(
            code="AMBIGUOUS",
            weight=min(4 * len(vague), 20),
            message=f"{_listed(vague)}: can be read in more than one way; "
            "give a number or an example",
        )
    if _UNDECIDED.search("\n".join([title, brief, *criteria])):
        yield Finding(
            code="AMBIGUOUS",
            weight=10,
            message="something is still to be decided (TBD, TODO, ??); decide it, or leave it out",
        )


def _vague(sentences: list[str]) -> list[str]:
    """Return the vague words, sorted. A number makes a word precise: "fast: within 200 ms"."""
    return sorted(
        {
            found.group().lower()
            for sentence in sentences
            if not _DIGIT.search(sentence)
            for found in _VAGUE.finditer(sentence)
        }
    )


def _independent(text: str) -> Iterator[Finding]:
    phrases = {" ".join(found.group().lower().split()) for found in _DEPENDS.finditer(text)}
    if phrases:
        yield Finding(
            code="DEPS",
            weight=15 if len(phrases) > 1 else 10,
            message=f"the story waits for something else ({_listed(sorted(phrases))}); "
            "do that first, or cut the story so that it stands alone",
        )


def _listed(items: list[int] | list[str], most: int = 5) -> str:
    shown = ", ".join(str(item) for item in items[:most])
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown
