"""The activity check_proposal, as a worker runs it: real parsers, ruff, bash and sandbox."""

import asyncio
import dataclasses
import shutil
import textwrap
import time
import uuid
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from neo4j import AsyncDriver
from temporalio.testing import ActivityEnvironment

import activities.checks
from activities.checks.activities import CHECKS_FILE, MAX_CHARACTERS, Checks
from activities.checks.lint import MAX_BLOCKS
from activities.checks.policy import POLICY_FILE
from activities.checks.sandbox import Limits, Sandbox
from activities.config import CONFIG, InvalidConfig
from activities.graph.activities import Graph
from activities.graph.deliberations import find_ended
from bridge.grpc.orchestrator.messages import results
from tests.integration.activities.test_sandbox import processes_with, until_gone
from tests.support.polling import until
from tests.support.stories import deliberation, new_story
from workflows.models.agents import Decision, Proposal
from workflows.models.deliberation import Check, CheckInput, CheckReport
from workflows.rules.ranking import barred, score

KEY = "AKIA" + "2E0A8F3B244C9986"
GOOD = """# Outbox

```python
import json

def entry(number: int) -> str:
    return json.dumps({"number": number})
```

It is used so:

```python
assert entry(1) == '{"number": 1}'
print(entry(2))
```

```yaml
weights: {policy: 0.4}
```
"""


@pytest.fixture
def environment() -> ActivityEnvironment:
    environment = ActivityEnvironment()
    environment.info = dataclasses.replace(
        environment.info, heartbeat_timeout=timedelta(milliseconds=60)
    )
    return environment


async def report_on(
    environment: ActivityEnvironment,
    content: str,
    checks: Checks | None = None,
    decisions: list[Decision] | None = None,
    task: str = "",
    about: str = "",
) -> CheckReport:
    proposal = Proposal(approach="as asked", content=content, decisions=decisions or [])
    request = CheckInput(agent_id="dev-1", proposal=proposal, task=task, about=about)
    return await environment.run((checks or Checks()).check_proposal, request)


