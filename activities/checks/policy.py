"""The policy: secrets, destructive commands, forbidden imports and licences.

The rules are data (deploy/config/policy.yaml). Patterns are RE2, so that their run time is linear
in the length of the text, for any rule and any text.
"""

from __future__ import annotations

import ast
import asyncio
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import re2  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, field_validator

from activities.checks.base import ParsedProposal, ProposalCheck, shown
from activities.checks.fences import HTML, UNCLEAR, Block
from activities.checks.sandbox import Sandbox
from activities.config import CONFIG, read_config
from workflows.models.deliberation import Check

POLICY_FILE = "policy.yaml"

Severity = Literal["blocking", "warning"]

_MATCHES = 5
"""Maximum number of matches of one rule in one text; more would add no information."""

_COMMAND_READING = str.maketrans(dict.fromkeys("\"'`,()[]{}", " "))


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PatternRule(_Part):
    """A rule on text; the head of policy.yaml explains each field."""

    id: str = Field(min_length=1)
    severity: Severity
    where: Literal["anywhere", "code"]
    reads: Literal["text", "command"] = "text"
    pattern: str
    unless: str = ""
    min_entropy: float = Field(default=0.0, ge=0, le=8)
    covers: str = ""
    reason: str = Field(min_length=1)

    @field_validator("pattern", "unless", "covers")
    @classmethod
    def _is_re2(cls, pattern: str) -> str:
        _compile(pattern)
        return pattern


class ImportRule(_Part):
    """Modules that Python code may not import, including their submodules."""

    id: str = Field(min_length=1)
    severity: Severity
    modules: list[str] = Field(min_length=1)
    reason: str = Field(min_length=1)


class PatternRules(_Part):
    """Rules of one kind; `unless` applies to each of them."""

    unless: str = ""
    rules: list[PatternRule]

    @field_validator("unless")
    @classmethod
    def _is_re2(cls, pattern: str) -> str:
        _compile(pattern)
        return pattern


class ImportRules(_Part):
    """Rules on imports."""

    rules: list[ImportRule]


class PolicyRules(_Part):
    """The content of deploy/config/policy.yaml."""

    warning_cost: float = Field(ge=0, le=1)
    secrets: PatternRules
    commands: PatternRules
    licences: PatternRules
    imports: ImportRules


@dataclass(frozen=True, order=True)
class Violation:
    """One match of a rule, without the matched text. `line`: in its text, from 1."""

    line: int
    rule: str
    severity: Severity
    reason: str


# Tags of HTML, but not the redirections of a shell.
_TAG = re.compile(
    r"</?(?:a|b|blockquote|br|code|dd|details|div|dl|dt|em|h[1-6]|hr|i|kbd|li|ol|p|pre|samp|script"
    r"|span|strong|summary|table|td|th|tr|tt|ul)\b[^<>\n]*>|<!--|-->",
    re.IGNORECASE,
)
_BEFORE_A_COMMAND = re.compile(r"[\s>*+$#`\d.-]*(?:sudo\s+)?")
_SENTENCE_END = (".", "!", "?", ":", ",")


