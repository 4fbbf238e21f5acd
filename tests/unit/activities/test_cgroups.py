"""Where a control group for a run can be made, in real directories."""

import os
from pathlib import Path

import pytest

from activities.checks import cgroups
from activities.checks.cgroups import Group, NoGroup, find_home


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """Return a folder that looks like cgroup v2."""
    for folder in (tmp_path, tmp_path / "fleet", tmp_path / "fleet/worker"):
        folder.mkdir(exist_ok=True)
        for name in ("cgroup.controllers", "cgroup.subtree_control", "cgroup.procs"):
            (folder / name).write_text("")
    return tmp_path


@pytest.fixture
def member(tmp_path: Path) -> Path:
    """Return a file that names the worker's group."""
    file = tmp_path / "member"
    file.write_text("4:memory:/elsewhere\n0::/fleet/worker\n")
    return file


def test_a_delegated_group_above_the_worker_s_is_used(
    mounted: Path, member: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "_DELEGATED", ("user.delegate",))
    os.setxattr(mounted / "fleet", "user.delegate", b"1")

    assert find_home(mounted, member) == mounted / "fleet"

    assert (mounted / "fleet/cgroup.subtree_control").read_text() == "+memory +pids"
    assert [each.name for each in (mounted / "fleet").iterdir() if each.is_dir()] == ["worker"]


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user is refused by its permissions")
def test_a_group_that_was_not_delegated_is_left_alone(mounted: Path, member: Path) -> None:
    with pytest.raises(NoGroup, match="fleet is not delegated to the worker"):
        find_home(mounted, member)

    assert (mounted / "fleet/cgroup.subtree_control").read_text() == ""


def test_the_root_has_groups_below_it(mounted: Path, member: Path) -> None:
    member.write_text("0::/\n")

    assert find_home(mounted, member) == mounted


@pytest.mark.parametrize("named", ["4:memory:/fleet\n", "0::/\n"])
def test_without_cgroup_v2_there_is_none(tmp_path: Path, named: str) -> None:
    member = tmp_path / "member"
    member.write_text(named)

    with pytest.raises(NoGroup, match="cgroup v2 is not mounted"):
        find_home(tmp_path, member)


def test_a_group_without_controllers_is_refused_with_the_reason(
    mounted: Path, member: Path
) -> None:
    member.write_text("0::/\n")
    (mounted / "cgroup.subtree_control").unlink()
    (mounted / "cgroup.subtree_control").mkdir()

    with pytest.raises(NoGroup, match="Is a directory"):
        find_home(mounted, member)


@pytest.mark.parametrize(("killed", "exceeded"), [(0, False), (2, True)])
def test_what_the_kernel_killed_for_its_memory_exceeded_it(
    tmp_path: Path, killed: int, exceeded: bool
) -> None:
    (tmp_path / "memory.events").write_text(f"low 0\nmax 7\noom 1\noom_kill {killed}\n")

    assert Group(tmp_path).exceeded() == exceeded