def named(report: CheckReport, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def outcomes(report: CheckReport) -> dict[str, str]:
    """Return the outcomes of all checks but `substance`, which these proposals are not about."""
    return {c.name: c.outcome for c in report.checks if c.name != "substance"}


async def test_a_good_proposal_passes_every_check(environment: ActivityEnvironment) -> None:
    report = await report_on(environment, GOOD)

    assert outcomes(report) == {"policy": "passed", "lint": "passed", "dry_run": "passed"}
    assert named(report, "dry_run").output == '{"number": 2}\n'
    assert named(report, "dry_run").exit_code == 0
    assert report.weights == {"policy": 0.4, "lint": 0.3, "dry_run": 0.3, "substance": 0.3}
    assert score(report) == 1


async def test_a_proposal_without_code_is_checked_for_policy_alone(
    environment: ActivityEnvironment,
) -> None:
    report = await report_on(environment, "We append each event to the outbox, then we publish it.")

    assert outcomes(report) == {
        "policy": "passed",
        "lint": "not_applicable",
        "dry_run": "not_applicable",
    }
    assert score(report) == 1


TASK = "Store every event of a story in the order of its changes, and publish it once it is stored."
ABOUT_IT = "Each change appends its events to an outbox, which a job publishes in this order."


@pytest.mark.parametrize(
    ("content", "task", "outcome", "finding"),
    [
        (ABOUT_IT, TASK, "passed", ""),
        (ABOUT_IT, "", "not_checked", "what the proposal is for is not known"),
        (ABOUT_IT, "Paint the shed.", "failed", "about something else"),
        ("Yes.", TASK, "failed", "has 4 characters"),
        ("", "", "failed", "has 0 characters"),
        (TASK, TASK, "failed", "only repeats its task"),
        (ABOUT_IT + " It goes on and on." * 60, TASK, "failed", "repeats itself"),
    ],
)
async def test_the_substance_of_a_proposal_is_checked(
    environment: ActivityEnvironment, content: str, task: str, outcome: str, finding: str
) -> None:
    report = await report_on(environment, content, task=task)

    check = named(report, "substance")
    assert check.outcome == outcome
    assert finding in " ".join(check.findings)
    assert check.score == {"passed": 1.0, "failed": 0.0}.get(outcome)


@pytest.mark.parametrize(
    ("about", "outcome", "score"),
    [
        ("", "passed", 1.0),
        ("Publish the events of a story.", "passed", 1.0),
        (
            "Order paint for sheds, fences, gates, doors, walls and roofs, and publish it.",
            "passed",
            0.33,
        ),
        ("Paint the shed.", "failed", 0.0),
    ],
)
async def test_a_proposal_is_as_good_as_it_is_about_its_subject(
    environment: ActivityEnvironment, about: str, outcome: str, score: float
) -> None:
    report = await report_on(environment, ABOUT_IT, task=TASK, about=about)

    check = named(report, "substance")
    assert (check.outcome, check.score) == (outcome, score)


@pytest.mark.parametrize("content", ["", TASK, ABOUT_IT + " It goes on and on." * 60])
async def test_a_proposal_that_says_nothing_cannot_win(
    environment: ActivityEnvironment, content: str
) -> None:
    assert barred(await report_on(environment, content, task=TASK))


async def test_a_secret_bars_a_proposal_and_is_not_repeated(
    environment: ActivityEnvironment,
) -> None:
    report = await report_on(environment, GOOD + f"\nLog in with {KEY}.\n")

    policy = named(report, "policy")
    assert (policy.outcome, policy.score, policy.blocking, policy.errors) == ("failed", 0, True, 1)
    assert policy.findings == [
        "blocking aws_access_key: content line 21: an AWS access key id; "
        "take it from the environment or a role"
    ]
    assert barred(report)
    assert KEY not in report.model_dump_json()


async def test_every_text_of_a_proposal_is_under_the_policy(
    environment: ActivityEnvironment,
) -> None:
    decision = Decision(title="Log in", rationale=f"as\n{KEY}")

    report = await report_on(environment, GOOD, decisions=[decision])

    assert barred(report)
    assert "decision 1 line 3" in named(report, "policy").findings[0]


async def test_a_warning_costs_a_tenth_and_bars_nothing(environment: ActivityEnvironment) -> None:
    report = await report_on(environment, "```python\nimport pickle\nprint(pickle.dumps(1))\n```")

    policy = named(report, "policy")
    assert (policy.outcome, policy.score, policy.warnings) == ("passed", 0.9, 1)
    assert not barred(report)


async def test_python_that_fails_fails_the_dry_run(environment: ActivityEnvironment) -> None:
    report = await report_on(
        environment, "Text\n```python\nx = 1\nassert x == 2, 'x is not 2'\n```"
    )

    run = named(report, "dry_run")
    assert (run.outcome, run.score, run.exit_code, run.errors) == ("failed", 0, 1, 1)
    assert run.findings == ["exit code 1: AssertionError: x is not 2"]
    assert 'File "<code at line 3>", line 2' in run.output
    assert not barred(report)


@pytest.mark.parametrize(
    ("code", "limits", "finding"),
    [
        ("while True: pass", Limits(cpu_s=1, wall_s=60), "used up its CPU time"),
        ("import time; time.sleep(99)", Limits(wall_s=10), "ran for more than 10 s"),
        ("while True: print('x' * 9999)", Limits(), "wrote more than 1048576 bytes"),
        ("import sys; sys.exit(3)", Limits(), "exit code 3: "),
    ],
)
async def test_a_limit_that_was_reached_is_named(
    environment: ActivityEnvironment, code: str, limits: Limits, finding: str
) -> None:
    checks = Checks(sandbox=Sandbox(limits=limits))

    run = named(await report_on(environment, f"```python\n{code}\n```", checks), "dry_run")

    assert (run.outcome, run.findings) == ("failed", [finding])
    assert len(run.output) < 5_000


async def test_output_is_shown_without_control_characters(environment: ActivityEnvironment) -> None:
    report = await report_on(environment, "```python\nprint('\\x1b[31mred\\x00')\n```")

    assert named(report, "dry_run").output == "[31mred\n"


async def test_code_that_needs_a_package_cannot_be_dry_run(
    environment: ActivityEnvironment,
) -> None:
    report = await report_on(environment, "```python\nimport fastapi.routing as r\nprint(r)\n```")

    run = named(report, "dry_run")
    assert (run.outcome, run.score) == ("not_checked", None)
    assert run.findings == [
        "not checked: it imports fastapi, and the sandbox has the standard library only"
    ]
    assert named(report, "lint").outcome == "passed"


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("raise SystemExit\nassert False", "failed"),
        ("import os\nos._exit(0)\nassert False", "failed"),
        ("import os\nos._exit(71)", "failed"),
        ("print(\"ModuleNotFoundError: No module named 'x'\")\nraise SystemExit(1)", "failed"),
        ("raise ModuleNotFoundError(\"No module named 'x'\", name='x')", "failed"),
        ("import sys\nsys.exit(0)", "passed"),
        ("input()", "not_checked"),
        ("import sys\nsys.exit(2)", "failed"),
        ("from .shop import price", "not_checked"),
        ("from shop import price", "not_checked"),
    ],
)
async def test_a_dry_run_is_judged_by_how_the_code_ended(
    environment: ActivityEnvironment, code: str, outcome: str
) -> None:
    report = await report_on(environment, f"```python\n{code}\n```")

    assert named(report, "dry_run").outcome == outcome


