"""Reading a team's process from its files, as the activity and a worker's startup do."""

import json
import random
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import xgrammar
import yaml
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.config import CONFIG, InvalidConfig
from activities.planning import Planning, load_config
from workflows.models.agents import MAX_TASKS, DraftTask
from workflows.models.readiness import StoryText
from workflows.rules import dag


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a folder with a team's own copy of the shipped files."""
    for name in ("agile.fsm.yaml", "rigor.yaml", "checks.yaml", "councils.yaml"):
        shutil.copy(CONFIG / name, tmp_path)
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


async def test_a_story_gets_the_machine_and_the_level_of_its_rigor() -> None:
    planning = Planning(deliberation_timeout=timedelta(seconds=45), max_tasks=20)
    process = await ActivityEnvironment().run(planning.load_process, "L2")

    assert (process.deliberation_timeout, process.max_tasks) == (45, 20)
    assert process.rigor.dor_threshold == 85
    assert process.machine.final == "DONE"
    assert process.version == load_config().version


async def test_an_edit_counts_from_the_next_story_on(config: Path) -> None:
    planning = Planning(config)
    before = await ActivityEnvironment().run(planning.load_process, "L1")

    edit(config / "rigor.yaml", "dor_threshold: 75", "dor_threshold: 60")
    after = await ActivityEnvironment().run(planning.load_process, "L1")

    assert (before.rigor.dor_threshold, after.rigor.dor_threshold) == (75, 60)
    assert after.machine == before.machine
    assert after.version != before.version


def test_a_comment_does_not_change_the_version(config: Path) -> None:
    before = load_config(config).version

    edit(config / "rigor.yaml", "L1:", "# our usual one\nL1:")

    assert load_config(config).version == before


FAULTS = {
    "an unreachable state": (
        "agile.fsm.yaml",
        "  DONE: {}",
        "  DONE: {}\n  ISLAND: {}",
        "state 'ISLAND': unreachable",
    ),
    "an unknown guard": ("agile.fsm.yaml", "[dor_ok, po", "[dor_okay, po", "unknown guard 'dor_ok"),
    "a duplicate transition": (
        "agile.fsm.yaml",
        "event: reject_build, to: DESIGN, roles: [PO, QA]}",
        "event: reject_build, to: DESIGN, roles: [PO, QA]}\n"
        "  - {from: BUILD, event: reject_build, to: DESIGN, roles: [PO]}",
        "transition 'reject_build' from 'BUILD': there 2 times",
    ),
    "a state twice": (
        "agile.fsm.yaml",
        "  DONE: {}",
        "  DONE: {}\n  DONE: {}",
        "key 'DONE' is given twice",
    ),
    "an empty file": ("rigor.yaml", "*", "", "rigor.yaml: the document"),
    "half a document": ("rigor.yaml", "*", "L0: {dor_threshold: 50", "rigor.yaml: is not YAML"),
    "a tag that makes objects": (
        "rigor.yaml",
        "*",
        "!!python/object/apply:os.getcwd []",
        "rigor.yaml: is not YAML",
    ),
    "a role without a council": (
        "agile.fsm.yaml",
        "    role: QA",
        "    role: LEGAL",
        "state 'TEST': role 'LEGAL' has no council in councils.yaml; add it there",
    ),
    "weights that do not sum to 1": (
        "rigor.yaml",
        "lint: 0.05",
        "lint: 0.5",
        "L0.weights: sum to 1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_faulty_file_is_refused_with_its_name_and_problem(fault: str, config: Path) -> None:
    name, old, new, problem = FAULTS[fault]
    if old == "*":
        (config / name).write_text(new)
    else:
        edit(config / name, old, new)

    with pytest.raises(InvalidConfig) as at_start_up:
        load_config(config)
    with pytest.raises(ApplicationError) as in_a_story:
        await ActivityEnvironment().run(Planning(config).load_process, "L1")

    for message in (str(at_start_up.value), in_a_story.value.message):
        assert str(config / name) in message
        assert problem in message
    assert in_a_story.value.type == "InvalidConfig"
    assert in_a_story.value.non_retryable


def test_a_missing_file_is_named(config: Path) -> None:
    (config / "rigor.yaml").unlink()

    with pytest.raises(InvalidConfig, match=r"rigor\.yaml: cannot be read: No such file"):
        load_config(config)


async def test_an_unknown_rigor_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ApplicationError, match="'L9'; one of L0, L1, L2, L3") as refusal:
        await ActivityEnvironment().run(Planning().load_process, "L9")

    assert refusal.value.type == "InvalidInput"
    assert refusal.value.non_retryable


async def test_a_story_is_scored() -> None:
    readiness = await ActivityEnvironment().run(Planning().score_story, StoryText(title="Login"))

    assert readiness.total < 50
    assert "AC_MISSING" in [finding.code for finding in readiness.findings]


def test_the_shipped_weights_of_the_checks_are_the_design_s() -> None:
    document = yaml.safe_load((CONFIG / "checks.yaml").read_text())

    weights = document["weights"]
    assert {name: weights[name] for name in ("policy", "lint", "dry_run")} == {
        "policy": 0.4,
        "lint": 0.3,
        "dry_run": 0.3,
    }


def test_any_output_within_the_schema_is_a_valid_plan() -> None:
    roles = ["DEV", "QA", "DATA"]
    end = "</s>"
    vocabulary = [*map(chr, range(32, 127)), end]
    tokens = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[vocabulary.index(end)])
    schema = json.dumps(dag.plan_schema(roles, title_length=5, description_length=5))
    compiler = xgrammar.GrammarCompiler(tokens)
    grammar = compiler.compile_json_schema(schema, any_whitespace=False)
    mask = xgrammar.allocate_token_bitmask(1, len(vocabulary))
    sizes = set()

    for seed in range(60):
        babble = random.Random(seed)
        matcher = xgrammar.GrammarMatcher(grammar)
        written = ""
        while not matcher.is_terminated():
            matcher.fill_next_token_bitmask(mask)
            allowed = [n for n in range(len(vocabulary)) if mask[0, n // 32].item() >> n % 32 & 1]
            chosen = babble.choice(allowed)
            assert matcher.accept_token(chosen)
            written += vocabulary[chosen]
        drafts = [
            DraftTask.model_validate(draft)
            for draft in json.loads(written.removesuffix(end))["tasks"]
        ]
        dag.validate(dag.number_tasks("US-1-p1", drafts), roles, MAX_TASKS)
        sizes.add(len(drafts))

    assert len(sizes) > 3
