"""What a model thinks before its answer, on endpoints that do not separate the two."""

import pytest

from activities.agents.response_schemas import without_thoughts


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nThey want a limit.\n</think>\n\n# Limit", "# Limit"),
        ("They want a limit.</think># Limit", "# Limit"),
        ("<think>\nThey want a limit, so the form is", ""),
        ('<THINKING>The form is {"winner_id": "a1"}. Hmm', ""),
        ("# Limit\n\nThink first.", "# Limit\n\nThink first."),
        (
            '{"action": "write", "content": "</think>"}',
            '{"action": "write", "content": "</think>"}',
        ),
    ],
)
def test_only_what_follows_the_thoughts_is_the_answer(text: str, answer: str) -> None:
    assert without_thoughts(text) == answer
