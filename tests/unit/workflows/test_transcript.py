"""The transcript of an implementation: it fits, its start stays the same, and loops are found."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from workflows.models.implementation import (
    Action,
    Finish,
    ReplaceText,
    RunCommand,
    StepRecord,
    WriteFile,
)
from workflows.rules import transcript

TEXT = st.text(alphabet="ab é\n<", min_size=1, max_size=400)
ACTIONS: st.SearchStrategy[Action] = st.one_of(
    st.builds(RunCommand, command=TEXT),
    st.builds(WriteFile, path=st.sampled_from(["a.py", "b.md"]), content=TEXT),
    st.builds(ReplaceText, path=st.just("a.py"), old=TEXT, new=TEXT),
    st.builds(Finish, summary=TEXT),
)


@st.composite
def some_steps(draw: st.DrawFn) -> list[StepRecord]:
    actions = draw(st.lists(ACTIONS, min_size=1, max_size=30))
    return [
        StepRecord(step=number, action=action, observation=draw(TEXT), commit="c" * 40)
        for number, action in enumerate(actions, start=1)
    ]


def ran(number: int, command: str, output: str, exit_code: int = 0) -> StepRecord:
    action = RunCommand(command=command)
    return StepRecord(
        step=number,
        action=action,
        exit_code=exit_code,
        observation=output,
        commit="c" * 40,
        fingerprint=transcript.fingerprint(action, exit_code, "", output, False),
    )


@given(some_steps(), st.integers(600, 6_000))
def test_a_transcript_fits_its_limit(steps: list[StepRecord], limit: int) -> None:
    assert len(transcript.render(steps, limit).encode()) <= limit


@given(some_steps(), st.integers(1_200, 6_000))
def test_the_last_step_is_always_there(steps: list[StepRecord], limit: int) -> None:
    assert f"## Step {steps[-1].step}\n" in transcript.render(steps, limit)


@given(some_steps(), st.integers(600, 6_000))
def test_the_oldest_steps_are_shortened_first(steps: list[StepRecord], limit: int) -> None:
    kept = transcript.elided(steps, limit)

    assert [step.step for step in kept] == list(range(kept[0].step, len(steps) + 1))
    assert sorted((step.elided for step in kept), reverse=True) == [step.elided for step in kept]
    assert not kept[-1].elided


@given(some_steps(), st.integers(600, 6_000))
def test_what_was_elided_once_stays_elided(steps: list[StepRecord], limit: int) -> None:
    """Elision in the workflow, before the agent's, keeps to the same order."""
    before = transcript.elided(steps[:-1], limit)
    after = {step.step: step for step in transcript.elided(steps, limit)}

    for step in before:
        if step.elided and step.step in after:
            assert after[step.step].elided


def test_the_start_of_a_transcript_stays_the_same_between_two_cuts() -> None:
    steps = [ran(number, f"cat file-{number}", "x" * 500) for number in range(1, 101)]
    texts = [transcript.render(steps[:count], 20_000) for count in range(1, 101)]

    broken = [
        number
        for number, (one, next_one) in enumerate(pairwise(texts))
        if not next_one.startswith(one)
    ]

    assert 0 < len(broken) <= 8


def test_an_elided_step_keeps_its_exit_code_and_its_path() -> None:
    steps = [
        ran(1, "pytest -q", "F" * 900, exit_code=1),
        StepRecord(
            step=2,
            action=WriteFile(path="a.py", content="y" * 900),
            observation="a.py is written",
            commit="c" * 40,
        ),
        ran(3, "pytest -q", "." * 900),
    ]

    text = transcript.render(steps, 2_000)

    assert "## Step 1\nrun: pytest -q\nexit code: 1\n[its output is left out]" in text
    assert "write a.py [its content is left out]\na.py is written" in text
    assert "." * 800 in text


def test_the_oldest_of_very_many_steps_are_left_out() -> None:
    steps = [ran(number, f"cat file-{number}", "x" * 50) for number in range(1, 501)]

    text = transcript.render(steps, 4_000)

    assert text.startswith("[earlier steps are left out]")
    assert "[... left out ...]" not in text
    assert text.endswith("x" * 50)


def test_the_same_action_with_the_same_effect_is_a_loop_the_third_time() -> None:
    same = [ran(number, "ls", "a.py") for number in (1, 2, 3)]

    assert not transcript.loops(same[:2])
    assert transcript.loops(same)
    assert not transcript.loops([*same[:2], ran(3, "ls", "a.py b.py")])
    assert not transcript.loops([same[0], ran(2, "ls -a", "a.py"), same[2]])
    assert not transcript.loops([*same[:2], ran(3, "ls", "a.py", exit_code=1)])


def test_a_command_that_stops_at_a_limit_is_shown_as_stopped() -> None:
    step = ran(1, "sleep 9", "").model_copy(update={"exit_code": None, "stopped": "wall time"})

    assert "stopped: wall time" in transcript.text_of(step)


def test_a_headline_is_one_short_line() -> None:
    line = transcript.headline(RunCommand(command="cat <<EOF\n" + "x" * 900), 80)

    assert len(line) == 80
    assert "\n" not in line
