"""The tasks of the benchmark of answers can be met, and not by a plausible wrong answer."""

from __future__ import annotations

import pytest

from activities.agents.response_schemas import FEW_TASKS
from activities.checks.sandbox import Sandbox
from tests.bench.judges import Task, code_criteria, load_tasks, plan_criteria, unnamed

TASKS = {task.id: task for task in load_tasks()}

CODE = {
    "code-slug": (
        "import re\n"
        "def slug(title):\n"
        "    return re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')",
        "def slug(title):\n    return title.lower().replace(' ', '-')",
    ),
    "code-chunks": (
        "def chunks(items, size):\n"
        "    if size < 1:\n"
        "        raise ValueError('size')\n"
        "    return [items[i : i + size] for i in range(0, len(items), size)]",
        "def chunks(items, size):\n"
        "    return [items[i : i + size] for i in range(0, len(items), max(size, 1))]",
    ),
    "code-duration": (
        "import re\n"
        "def seconds(text):\n"
        "    found = re.fullmatch(r'(?:(\\d+)d)?(?:(\\d+)h)?(?:(\\d+)m)?(?:(\\d+)s)?', text)\n"
        "    if not text or not found:\n"
        "        raise ValueError(text)\n"
        "    units = (86400, 3600, 60, 1)\n"
        "    return sum(int(n or 0) * unit for n, unit in zip(found.groups(), units))",
        "import re\n"
        "def seconds(text):\n"
        "    units = {'d': 86400, 'h': 3600, 'm': 60, 's': 1}\n"
        "    return sum(int(n) * units[u] for n, u in re.findall(r'(\\d+)([dhms])', text))",
    ),
    "code-lru": (
        "from collections import OrderedDict\n"
        "class Cache:\n"
        "    def __init__(self, size):\n"
        "        self.size, self.entries = size, OrderedDict()\n"
        "    def get(self, key):\n"
        "        if key in self.entries:\n"
        "            self.entries.move_to_end(key)\n"
        "        return self.entries.get(key)\n"
        "    def put(self, key, value):\n"
        "        self.entries[key] = value\n"
        "        self.entries.move_to_end(key)\n"
        "        if len(self.entries) > self.size:\n"
        "            self.entries.popitem(last=False)",
        "class Cache:\n"
        "    def __init__(self, size):\n"
        "        self.size, self.entries = size, {}\n"
        "    def get(self, key):\n"
        "        return self.entries.get(key)\n"
        "    def put(self, key, value):\n"
        "        if len(self.entries) >= self.size:\n"
        "            del self.entries[next(iter(self.entries))]\n"
        "        self.entries[key] = value",
    ),
    "code-merge": (
        "def merge(intervals):\n"
        "    merged = []\n"
        "    for start, end in sorted(intervals):\n"
        "        if merged and start <= merged[-1][1]:\n"
        "            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))\n"
        "        else:\n"
        "            merged.append((start, end))\n"
        "    return merged",
        "def merge(intervals):\n    return sorted(intervals)",
    ),
    "code-bug": (
        "def median(values):\n"
        "    if not values:\n"
        "        raise ValueError('empty')\n"
        "    values = sorted(values)\n"
        "    middle = len(values) // 2\n"
        "    if len(values) % 2:\n"
        "        return values[middle]\n"
        "    return (values[middle - 1] + values[middle]) / 2",
        "def median(values):\n    values.sort()\n    return values[len(values) // 2]",
    ),
}
"""Task -> code that meets it, and code that does not."""

CRITIQUES = {
    "critique-sql": (
        "The name is put into the SQL text, so a crafted name is an injection; use a placeholder.",
        "The search has no index on the name, so it reads the whole table.",
    ),
    "critique-transfer": (
        "Two transfers at once read the same balance; do both updates in one transaction.",
        "The amount should be a decimal and the error should name the account.",
    ),
    "critique-passwords": (
        "MD5 without a salt can be reversed by rainbow tables; use Argon2.",
        "Passwords should have at least twelve characters.",
    ),
}
"""Task -> a critique that names the planted defect, and one that does not."""


def fenced(code: str) -> str:
    return f"The code:\n\n```python\n{code}\n```\n"


def test_each_task_that_a_program_or_a_defect_decides_has_an_answer_here() -> None:
    assert CODE.keys() == {task.id for task in TASKS.values() if task.tests}
    assert CRITIQUES.keys() == {task.id for task in TASKS.values() if task.proposal}


@pytest.mark.parametrize("name", CODE)
async def test_the_tests_of_a_code_task_accept_a_solution_and_reject_a_wrong_one(name: str) -> None:
    good, bad = CODE[name]
    tests, sandbox = TASKS[name].tests, Sandbox()

    assert await code_criteria(fenced(good), tests, sandbox) == {"parses": "", "tests": ""}
    assert (await code_criteria(fenced(bad), tests, sandbox))["tests"]


@pytest.mark.parametrize("name", CRITIQUES)
def test_a_critique_names_the_planted_defect_or_does_not(name: str) -> None:
    good, bad = CRITIQUES[name]

    assert unnamed(good, TASKS[name].defect) == ""
    assert unnamed(bad, TASKS[name].defect)


@pytest.mark.parametrize(
    "task", [task for task in TASKS.values() if task.roles], ids=lambda t: t.id
)
def test_a_plan_of_a_short_answer_can_meet_a_plan_task(task: Task) -> None:
    roles = [task.roles[number % len(task.roles)] for number in range(FEW_TASKS)]
    plan = "\n".join(f"{number}. {role}: Part {number}" for number, role in enumerate(roles, 1))

    assert not any(plan_criteria(plan, task.roles, task.expected).values())
    assert any(plan_criteria("1. DEV: Do it all", task.roles, task.expected).values())
