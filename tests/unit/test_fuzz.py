"""Random and mutated messages at every edge: each is taken, or refused with a reason.

`make test` sends a few; `make fuzz` sends FUZZ=100000 in all. A run is repeated by its SEED.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from google.protobuf.message import DecodeError, Message
from grpc import StatusCode
from temporalio import workflow
from temporalio.api.common.v1 import Payload
from temporalio.bridge.proto.workflow_activation import WorkflowActivation
from temporalio.contrib.pydantic import PydanticPayloadConverter
from temporalio.converter import DefaultFailureConverter
from temporalio.exceptions import ApplicationError

from activities.agents import response_schemas as schemas
from activities.config import InvalidConfig, parse_yaml
from bridge.agents.responses import InvalidResponse, parse_response
from bridge.grpc.errors import STATUS
from bridge.grpc.orchestrator import requests as grpc_requests
from bridge.grpc.wire import orchestrator_pb2 as pb
from bridge.inbox.envelopes import InvalidMessage, in_lower_case
from bridge.inbox.parsing import READING, Received, parse_event
from tests.support.inputs import SENT
from tests.support.mutations import YAML, damaged, encoded, filled, mutated
from workers.payloads import Payloads
from workflows.models.agent_messages import AgentResponse
from workflows.models.errors import ErrorType
from workflows.models.events import example
from workflows.rules.machine_file import InvalidMachine, parse_machine

SEED = int(os.environ.get("SEED", "12"))
MESSAGES = int(os.environ.get("FUZZ", "3000"))
SLOWEST_S = 20.0
"""No message may take this long; on an idle machine none takes a second."""

REFUSALS = (ApplicationError, InvalidMessage, InvalidResponse, InvalidConfig, InvalidMachine)
CONFIG = Path(__file__).parents[2] / "deploy" / "config"

Send = Callable[[random.Random], object]


def nats_event(random: random.Random) -> object:
    kind = random.choice(list(READING))
    headers = {
        "ce-id": random.choice(["a/1", "", "x" * 5_000]),
        "ce-time": random.choice(["2026-01-01T00:00:00Z", "never", ""]),
        "ce-type": random.choice([kind.SUBJECT, "another", ""]),
        "content-type": random.choice(["application/json", "application/cloudevents+json", "\x00"]),
    }
    kept = {name: value for name, value in headers.items() if value and random.random() < 0.5}
    data = encoded(random, mutated(random, example(kind)))
    received = datetime(2026, 1, 31, 12, tzinfo=UTC)
    return parse_event(
        Received(kind.SUBJECT, "PLANNING_EVENTS", 7, received, in_lower_case(kept), data)
    )


RESPONSE = example(AgentResponse) | {"task_id": "t-1"}


def agent_response(random: random.Random) -> object:
    data = encoded(random, mutated(random, RESPONSE))
    return parse_response(random.choice(["agent.response.t-1", "agent.response.>", ""]), data)


ANSWERS: dict[str, Any] = {
    "proposal": {
        "approach": "a",
        "content": "c",
        "decisions": [{"title": "t", "rationale": "r", "affects": ["x"]}],
    },
    "critique": {
        "points": [{"severity": "low", "text": "t"}],
        "suggestion": "s",
        "verdict": "accept",
    },
}
FORMS = {"proposal": schemas.proposal_form(500), "critique": schemas.critique_form(500)}


def llm_answer(random: random.Random) -> object:
    name = random.choice(list(FORMS))
    document = encoded(random, mutated(random, ANSWERS[name])).decode(errors="replace")
    around = random.choice(["{}", "```json\n{}\n```", "<think>{{</think>{}", "{{{}", "{}{}"])
    text = around.replace("{}", document)
    try:
        return FORMS[name].read(text)
    except ValueError as problem:
        raise ApplicationError(str(problem)) from None


MACHINE = yaml.safe_load((CONFIG / "agile.fsm.yaml").read_text())


def configuration(random: random.Random) -> object:
    if random.random() < 0.5:
        return parse_machine(mutated(random, MACHINE))
    text = bytearray((CONFIG / random.choice(["rigor.yaml", "checks.yaml"])).read_bytes())
    place = random.randrange(len(text))
    text[place:place] = random.choice(YAML).encode()
    document = damaged(random, text).decode(errors="replace")
    return parse_yaml(Path("rigor.yaml"), document)


def workflow_input(random: random.Random) -> object:
    """Send a start, an update, a signal or a query through the validation of the story worker."""
    kind = random.choice(list(SENT))
    defn = workflow._Definition.must_from_class(kind)
    payloads = Payloads(
        SimpleNamespace(  # type: ignore[arg-type]
            defn=defn,
            payload_converter_factory=PydanticPayloadConverter,
            failure_converter_class=DefaultFailureConverter,
        )
    )
    start, inputs = SENT[kind]
    name = random.choice(["start", *inputs, *filter(None, defn.queries)])
    value = start if name == "start" else inputs.get(name)
    encoding = random.choice([b"json/plain"] * 8 + [b"binary/plain", b""])
    data = encoded(random, mutated(random, value))
    sent = [Payload(metadata={"encoding": encoding}, data=data)] * random.choice([1] * 8 + [0, 2])
    activation = WorkflowActivation()
    job = activation.jobs.add()
    if name == "start":
        job.initialize_workflow.arguments.extend(sent)
    elif name in defn.queries:
        job.query_workflow.query_type = name
        job.query_workflow.arguments.extend(sent)
    elif name in defn.updates and (name not in defn.signals or random.random() < 0.5):
        job.do_update.name = name
        job.do_update.input.extend(sent)
    else:
        job.signal_workflow.signal_name = name
        job.signal_workflow.input.extend(sent)
    rest, answers = payloads.judge(activation)
    for answer in answers:
        failure = answer.update_response.rejected
        if answer.HasField("fail_workflow_execution"):
            failure = answer.fail_workflow_execution.failure
        elif answer.HasField("respond_to_query"):
            failure = answer.respond_to_query.failed
        raise ApplicationError(failure.message, type=failure.application_failure_info.type)
    if rest.jobs[0].signal_workflow.signal_name == "not_understood":
        raise ApplicationError(rest.jobs[0].signal_workflow.input[1].data.decode())
    return rest


REQUESTS: dict[type[Message], Callable[[Any], object]] = {
    pb.DeliberateRequest: grpc_requests.deliberating,
    pb.OrchestrateRequest: grpc_requests.orchestrating,
    pb.GetDeliberationResultRequest: grpc_requests.by_task,
    pb.CreateCouncilRequest: grpc_requests.creating,
    pb.RegisterAgentRequest: grpc_requests.registering,
    pb.UnregisterAgentRequest: grpc_requests.unregistering,
    pb.PlanningEventRequest: grpc_requests.planning_event,
    pb.DeriveSubtasksRequest: grpc_requests.deriving,
    pb.GetTaskContextRequest: grpc_requests.task_context,
    pb.GetMetricsRequest: grpc_requests.measuring,
}


def grpc_request(random: random.Random) -> object:
    kind = random.choice(list(REQUESTS))
    message = kind()
    filled(random, message)
    data = damaged(random, bytearray(message.SerializeToString()))
    try:
        read = kind.FromString(data)
    except DecodeError as error:  # gRPC itself refuses it
        raise ApplicationError(str(error) or "not a message") from None
    return REQUESTS[kind](read)


EDGES: tuple[Send, ...] = (
    nats_event,
    agent_response,
    llm_answer,
    configuration,
    workflow_input,
    grpc_request,
)


def refusal_of(send: Send, random: random.Random) -> Exception | None:
    """Return the refusal of a message; None if it was taken."""
    try:
        send(random)
    except REFUSALS as refusal:
        return refusal
    return None


@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("send", EDGES, ids=lambda send: send.__name__)
def test_every_message_is_taken_or_refused_with_a_reason(send: Send) -> None:
    refused = 0
    count = MESSAGES // len(EDGES)
    for number in range(count):
        began = time.process_time()  # so that a busy machine does not count
        try:
            refusal = refusal_of(send, random.Random(f"{SEED}/{send.__name__}/{number}"))
        except Exception as error:
            raise AssertionError(f"SEED={SEED}: message {number} is not handled") from error
        assert time.process_time() - began < SLOWEST_S, number
        if refusal is not None:
            refused += 1
            assert len(str(refusal).strip()) > 3, number
            kind = getattr(refusal, "type", None)
            assert kind is None or STATUS[ErrorType(kind)] != StatusCode.INTERNAL, number

    assert 0 < refused < count
