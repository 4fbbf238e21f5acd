"""The AsyncAPI document is generated from the code, valid and complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator  # type: ignore[import-untyped]

from bridge.asyncapi.document import as_yaml, document
from bridge.asyncapi.page import page
from bridge.jetstream.consumers import CONSUMERS
from bridge.jetstream.streams import STREAMS
from tests.support.contract import Sent, channel_of, described, faults
from workflows.models.events import PUBLISHED

DOCS = Path(__file__).parents[3] / "docs"
OFFICIAL = Path(__file__).with_name("asyncapi-3.0.0.schema.json")
"""The official JSON schema of AsyncAPI."""

MADE = "python -m bridge.asyncapi"


def test_what_is_checked_in_is_what_the_code_makes() -> None:
    assert (DOCS / "asyncapi.yaml").read_text() == as_yaml(), f"{MADE} > docs/asyncapi.yaml"
    assert (DOCS / "events.md").read_text() == page(document()), f"{MADE} --page > docs/events.md"
    assert described() == document()


def test_it_is_valid_asyncapi_3() -> None:
    schema = json.loads(OFFICIAL.read_text())
    Draft7Validator.check_schema(schema)

    assert [error.message for error in Draft7Validator(schema).iter_errors(document())] == []


def test_the_official_schema_finds_what_is_wrong() -> None:
    validator = Draft7Validator(json.loads(OFFICIAL.read_text()))
    wrong = document()
    wrong["operations"]["dead-letter"]["action"] = "shout"

    assert list(validator.iter_errors(wrong))
    assert list(validator.iter_errors(document() | {"topics": {}}))


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(reference := value.get("$ref"), str):
            yield reference
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def test_every_reference_leads_somewhere() -> None:
    whole = document()

    for reference in references(whole):
        found: Any = whole
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
        assert found, reference


def test_every_subject_of_every_stream_is_in_it_with_who_sends_and_who_receives() -> None:
    described = document()
    operations = described["operations"]

    streams = {channel["x-jetstream"]["stream"] for channel in described["channels"].values()}
    assert streams == {stream.name for stream in STREAMS}
    for subject in PUBLISHED:
        assert channel_of(described, subject) == described["channels"][subject]
        assert operations[f"mirror-{subject.replace('.', '-')}"]["action"] == "send"
    for consumer in CONSUMERS:
        assert operations[consumer.name]["channel"]["$ref"].endswith(f"/{consumer.subject}")
    for subject, channel in (
        ("agent.cmd.DEV", "agent.cmd"),
        ("agent.response.US-101-design-1", "agent.response"),
        ("deadletter.planning.plan.approved", "deadletter"),
    ):
        assert channel_of(described, subject) == described["channels"][channel]
    assert channel_of(described, "planning.story.renamed") is None


def test_every_schema_is_valid_and_every_example_matches_its_schema() -> None:
    described = document()

    for schema in described["components"]["schemas"].values():
        Draft7Validator.check_schema(schema)
    for message in described["components"]["messages"].values():
        resolver = {"components": described["components"]}
        for example in message.get("examples", ()):
            validator = Draft7Validator({**message["payload"], **resolver})
            assert list(validator.iter_errors(example["payload"])) == [], message["name"]


def test_every_field_of_every_body_has_a_description() -> None:
    described = document()["components"]["schemas"]

    for name, schema in described.items():
        for field, rule in schema.get("properties", {}).items():
            assert rule.get("description"), f"{name}.{field}"


GOOD = Sent(
    stream="PLANNING_EVENTS",
    subject="planning.gate.closed",
    headers={
        "Nats-Msg-Id": "story-US-1/run/1",
        "Content-Type": "application/json",
        "ce-specversion": "1.0",
        "ce-id": "story-US-1/run/1",
        "ce-source": "/swe-ai-fleet/c-1/default/story-US-1",
        "ce-type": "planning.gate.closed",
        "ce-time": "2026-03-01T10:00:00+00:00",
    },
    data=b'{"story_id":"US-1","gate":"g","role":"PO","timestamp":"2026-03-01T10:00:00Z"}',
)


def changed(**fields: Any) -> Sent:
    return Sent(**(vars(GOOD) | fields))


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (changed(subject="planning.gate.ajar"), "no channel of the document has this subject"),
        (changed(stream="CONTEXT"), "on CONTEXT, and not on PLANNING_EVENTS"),
        (changed(headers=GOOD.headers | {"ce-type": "other"}), "'planning.gate.closed' was exp"),
        (changed(headers=GOOD.headers | {"ce-more": "x"}), "'ce-more' was unexpected"),
        (changed(headers=GOOD.headers | {"ce-time": "today"}), "is not a 'date-time'"),
        (changed(headers={"ce-id": "1"}), "'ce-source' is a required property"),
        (changed(data=b"{"), "the body is no JSON"),
        (changed(data=b'{"story_id":"US-1"}'), "'gate' is a required property"),
        (changed(data=GOOD.data[:-1] + b',"x":1}'), "'x' was unexpected"),
        (changed(data=GOOD.data.replace(b'"PO"', b"1")), "1 is not of type 'string'"),
    ],
)
def test_a_message_that_does_not_match_the_document_is_named(message: Sent, fault: str) -> None:
    assert faults(described(), [GOOD]) == []

    assert fault in "\n".join(faults(described(), [message]))
