"""The wire contract of the gRPC services as plain data: names, numbers, types and methods.

`grpc_wire.json` beside this module holds the agreed contract. The served one may add to it, but not
change it.
"""

import json
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)

AGREED = Path(__file__).with_suffix(".json")

Wire = dict[str, dict[str, Any]]


def wire_of(file: FileDescriptorProto) -> Wire:
    """Return `package.Message` -> field -> [number, type, repeated], and services and enums alike.

    A service maps each method to [input type, output type, client streaming, server streaming],
    an enum each name to its number.
    """
    found: Wire = {}

    def message(scope: str, each: DescriptorProto) -> None:
        name = f"{scope}.{each.name}"
        found[name] = {
            field.name: [
                field.number,
                field.type_name.removeprefix(".") or FieldDescriptorProto.Type.Name(field.type),
                field.label == FieldDescriptorProto.LABEL_REPEATED,
            ]
            for field in each.field
        }
        for nested in each.nested_type:
            message(name, nested)

    for each in file.message_type:
        message(file.package, each)
    for enum in file.enum_type:
        found[f"{file.package}.{enum.name}"] = {each.name: each.number for each in enum.value}
    for service in file.service:
        found[f"{file.package}.{service.name}"] = {
            method.name: [
                method.input_type.removeprefix("."),
                method.output_type.removeprefix("."),
                method.client_streaming,
                method.server_streaming,
            ]
            for method in service.method
        }
    return found


def breaks(agreed: Wire, served: Wire) -> list[str]:
    """Return what is missing from `served`, or different there, for a client of `agreed`."""
    return [
        f"{name}.{member}: {served.get(name, {}).get(member, 'missing')}, must be {wanted}"
        for name, members in agreed.items()
        for member, wanted in members.items()
        if served.get(name, {}).get(member) != wanted
    ] + [f"{name}: missing" for name in agreed if name not in served]


def agreed() -> Wire:
    """Load the agreed contract."""
    found: Wire = json.loads(AGREED.read_text())
    return found
