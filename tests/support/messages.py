"""Random protobuf messages of any type, for property tests of services with bad input."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

INT32 = st.integers(-(2**31), 2**31 - 1)
VALUES: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: st.text(max_size=60)
    | st.sampled_from(["US-1", "approve_scope", "L1", "OK", "PO", "' OR 1=1 --", "a" * 5_000]),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_INT32: INT32 | st.integers(0, 100),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32) | st.floats(0, 100, width=32),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
}


def messages(kind: type[Message]) -> st.SearchStrategy[Any]:
    """Generate messages of this type; each field is absent or has any value of its wire type."""
    return _fields(kind.DESCRIPTOR).map(lambda fields: kind(**fields))


def _fields(descriptor: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={f.name: _value(f) for f in descriptor.fields})


def _value(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        return st.dictionaries(_one(entry["key"]), _one(entry["value"]), max_size=3)
    return st.lists(_one(field), max_size=4) if field.is_repeated else _one(field)


def _one(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    return _fields(field.message_type) if field.message_type else VALUES[field.type]
