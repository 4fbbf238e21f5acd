"""Whether a text says something: loops, copies, and the task's words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.substance import copied, is_about, loops, repeats_itself

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
    ("text", "about"),
    [
        (PROSE, True),
        ("Events of a story are stored.", True),
        ("The history of the Roman empire begins with a wolf.", False),
        ("Ordered lists are nice.", False),
    ],
)
def test_a_text_about_its_task_has_two_of_its_words(text: str, about: bool) -> None:
    assert is_about(text, "Store every event in the order of its story's changes.") is about


def test_a_task_of_few_words_says_nothing_about_a_text() -> None:
    assert is_about("The history of the Roman empire.", "Undo.")