def _compile(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(f"(?m){pattern}", options)
    except re2.error as error:
        raise ValueError(f"not an RE2 pattern: {error}") from None


class Policy:
    """The rules, compiled."""

    def __init__(self, rules: PolicyRules) -> None:
        self.warning_cost = rules.warning_cost
        self._imports = rules.imports.rules
        self._patterns = [
            (rule, _compile(rule.pattern), [_compile(u) for u in (kind.unless, rule.unless) if u])
            for kind in (rules.secrets, rules.commands, rules.licences)
            for rule in kind.rules
        ]

    def violations(self, markdown: str, blocks: list[Block]) -> list[Violation]:
        """Return every violation in a Markdown text with these code blocks, sorted by line.

        Each rule on text has at most five. A rule on code also applies to raw HTML and to a line
        that is a command by itself; a mention in a sentence is a warning.
        """
        code_lines = {
            line for block in blocks for line in range(block.line, block.line + block.lines)
        }
        # Has the same length as the text, so that a match is at the same position in both.
        command = markdown.replace("\\\n", "  ").translate(_COMMAND_READING)
        command = _TAG.sub(lambda tag: " " * len(tag[0]), command)
        found = set()
        for rule, pattern, unless in self._patterns:
            text = command if rule.reads == "command" else markdown
            for start in islice(_matches(rule, pattern, unless, text), _MATCHES):
                line = markdown.count("\n", 0, start) + 1
                code = line in code_lines or _begins_line(markdown, start)
                mention = rule.where == "code" and not code
                severity: Severity = "warning" if mention else rule.severity
                found.add(Violation(line, rule.id, severity, rule.reason))
        for block in blocks:
            if block.language in ("python", UNCLEAR, HTML):
                found.update(self._forbidden_imports(block))
        return sorted(found)

    def _forbidden_imports(self, block: Block) -> Iterator[Violation]:
        text = _TAG.sub(" ", block.text) if block.language == HTML else block.text
        for line, module in _imports(text):
            for rule in self._imports:
                if any(module == name or module.startswith(f"{name}.") for name in rule.modules):
                    yield Violation(
                        block.line + line - 1, rule.id, rule.severity, f"{module}: {rule.reason}"
                    )


def _begins_line(markdown: str, start: int) -> bool:
    """Return whether only a bullet or prompt precedes the match, and the line is not a sentence."""
    begin = markdown.rfind("\n", 0, start) + 1
    end = markdown.find("\n", start)
    line = markdown[begin:end] if end >= 0 else markdown[begin:]
    before = _BEFORE_A_COMMAND.fullmatch(markdown[begin:start][:100])
    return before is not None and not line.rstrip("` \t").endswith(_SENTENCE_END)


class PolicyCheck(ProposalCheck):
    """The policy, applied to every text of a proposal. A blocking violation bars the proposal."""

    name = "policy"

    def __init__(self, directory: Path, sandbox: Sandbox) -> None:
        super().__init__(directory, sandbox)
        self._policy = Policy(load_policy(directory))

    async def run(self, proposal: ParsedProposal) -> Check:
        return await asyncio.to_thread(self._check, proposal)

    def _check(self, proposal: ParsedProposal) -> Check:
        findings, blocking, warnings = [], 0, 0
        for each in proposal.texts:
            for found in self._policy.violations(each.text, list(each.blocks)):
                blocking += found.severity == "blocking"
                warnings += found.severity == "warning"
                place = f"{each.place} {found.line}"
                findings.append(f"{found.severity} {found.rule}: {place}: {found.reason}")
        return Check(
            name=self.name,
            outcome="failed" if blocking else "passed",
            score=0.0 if blocking else max(0.0, 1 - self._policy.warning_cost * warnings),
            blocking=blocking > 0,
            findings=shown(findings),
            errors=blocking,
            warnings=warnings,
        )


def load_policy(directory: Path = CONFIG) -> PolicyRules:
    """Load the rules of a directory's policy.yaml.

    Raises:
        InvalidConfig: the file is missing, not YAML, or inconsistent.
    """
    return read_config(directory / POLICY_FILE, PolicyRules)


class SecretPatterns:
    """The rules on secrets, compiled to find the positions of secrets in a text."""

    def __init__(self, rules: PatternRules) -> None:
        self.rules = rules
        self._patterns = [
            (
                rule,
                _compile(rule.pattern),
                [_compile(unless) for unless in (rules.unless, rule.unless) if unless],
                _compile(rule.covers) if rule.covers else None,
            )
            for rule in rules.rules
        ]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return (start, end) of every secret, sorted and disjoint, by all rules in any place."""
        found = []
        for rule, pattern, unless, covers in self._patterns:
            for match in _found(rule, pattern, unless, text):
                whole = covers.search(text, match.start()) if covers else None
                span = whole.span() if whole else match.span(_secret(pattern))
                found.append(span)
        apart: list[tuple[int, int]] = []
        for start, end in sorted(found):
            if apart and start <= apart[-1][1]:
                apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
            else:
                apart.append((start, end))
        return apart


def _secret(pattern: Any) -> int:
    """Return the number of the group that holds the secret."""
    return int(pattern.groupindex.get("value", 0))


def _matches(rule: PatternRule, pattern: Any, unless: list[Any], text: str) -> Iterator[int]:
    """Yield the start of each match of the rule; read the text at most once for each match."""
    return (match.start() for match in _found(rule, pattern, unless, text))


def _found(rule: PatternRule, pattern: Any, unless: list[Any], text: str) -> Iterator[Any]:
    """Yield the rule's matches, except those that an exception excludes."""
    secret = _secret(pattern)
    for match in pattern.finditer(text):
        value = match.group(secret)
        if value is None or any(exception.search(value) for exception in unless):
            continue
        if entropy(value) >= rule.min_entropy:
            yield match


def entropy(text: str) -> float:
    """Return the Shannon entropy in bits per character."""
    counts = Counter(text).values()
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts)


def _imports(source: str) -> list[tuple[int, str]]:
    """Return (line, dotted module) of every import, including `__import__` and importlib.

    If the source does not parse, its lines are parsed one by one.
    """
    try:
        return sorted(set(_imported(ast.parse(source), 1)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return sorted(set(_imports_by_line(source)))


def _imports_by_line(source: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(source.split("\n"), start=1):
        statement = line.strip()[:1000]
        if statement.startswith(("import ", "from ")):
            try:
                yield from _imported(ast.parse(statement), number)
            except (SyntaxError, ValueError):
                continue  # not an import


def _imported(tree: ast.AST, first_line: int) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for name in names:
                    yield node.lineno + first_line - 1, name.name
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno + first_line - 1, module
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno + first_line - 1, module
            case _:
                pass
