"""The list of the CLI's commands matches the help of the commands."""

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from workers.cli.app import COMMANDS, load
from workers.cli.stories import app


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_is_its_first_line(name: str) -> None:
    command = load(name)

    assert (command.help or "").split("\n\n")[0].replace("\n", " ") == COMMANDS[name][1]


def test_every_command_of_the_stories_is_listed() -> None:
    stories = {name for name, (module, _) in COMMANDS.items() if module.endswith(".stories")}
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    assert set(group.commands) == stories
