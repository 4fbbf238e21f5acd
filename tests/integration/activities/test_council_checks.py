"""The activity check_council: each proposal gets what it gets alone, whatever the others do."""

from __future__ import annotations

from typing import Any

import pytest
from temporalio.testing import ActivityEnvironment

from activities.checks.activities import MAX_CHARACTERS, Checks
from activities.checks.fences import code_blocks
from activities.checks.lint import lint_code, lint_together
from activities.checks.sandbox import Limits, Run, Sandbox
from tests.integration.activities.test_checks import GOOD, KEY
from workflows.models.agents import Proposal
from workflows.models.deliberation import CheckInput, CouncilCheckInput


def python(code: str) -> str:
    return f"```python\n{code}\n```"


BROKEN = f"{python('def f(:')}\n```yaml\na: *b\n```\n{python('import os')}\n```sql\nSELEC 1\n```"
SHELL = "```sh\nif true; then\n```\n```json\n{'a': 1}\n```\n```toml\na = 1\n```"
REDEFINED = f"{python('def f(): pass')}\n{python('def f(): pass')}\n{python('print(undefined)')}"

NESTED = f"{python('x = ' + '-' * 50_000 + '1')}\n```json\n{'[' * 50_000}\n```"
"""Too deep for the parsers of both languages."""

GREEDY = python("x = bytearray(10**10)")
KILLS = python(
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(0, signal.SIGKILL)"
)
ENDLESS = python("while True: pass")
LITTERS = python("open('0.ipynb', 'w').write('{')\nopen('/tmp/1.ipynb', 'w').write('{')")


class CountingSandbox(Sandbox):
    """A sandbox that counts the programs that it starts."""

    started = 0

    async def run(self, *arguments: Any, **named: Any) -> Run:
        self.started += 1
        return await super().run(*arguments, **named)


@pytest.mark.parametrize(
    "others",
    [
        [GOOD, f"Only words, and {KEY}.", BROKEN],
        [SHELL, REDEFINED, "x" * (MAX_CHARACTERS + 1)],
        [NESTED, GREEDY],
        [KILLS, LITTERS, ENDLESS],
    ],
    ids=["broken code", "other languages", "breaks the parser", "breaks the sandbox"],
)
async def test_each_proposal_of_a_council_gets_the_report_that_it_gets_alone(
    others: list[str],
) -> None:
    checks = Checks(sandbox=Sandbox(limits=Limits(cpu_s=1)))
    environment = ActivityEnvironment()
    proposals = {
        f"agent-dev-{number}": Proposal(approach="as asked", content=content)
        for number, content in enumerate([GOOD, *others])
    }

    council = CouncilCheckInput(proposals=proposals, task="Append events")
    together = await environment.run(checks.check_council, council)

    assert list(together.checks) == list(proposals)
    for agent_id, proposal in proposals.items():
        one = CheckInput(agent_id=agent_id, proposal=proposal, task="Append events")
        alone = await environment.run(checks.check_proposal, one)
        assert together.of(agent_id) == alone, agent_id


async def test_the_code_of_a_council_is_linted_in_one_sandbox_unless_a_text_breaks_it() -> None:
    proposals = [code_blocks(content) for content in (GOOD, BROKEN, REDEFINED)]
    together, broken = CountingSandbox(), CountingSandbox()

    linted = await lint_together(proposals, together)

    assert together.started == 1
    assert linted == [await lint_code(blocks, together) for blocks in proposals]
    assert await lint_together([*proposals, code_blocks(NESTED)], broken) is None
    assert await lint_together(proposals, broken, Limits(output_bytes=100)) is None
    assert await lint_together(proposals, Sandbox(bwrap="/nowhere/bwrap")) is None
