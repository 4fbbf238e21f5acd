"""Whether a text says something: repetition, copies, and the words that it shares with its task.

Everything here is a count of words, so that the same text always gets the same verdict. The share
of repeated word sequences is the usual measure of looping text ("seq-rep-n" in Welleck et al.,
Neural Text Generation with Unlikelihood Training, 2019, https://arxiv.org/abs/1908.04319).
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable

MIN_CHARACTERS = 40
"""A shorter text is too short to be a proposal or a critique."""

MIN_SOLUTION_CHARACTERS = 100
"""An agent whose solution is shorter, with its reasons, is asked for more."""

COPY_WORDS = 5
MAX_COPIED_OF_PROMPT = 0.3
MAX_COPIED_OF_ALL = 0.6
"""Word sequences of this length that also occur in a source; the largest share that may.

The prompt's own instructions may hardly be repeated. The task and what is known may: a correction
of a document repeats most of it.
"""

LOOP_WORDS = 6
LOOP_REPEATS = 3
MAX_LOOP_SHARE = 0.5
LOOP_WINDOW = 2_000
"""Prose loops if, in its last characters, more than this share of the sequences of so many words
occur so often."""

PERIODS = range(2, 401)
MIN_LOOP_PROSE = 160
MIN_LOOP_CODE = 1_000
"""A text loops also if it ends with one sequence of characters, repeated over so many. Code may
repeat a line or a number."""

MIN_COMPRESSION = 0.12
COMPRESSED_FROM = 600
"""Texts of at least so many bytes that zlib compresses below this share repeat themselves."""

TASK_WORDS = 2
ENOUGH_TASK_WORDS = 6
WORD_STEM = 5
"""Words of the task that a text must contain, and with how many it is wholly about the task. Words
are compared by their first characters."""

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Characters of Chinese and Japanese, which are written without spaces between words."""

_RUN = re.compile(rf"[{_UNSPACED}]{{2,}}")
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\W_])+")
_CODE = re.compile(r"^ {0,3}```.*?(?:^ {0,3}```|\Z)", re.DOTALL | re.MULTILINE)
_COMMON = frozenset(
    {
        *("about", "above", "after", "again", "against", "also", "because", "been", "before"),
        *("being", "below", "between", "both", "cannot", "could", "does", "doing", "down"),
        *("during", "each", "every", "from", "given", "have", "having", "here", "into", "itself"),
        *("make", "more", "most", "must", "need", "only", "other", "over", "same", "shall"),
        *("should", "since", "some", "story", "such", "task", "tasks", "than", "that", "their"),
        *("them", "then", "there", "these", "they", "this", "those", "through", "under", "until"),
        *("upon", "very", "want", "were", "what", "when", "where", "which", "while", "will"),
        *("with", "without", "work", "would", "your"),
    }
)
"""Words that any text may have."""


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case; of Chinese and Japanese, the characters."""
    return _WORD.findall(text.lower())


def sequences(words: list[str], length: int) -> list[tuple[str, ...]]:
    """Return every `length` words in a row."""
    return [tuple(words[at : at + length]) for at in range(len(words) - length + 1)]


def copied(text: str, sources: Iterable[str], length: int = COPY_WORDS) -> float:
    """Return the share of the text's word sequences that occur in one of the sources, 0 to 1."""
    own = sequences(words_of(text), length)
    if not own:
        return 0.0
    known = {each for source in sources for each in sequences(words_of(source), length)}
    return sum(each in known for each in own) / len(own)


def loops(text: str) -> bool:
    """Return whether the end of a text repeats itself, so that more of it would say nothing new."""
    prose = _CODE.sub(" ", text)[-LOOP_WINDOW:]
    return (
        _is_periodic(text[-LOOP_WINDOW:], MIN_LOOP_CODE)
        or _is_periodic(prose, MIN_LOOP_PROSE)
        or _repeats_words(prose)
    )


def repeats_itself(text: str) -> bool:
    """Return whether a whole text repeats itself."""
    data = text.encode()
    if len(data) >= COMPRESSED_FROM and len(zlib.compress(data)) / len(data) < MIN_COMPRESSION:
        return True
    return loops(text)


def task_words(task: str) -> set[str]:
    """Return the stems of the words that carry a task's meaning."""
    return _pairs(task) | {
        word[:WORD_STEM]
        for word in words_of(task)
        if len(word) >= 4 and word not in _COMMON and not word.isdigit()
    }


def shares_words(text: str, task: str) -> bool:
    """Return whether a text contains any of a task's words."""
    return bool(_shared(text, task_words(task)))


def relevance(text: str, task: str) -> float:
    """Return how much a text is about a task, 0 to 1, by the words of the task that it contains.

    0: it has fewer than TASK_WORDS of them. 1: it has ENOUGH_TASK_WORDS, or two thirds of a task
    with few words. It is 1 too if a task has so few that they say nothing about a text.
    """
    wanted = task_words(task)
    if len(wanted) < TASK_WORDS:
        return 1.0
    shared = len(_shared(text, wanted))
    if shared < TASK_WORDS:
        return 0.0
    enough = min(ENOUGH_TASK_WORDS, max(TASK_WORDS, len(wanted) * 2 // 3))
    return round(min(1.0, shared / enough), 2)


def _shared(text: str, stems: set[str]) -> set[str]:
    return stems & (_pairs(text) | {word[:WORD_STEM] for word in words_of(text)})


def _pairs(text: str) -> set[str]:
    """Return each two characters in a row that stand without spaces, as words do elsewhere."""
    return {run[at : at + 2] for run in _RUN.findall(text) for at in range(len(run) - 1)}


def size(text: str) -> int:
    """Return the characters of a text; one of Chinese or Japanese says as much as three others."""
    text = text.strip()
    return len(text) + 2 * sum(map(len, _RUN.findall(text)))


def without_contained(texts: Iterable[str]) -> list[str]:
    """Leave out texts that longer ones contain: a decision may be a sentence of the content."""
    kept: dict[str, str] = {}
    for text in sorted(texts, key=len, reverse=True):
        line = " ".join(text.split())
        if not any(line in longer for longer in kept):
            kept[line] = text
    return list(kept.values())


def _is_periodic(end: str, shortest: int) -> bool:
    for period in PERIODS:
        size = max(3 * period, shortest)
        if size > len(end):
            return False
        last = end[-size:]
        if last[period:] == last[:-period] and _WORD.search(last):
            return True
    return False


def _repeats_words(prose: str) -> bool:
    found = sequences(words_of(prose), LOOP_WORDS)
    counts = Counter(found)
    often = sum(count for count in counts.values() if count >= LOOP_REPEATS)
    return len(found) >= LOOP_WORDS * LOOP_REPEATS and often > MAX_LOOP_SHARE * len(found)
