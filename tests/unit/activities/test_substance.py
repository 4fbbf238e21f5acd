"""Whether a text says something: loops, copies, and the task's words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.substance import (
    copied,
    loops,
    relevance,
    repeats_itself,
    shares_words,
    size,
)

PROSE = """\
The outbox is a table in the same database as the story. A change of state appends a row in the
transaction that makes the change, so a crash between the two cannot lose an event. A job reads the
rows in order, publishes each to the stream, and marks it as sent once the server has confirmed it.
If the server is away, the job waits and tries again; the order of a story's events is kept, because
one job handles one story at a time. Subscribers drop an event whose id they have seen.
"""
TESTS = "\n".join(
    f"    def test_a_limit_of_{n}(self) -> None:\n"
    f"        response = self.client.get('/items?limit={n}')\n"
    "        self.assertEqual(response.status_code, 200)\n"
    for n in range(12)
)
ROWS = "\n".join(f"| item {n} | {n * 7} |" for n in range(60))
CRITERIA = "\n".join(
    f"- Given a user who is signed in, when they ask for {what}, then the answer names the {what}"
    for what in ("orders", "invoices", "addresses of others", "a refund", "deleted items", "help")
)


def fenced(code: str) -> str:
    return f"It is done so:\n\n```python\n{code}\n```\n"


@pytest.mark.parametrize(
    "text",
    ["", PROSE, fenced(TESTS), fenced(TESTS)[:-4], ROWS, CRITERIA, "-" * 700, fenced("0, " * 300)],
)
def test_prose_code_and_tables_do_not_loop(text: str) -> None:
    assert not loops(text)


@pytest.mark.parametrize(
    "sentence",
    [
        "The one you're looking at is the story of how this came to be: ",
        "It goes on and on. ",
        "- The system must be able to handle the number of requests that it gets.\n",
    ],
)
def test_a_repeated_sentence_is_a_loop(sentence: str) -> None:
    assert loops(PROSE + sentence * 20)
    assert repeats_itself(PROSE + sentence * 20)


def test_code_that_repeats_a_line_without_end_is_a_loop() -> None:
    assert loops(fenced("total = total + count[0]\n" * 100)[:-6])


def test_a_loop_with_small_changes_is_found() -> None:
    text = "".join(
        f"{n}. The service must answer every request of the client within the given time. "
        for n in range(12)
    )

    assert loops(text)


@given(st.text(alphabet="ab \n", max_size=400))
def test_a_text_written_twice_repeats_no_less(text: str) -> None:
    if loops(text):
        assert loops(text + text)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Store every event in the order of its story.", 1.0),
        ("Append a row in the transaction that makes the change.", 0.0),
        ("too short to tell", 0.0),
        ("Store every event in the order of its arrival at the server", 4 / 7),
    ],
)
def test_the_share_of_copied_word_sequences(text: str, share: float) -> None:
    found = copied(text, ["Write it down.", "Store every event in the order of its story."])

    assert found == pytest.approx(share, abs=0.2)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (PROSE, 1.0),
        ("Events are stored in order.", 1.0),
        ("Events of a story are stored.", 1.0),
        ("The history of the Roman empire begins with a wolf.", 0.0),
        ("Ordered lists are nice.", 0.0),
    ],
)
def test_a_text_about_its_task_has_two_of_its_words(text: str, score: float) -> None:
    assert relevance(text, "Store every event in the order of its story's changes.") == score


def test_a_text_with_more_of_the_tasks_words_is_more_about_it() -> None:
    task = "Sign in by password: issue, refresh and revoke access tokens; expired tokens get 401."
    texts = ["A password is issued.", "A password is issued, then revoked.", task]

    assert [relevance(text, task) for text in texts] == [0.4, 0.6, 1.0]


def test_a_task_of_few_words_says_nothing_about_a_text() -> None:
    assert relevance("The history of the Roman empire.", "Undo.") == 1.0


@pytest.mark.parametrize(
    ("sentence", "shares"), [("Undo is a stack.", True), ("My name is Alex.", False)]
)
def test_a_sentence_shares_words_with_its_task(sentence: str, shares: bool) -> None:
    assert shares_words(sentence, "Undo the last change.") is shares


def test_chinese_texts_are_compared_by_pairs_of_characters() -> None:
    task = "设计一个分布式限流器，支持按客户端限流，并且在网关重启后保持计数。"
    about = "每个客户端有一个令牌桶，限流器把计数保存在网关之外，重启以后继续。" * 2

    assert relevance(about, task) == 1.0
    assert relevance("今天天气很好，我们去公园散步，然后回家吃饭。", task) == 0.0
    assert size(about[:33]) >= 90
    assert size("今天 ok") == len("今天 ok") + 4