async def test_a_call_in_an_unnamed_language_is_not_checked(
    environment: ActivityEnvironment,
) -> None:
    report = await report_on(environment, "```\nconsole.log('x')\n```")

    assert outcomes(report) == {
        "policy": "passed",
        "lint": "not_checked",
        "dry_run": "not_checked",
    }


async def test_more_findings_than_are_read_fail_the_lint(environment: ActivityEnvironment) -> None:
    report = await report_on(environment, "```python\n" + "undefined # noqa\n" * 5_000 + "```")

    assert (named(report, "lint").outcome, named(report, "lint").score) == ("failed", 0)


async def test_a_module_that_is_not_in_the_standard_library_s_package_is_a_failure(
    environment: ActivityEnvironment,
) -> None:
    report = await report_on(environment, "```python\nimport json.nothing\n```")

    assert named(report, "dry_run").outcome == "failed"


async def test_without_a_sandbox_code_is_not_run_and_not_passed(
    environment: ActivityEnvironment, tmp_path: Path
) -> None:
    trace = tmp_path / "ran"
    content = f"```python\nopen({str(trace)!r}, 'w')\n```\n```sh\ntouch {trace}\n```"
    checks = Checks(sandbox=Sandbox(bwrap="/nowhere/bwrap"))

    report = await report_on(environment, content, checks)

    assert outcomes(report) == {
        "policy": "passed",
        "lint": "not_checked",
        "dry_run": "not_checked",
    }
    assert [check.score for check in report.checks] == [1, None, None, None]
    for name in ("lint", "dry_run"):
        assert "/nowhere/bwrap cannot be started" in named(report, name).findings[0]
    assert not trace.exists()


async def test_what_is_too_large_to_read_is_not_checked(environment: ActivityEnvironment) -> None:
    report = await report_on(environment, "x" * (MAX_CHARACTERS + 1))

    assert set(outcomes(report).values()) == {"not_checked"}
    assert all("at most 100000" in check.findings[0] for check in report.checks)
    assert score(report) == 0


async def test_too_many_blocks_are_not_linted(environment: ActivityEnvironment) -> None:
    report = await report_on(environment, "```json\n{}\n```\n" * (MAX_BLOCKS + 1))

    assert outcomes(report)["lint"] == "not_checked"


async def test_findings_are_limited_to_a_readable_number(
    environment: ActivityEnvironment,
) -> None:
    names = "".join(f"print(undefined{n})\n" for n in range(90))

    lint = named(await report_on(environment, f"```python\n{names}```"), "lint")

    assert (lint.errors, len(lint.findings), lint.findings[-1]) == (90, 51, "and 40 more")


async def test_the_same_proposal_has_the_same_report(environment: ActivityEnvironment) -> None:
    content = GOOD + f"\n{KEY}\n```python\nprint({{str(n) for n in range(9)}}, undefined)\n```\n"

    assert await report_on(environment, content) == await report_on(environment, content)


