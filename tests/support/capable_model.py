"""A model that can build the story deploy/examples/stories/retry-after.json, by scripts.

It answers `next_action` as a developer, a tester or a writer does: it looks, edits, runs the tests
and finishes. Its commands run in the sandbox, and what it reads of them decides nothing.
"""

from __future__ import annotations

from typing import Any

from tests.support.llm_server import Call
from tests.support.scripted_model import FINISH, ScriptedModel, replace, run, write

MIDDLEWARE = "src/ratelimit/middleware.py"
PYTEST = "python -m pytest -q -p no:cacheprovider"

DEVELOPER_TEST = '''"""When a refused client may come back."""

from typing import Any

from ratelimit import RateLimiter, limited


def test_a_refused_client_gets_the_seconds_to_wait() -> None:
    answers: list[Any] = []
    application = limited(lambda *_: [b"hello"], RateLimiter(1, 0.4, lambda: 0.0))
    for _ in range(2):
        application({"REMOTE_ADDR": "192.0.2.1"}, lambda *answer: answers.append(answer))

    assert dict(answers[-1][1])["Retry-After"] == "3"
'''

ACCEPTANCE_TESTS = '''"""The acceptance criteria of the Retry-After header."""

from typing import Any

from ratelimit import RateLimiter, limited


class Service:
    """A limited application, on a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 0.0
        limiter = RateLimiter(1, 0.1, lambda: self.now)
        self.application = limited(self.hello, limiter)

    def hello(self, environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"hello"]

    def get(self) -> tuple[str, dict[str, str]]:
        answer: list[Any] = []
        self.application({"REMOTE_ADDR": "192.0.2.1"}, lambda *given: answer.extend(given))
        return answer[0], dict(answer[1])


def test_ac1_a_refused_client_gets_whole_seconds_rounded_up() -> None:
    service = Service()
    service.get()
    service.now = 0.5

    assert service.get()[1]["Retry-After"] == "10"


def test_ac2_after_these_seconds_the_answer_is_200() -> None:
    service = Service()
    service.get()

    service.now += int(service.get()[1]["Retry-After"])

    assert service.get()[0] == "200 OK"


def test_ac3_the_seconds_become_less_while_the_client_waits() -> None:
    service = Service()
    service.get()
    first = int(service.get()[1]["Retry-After"])

    service.now += 4

    assert int(service.get()[1]["Retry-After"]) == first - 4
'''

DEVELOPER = [
    run(f"cat {MIDDLEWARE} && ls tests tests/unit"),
    replace(
        MIDDLEWARE,
        "from collections.abc import Iterable",
        "import math\nfrom collections.abc import Iterable",
    ),
    replace(
        MIDDLEWARE,
        '        if limiter.wait_for(environ.get("REMOTE_ADDR", "")) == 0:\n'
        "            return application(environ, start_response)\n"
        '        headers = [("Content-Type", "text/plain; charset=utf-8")]\n',
        '        wait = limiter.wait_for(environ.get("REMOTE_ADDR", ""))\n'
        "        if wait == 0:\n"
        "            return application(environ, start_response)\n"
        "        headers = [\n"
        '            ("Content-Type", "text/plain; charset=utf-8"),\n'
        '            ("Retry-After", str(math.ceil(wait))),\n'
        "        ]\n",
    ),
    write("tests/unit/test_retry_after.py", DEVELOPER_TEST),
    run(f"{PYTEST} tests/unit"),
]
TESTER = [
    write("tests/acceptance/test_criteria.py", ACCEPTANCE_TESTS),
    run(f"{PYTEST} tests/acceptance"),
]
WRITER = [
    replace(
        "README.md",
        "Tests: `tests/unit`",
        "An answer 429 has the header `Retry-After` with the whole seconds to wait.\n\n"
        "Tests: `tests/unit`",
    )
]
SCRIPTS = {"DEV": DEVELOPER, "QA": TESTER}
MARKS = {
    "DEV": "math.ceil(wait)",
    "QA": "test_ac2_after_these_seconds",
    "": "An answer 429 has the header",
}
"""Role -> a text that the files have once its work is done."""

DECISION = {
    "title": "Round up the seconds of Retry-After",
    "rationale": "A client that comes back after fewer seconds would be refused again.",
    "affects": [],
}

PLAN = {
    "tasks": [
        {
            "role": "DEV",
            "title": "Send Retry-After with a 429",
            "description": "Let the middleware send the seconds that a refused client has to wait.",
            "depends_on": [],
            "priority": 1,
        }
    ]
}


class CapableModel:
    """Plays the role that a prompt asks for; work that is done already is finished at once."""

    def __call__(self, call: Call) -> dict[str, Any]:
        """Answer a call of `next_action`."""
        role = next((each for each in SCRIPTS if f"in the {each} council" in call.prompt), "")
        answer = ScriptedModel(SCRIPTS.get(role, WRITER))(call)
        if "## Step 1" not in call.prompt and MARKS.get(role, MARKS[""]) in call.prompt:
            answer = FINISH  # the files that the prompt shows have the work already
        if answer is FINISH and role == "DEV":
            return FINISH | {"decisions": [DECISION]}
        return answer
