"""Setup: no step is repeated, an interrupted setup continues, an error states cause and remedy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.local import setup
from deploy.local.setup import Step


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Redirect stamps and logs to the test's own folder."""
    monkeypatch.setattr(setup, "STAMPS", tmp_path / "stamps")
    monkeypatch.setattr(setup, "LOGS", tmp_path / "logs")
    return tmp_path


def making(file: Path, *, inputs: Callable[[], str] = lambda: "v1", program: str = "touch") -> Step:
    """Return a step that creates a file with a real program."""

    def make() -> None:
        setup._run("thing", [program, str(file)], "make room for it")

    return Step("thing", "something", inputs, file, make)


def test_a_second_run_of_the_whole_set_up_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.main([]) == 0

    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("scratch")
def test_programs_that_are_there_are_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.main(["--only", "programs"]) == 0

    assert "[1/1] programs: done" in capsys.readouterr().out


def test_a_step_is_done_again_when_its_inputs_or_its_result_change(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, version = scratch / "file", ["v1"]
    monkeypatch.setattr(setup, "STEPS", (making(file, inputs=lambda: version[0]),))

    def ran() -> bool:
        assert setup.main([]) == 0
        return "thing: done" in capsys.readouterr().out

    assert [ran(), ran()] == [True, False]
    version[0] = "v2"
    assert [ran(), ran()] == [True, False]
    file.unlink()
    assert [ran(), ran()] == [True, False]


def test_a_step_that_a_variable_chooses_runs_with_it_or_when_it_is_named(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = replace(making(scratch / "file"), only_with="OBSERVE")
    monkeypatch.setattr(setup, "STEPS", (step,))
    monkeypatch.delenv("OBSERVE", raising=False)

    def ran(*arguments: str) -> bool:
        step.result.unlink(missing_ok=True)
        setup.main([*arguments])
        return "thing: done" in capsys.readouterr().out

    assert [ran(), ran("--only", "thing")] == [False, True]
    monkeypatch.setenv("OBSERVE", "1")
    assert ran()


def test_a_failed_step_reports_what_failed_and_is_tried_again(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = scratch / "folder" / "file"
    monkeypatch.setattr(setup, "STEPS", (making(file),))

    assert setup.main([]) == 1
    output = capsys.readouterr().err
    assert "thing: touch ended with exit code 1" in output
    assert "No such file or directory" in output
    assert "what to do: make room for it" in output
    assert str(scratch / "logs" / "thing.log") in output

    file.parent.mkdir()
    assert setup.main([]) == 0


@pytest.mark.parametrize(
    ("program", "message"),
    [("true", "is not there"), ("no-such-program", "could not be run")],
)
def test_a_step_that_made_nothing_has_failed(
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: str,
    message: str,
) -> None:
    monkeypatch.setattr(setup, "STEPS", (making(scratch / "file", program=program),))

    assert setup.main([]) == 1

    assert message in capsys.readouterr().err


def test_an_unknown_step_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert setup.main(["--only", "kitchen"]) == 1

    steps = "programs, uv, packages, neo4j, model, sample, prometheus"
    assert f"--only takes one of {steps}" in capsys.readouterr().err


@pytest.mark.parametrize(("chosen", "code"), [("cpu", 0), ("tpu", 1)])
def test_the_kind_of_engine_is_cpu_or_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chosen: str, code: int
) -> None:
    monkeypatch.setenv("FLEET_SERVE", chosen)

    assert setup.main([]) == code

    assert ("set it to cpu, gpu or none" in capsys.readouterr().err) == (code == 1)


def test_without_servers_there_are_no_steps_for_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLEET_SERVE", "none")

    assert setup.main(["--only", "neo4j"]) == 1

    assert "--only takes one of programs, uv, packages\n" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_a_jar_that_is_not_the_pinned_one_is_refused(tmp_path: Path, change: str) -> None:
    jars = tmp_path / "lib"
    jars.mkdir()
    (jars / "a.jar").write_bytes(b"a")
    (jars / "b.jar").write_bytes(b"b")
    hashes = tmp_path / "jars.sha256"
    hashes.write_text(
        "".join(
            f"{hashlib.sha256(jar.read_bytes()).hexdigest()}  {jar.name}\n"
            for jar in jars.iterdir()
        )
    )
    setup.require_hashes(jars, hashes)

    if change == "removed":
        (jars / "b.jar").unlink()
    else:
        (jars / ("b.jar" if change == "changed" else "c.jar")).write_bytes(b"evil")

    with pytest.raises(setup.SetupFailed, match=r"[bc]\.jar"):
        setup.require_hashes(jars, hashes)
