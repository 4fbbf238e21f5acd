"""Configuration files: one strict reader of YAML for all of them.

The reader is strict because a lenient one hides mistakes: if a key is given twice, YAML libraries
keep the last one, and a team's rules are lost without notice. ruamel.yaml refuses such keys too,
but not in a mapping that has a merge key.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from temporalio.exceptions import ApplicationError

from workflows.models.errors import ErrorType, application_error, invalid_input

CONFIG = Path(__file__).parents[1] / "deploy" / "config"

_Model = TypeVar("_Model", bound=BaseModel)


class InvalidConfig(ValueError):
    """A configuration file that cannot be used. `problems`: each names the place and the remedy."""

    def __init__(self, file: Path, problems: list[str]) -> None:
        super().__init__(f"{file}: " + "; ".join(problems))
        self.file = file
        self.problems = problems

    def final(self) -> ApplicationError:
        """Convert to the error that an activity raises: `InvalidConfig`, not retryable."""
        return application_error(ErrorType.INVALID_CONFIG, str(self))


def read_text(file: Path) -> str:
    """Read a file as UTF-8, with or without a byte order mark.

    Raises:
        InvalidConfig: the file cannot be read, or is not UTF-8.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InvalidConfig(file, [f"cannot be read: {error.strerror}"]) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidConfig(
            file, [f"line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save it as UTF-8"]
        ) from error


def read_yaml(file: Path) -> Any:
    """Read the single document of a YAML file, as plain types; None if the file is empty.

    Raises:
        InvalidConfig: the file cannot be read, is not UTF-8, is not YAML, or has a key twice.
    """
    return parse_yaml(file, read_text(file))


def parse_yaml(file: Path, text: str) -> Any:
    """Parse the document in `text`, a part of `file`.

    Raises:
        InvalidConfig: it is not YAML, or has a key twice; lines count from the start of `text`.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        twice = list(_repeated_keys(root)) if root else []
        if not twice:
            return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidConfig(file, [f"is not YAML: {' '.join(str(error).split())}"]) from error
    except RecursionError as error:
        raise InvalidConfig(file, ["is nested too deeply; use fewer levels"]) from error
    except (ValueError, OverflowError) as error:  # a date such as 2026-13-45, a huge number
        raise InvalidConfig(file, [f"holds a value that cannot be read: {error}"]) from error
    raise InvalidConfig(file, twice)


def read_config(file: Path, model: type[_Model]) -> _Model:
    """Read a file as a model.

    Raises:
        InvalidConfig: as in `read_yaml`, or a field breaks a rule.
        ApplicationError: raised by the model's own validators.
    """
    try:
        return model.model_validate(read_yaml(file))
    except ValidationError as error:
        fields = [f"{field}: {rule}" for field, rule in invalid_input(str(file), error).problems]
        raise InvalidConfig(file, fields) from error


def _repeated_keys(root: yaml.Node) -> Iterator[str]:
    """Yield every key that its mapping has twice, at any depth, with its line."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias refers to a node that was read already
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key, value in node.value:
                waiting.append(value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if (key.tag, key.value) in keys:
                    line = key.start_mark.line + 1
                    yield f"line {line}: key {key.value!r} is given twice; keep one"
                keys.add((key.tag, key.value))