@pytest.mark.parametrize(
    "content",
    [
        "- a\n" * (MAX_CHARACTERS // 4 - 100),
        "```sql\nSELECT " + "1+" * 45_000 + "1\n```",
        "```python\nx = [" + "{'a': 1}, " * 9_000 + "]\n```",
    ],
)
async def test_it_heartbeats_all_the_while(environment: ActivityEnvironment, content: str) -> None:
    # Measured in CPU time, so that a busy machine does not look like a blocked event loop.
    beats = [time.process_time()]
    environment.on_heartbeat = lambda *_: beats.append(time.process_time())

    report = await report_on(environment, content)

    assert named(report, "policy").outcome == "passed"
    beats.append(time.process_time())
    assert len(beats) > 6
    assert max(later - earlier for earlier, later in pairwise(beats)) < 2


async def test_cancelling_it_kills_what_runs(environment: ActivityEnvironment) -> None:
    mark = f"mark-{uuid.uuid4().hex}"
    code = f"import sys, subprocess\nsubprocess.run([sys.executable, '-c', 'while 1: 0', '{mark}'])"
    checking = asyncio.create_task(report_on(environment, f"```python\n{code}\n```"))
    await until(lambda: processes_with(mark))

    environment.cancel()

    with pytest.raises(asyncio.CancelledError):
        await checking
    await until_gone(mark)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (CHECKS_FILE, "weights: {policy: 1}", "weights: add dry_run, lint"),
        (CHECKS_FILE, "weights: {policy: 1, lint: 0, dry_run: 0, luck: 1}", r"weights\.luck"),
        (CHECKS_FILE, "weights: {policy: -1, lint: 1, dry_run: 1}", "greater than or equal to 0"),
        (CHECKS_FILE, "weights: {policy: 0, lint: 0, dry_run: 0}", "one must be above 0"),
        (CHECKS_FILE, "weights: {policy: .nan, lint: 0, dry_run: 1}", "finite"),
        (CHECKS_FILE, "weights: [", "is not YAML"),
        (POLICY_FILE, "secrets: {}", "warning_cost: required; add it"),
        (POLICY_FILE, None, "cannot be read"),
    ],
)
def test_inconsistent_configuration_is_refused_at_the_start(
    tmp_path: Path, file: str, text: str | None, message: str
) -> None:
    for each in (CHECKS_FILE, POLICY_FILE):
        shutil.copy(CONFIG / each, tmp_path)
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text)

    with pytest.raises(InvalidConfig, match=message) as refused:
        Checks(tmp_path)

    assert str(tmp_path / file) in str(refused.value)


LENGTH_CHECK = """
    from activities.checks.base import ParsedProposal, ProposalCheck
    from workflows.models.deliberation import Check

    class LengthCheck(ProposalCheck):
        name = "length"

        async def run(self, proposal: ParsedProposal) -> Check:
            words = len(proposal.texts[0].text.split())
            return Check(name=self.name, outcome="passed", score=1 / max(words, 1))
"""


async def test_a_module_and_a_weight_add_a_check(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: ActivityEnvironment,
    graph: Graph,
    driver: AsyncDriver,
) -> None:
    (tmp_path / "length.py").write_text(textwrap.dedent(LENGTH_CHECK))
    monkeypatch.setattr(activities.checks, "__path__", [*activities.checks.__path__, str(tmp_path)])
    shutil.copy(CONFIG / POLICY_FILE, tmp_path)
    weights = (CONFIG / CHECKS_FILE).read_text()
    (tmp_path / CHECKS_FILE).write_text(f"{weights.rstrip()}\n  length: 0.5\n")
    story = new_story()
    record = deliberation(story)

    report = await report_on(environment, "two words", Checks(tmp_path))
    ranked = [each.model_copy(update={"checks": report.checks}) for each in record.ranked]
    await graph.record_deliberation(record.model_copy(update={"ranked": ranked}))
    ended = await find_ended(driver, record.deliberation_id)

    names = ["policy", "lint", "dry_run", "substance", "length"]
    assert [check.name for check in report.checks] == names
    assert list(report.weights.items())[-1] == ("length", 0.5)
    assert ended is not None
    for result in results(ended.result):
        assert [check.check_type for check in result.checks.additional_checks] == names
        assert result.checks.additional_checks[-1].score == pytest.approx(0.5)
