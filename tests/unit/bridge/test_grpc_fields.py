"""Every field of every request is read by the code that serves it: none is accepted and ignored.

The fields that are read are found in the source: attributes of parameters annotated with a message,
of the messages in them, and of names assigned from either.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from bridge.grpc.orchestrator.requests import FLAGS
from bridge.grpc.planning import Listing
from workers.environment import ROOT, SERVICES

GRPC = ROOT / "bridge" / "grpc"
SOURCES = [*GRPC.glob("*.py"), *GRPC.glob("context/*.py"), *GRPC.glob("orchestrator/*.py")]
WIRE = "bridge.grpc.wire"

READ_BY_NAME = {
    **{f"orchestrator.v1.ContextOptions.{name}": "_context_options" for name in FLAGS.values()},
    "fleet.workspace.v1": "workspace.report_of takes every field of a report",
}
"""Fields or whole packages that are read by `getattr`."""

DECIDES_NOTHING = {
    "fleet.planning.v1.TransitionRequest.actor": "who acts is the token's actor (design 10)",
}

Names = dict[str, set[Descriptor]]


def test_every_field_of_every_request_is_read() -> None:
    fields = {
        f"{message.full_name}.{field.name}"
        for service in SERVICES
        for request in requests_of(service)
        for message in parts_of(request)
        for field in message.fields
    }
    read = {field for path in SOURCES for field in read_in(ast.parse(path.read_text()))}

    by_name = {field for field in fields if field.startswith(tuple(READ_BY_NAME))}
    assert fields - read - by_name == set(DECIDES_NOTHING)
    assert "orchestrator.v1.TaskConstraints.metadata" in read


def test_every_metadata_key_is_documented() -> None:
    code = "".join(path.read_text() for path in SOURCES)
    keys = set(re.findall(r'"(x-[a-z-]+)"', code)) | {
        f"x-{field.replace('_', '-')}" for field in Listing.model_fields
    }

    page = (ROOT / "docs" / "grpc.md").read_text()
    assert sorted(key for key in keys if f"`{key}`" not in page) == []


def test_every_field_that_the_page_names_is_one_of_the_contracts() -> None:
    page = (ROOT / "docs" / "grpc.md").read_text()
    known = {
        f"{message.name}.{field.name}"
        for service in SERVICES
        for request in requests_of(service)
        for message in parts_of(request)
        for field in message.fields
    }

    assert set(re.findall(r"`([A-Z]\w+\.[a-z_]+)`", page)) <= known


def requests_of(service: str) -> Iterator[Descriptor]:
    file = import_module(f"{WIRE}.{service}_pb2").DESCRIPTOR
    for each in file.services_by_name.values():
        for method in each.methods:
            yield method.input_type


def parts_of(message: Descriptor) -> Iterator[Descriptor]:
    """Yield the message and the messages in it; a map counts as a field."""
    yield message
    for field in message.fields:
        if (part := message_in(field)) and not part.GetOptions().map_entry:
            yield from parts_of(part)


def message_in(field: FieldDescriptor) -> Descriptor | None:
    part: Descriptor | None = field.message_type
    return part


def read_in(module: ast.Module) -> Iterator[str]:
    """Yield the fields of messages that a module's functions read."""
    wires = {
        alias.asname or alias.name: import_module(f"{WIRE}.{alias.name}")
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and node.module == WIRE
        for alias in node.names
    }

    def annotated(annotation: ast.expr | None) -> set[Descriptor]:
        match annotation:
            case ast.BinOp(left=left, right=right):
                return annotated(left) | annotated(right)
            case ast.Attribute(value=ast.Name(id=name), attr=message) if name in wires:
                return {getattr(wires[name], message).DESCRIPTOR}
        return set()

    for function in ast.walk(module):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            names = {each.arg: annotated(each.annotation) for each in function.args.args}
            yield from read_with(function, {name: found for name, found in names.items() if found})


def read_with(function: ast.AST, names: Names) -> Iterator[str]:
    """Yield the fields that a function reads from the messages in `names` or derived from them."""
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names[name] = messages(value, names)
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                for target, value in zip(targets, values, strict=True):
                    if isinstance(target, ast.Name):
                        names[target.id] = messages(value, names)
            case (
                ast.comprehension(target=ast.Name(id=name), iter=each)
                | ast.For(target=ast.Name(id=name), iter=each)
            ):
                names[name] = messages(each, names)
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            for message in messages(node.value, names):
                if node.attr in message.fields_by_name:
                    yield f"{message.full_name}.{node.attr}"


def messages(expression: ast.expr, names: Names) -> set[Descriptor]:
    """Return the messages that an expression may be: a name's, or those of its attribute."""
    match expression:
        case ast.Name(id=name):
            return names.get(name, set())
        case ast.Attribute(value=value, attr=attribute):
            found = [message.fields_by_name.get(attribute) for message in messages(value, names)]
            return {part for field in found if field and (part := message_in(field))}
    return set()
