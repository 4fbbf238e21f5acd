"""What the commands of `fleet` share: running, reporting errors, and printing results."""

import asyncio
import contextlib
import getpass
import shlex
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import TypeAdapter, ValidationError
from redis.exceptions import RedisError
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from temporalio.client import (
    Client,
    WorkflowFailureError,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from workers.cli import render
from workers.cli.snapshot import AWAY, Story
from workers.clients.connection import StartError, secret_value
from workers.clients.temporal import open_temporal
from workers.clients.valkey import valkey_client
from workers.environment import InvalidSettings
from workers.external_storage import PayloadDamaged, PayloadMissing, data_converter
from workers.payload_codec import PayloadAltered
from workers.settings import MockRefused, Settings, load
from workers.telemetry import traced
from workflows.models.base import Request
from workflows.models.ids import ID_RULE, Id, story_of, story_workflow_id
from workflows.story import StoryWorkflow

if TYPE_CHECKING:
    from activities.tokens import Caller

UPDATE_WITHIN_S = 30.0
"""How long a story has to answer an update, in seconds."""

WIDE = 1_000
"""Columns of the terminal that --wide prints for."""

COMPLETE_WITHIN_S = 2.0
RUNNING_STORIES = "WorkflowType = 'StoryWorkflow' AND ExecutionStatus = 'Running'"

T = TypeVar("T")
RequestT = TypeVar("RequestT", bound=Request)

out = Console()
err = Console(stderr=True)


class CommandError(Exception):
    """The request was not carried out; the message gives the reason and what to do."""


def complete_story(incomplete: str) -> list[str]:
    """Return the ids of running stories, for shell completion."""

    async def ids() -> list[str]:
        async with asyncio.timeout(COMPLETE_WITHIN_S), temporal(load()) as client:
            found = [each.id async for each in client.list_workflows(RUNNING_STORIES)]
        stories = [story_of(workflow_id) for workflow_id in found]
        return [story_id for story_id in stories if story_id.startswith(incomplete)]

    # Shell completion cannot show an error: nothing is offered then.
    with contextlib.suppress(Exception):
        return asyncio.run(ids())
    return []


StoryId = Annotated[
    str,
    typer.Argument(
        metavar="STORY", help="The story's id, such as US-101.", autocompletion=complete_story
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Wide = Annotated[
    bool, typer.Option("--wide", help="Print every column in full, wider than the terminal.")
]
Actor = Annotated[
    str | None,
    typer.Option(
        "--actor",
        "-a",
        help="Who you are.",
        default_factory=lambda: None,
        show_default="FLEET_TOKEN's, or your login",
    ),
]
Role = Annotated[str, typer.Option("--role", "-r", help="The role you act in: PO, QA.")]


def token_caller(settings: Settings) -> "Caller | None":
    """Return whose token FLEET_TOKEN is; None if it is not set.

    The signature is verified if GRPC_TOKEN_KEY is known. A person needs only the token.

    Raises:
        ApplicationError: `Unauthenticated`: it has expired, or is not a token of the fleet.
    """
    from activities.tokens import read_token

    token = secret_value(settings.fleet_token)
    return read_token(settings.token_keys or None, token) if token else None


def person(actor: str | None, role: str = "") -> str:
    """Return who acts: `actor`, else the owner of FLEET_TOKEN, else the login.

    Raises:
        Refused: the token belongs to someone else, or does not have that role.
        ApplicationError: as `token_caller`; `Permission`.
    """
    caller = token_caller(load())
    if caller is None:
        return actor or getpass.getuser()
    if actor not in (None, caller.actor):
        raise CommandError(f"--actor {actor}: FLEET_TOKEN is {caller.actor}'s; leave --actor out")
    if role:
        caller.require_role(role)
    return caller.actor


def signed(workflow_id: str, request: RequestT) -> RequestT:
    """Return the request to a workflow, signed by FLEET_TOKEN if that is set.

    Raises:
        ApplicationError: as `token_caller`.
    """
    caller = token_caller(load())
    return caller.signed(workflow_id, request) if caller else request


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command; an error that a person can fix becomes one line on stderr and exit code 1."""
    try:
        return asyncio.run(work)
    except (CommandError, StartError, InvalidSettings, MockRefused) as error:
        reason = str(error)
    except ApplicationError as error:
        reason = error.message
    except (PayloadMissing, PayloadDamaged, PayloadAltered) as error:
        reason = str(error)
    except RedisError as error:
        reason = f"Valkey, which keeps large payloads, does not answer: {error}. Set REDIS_HOST"
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    err.print(render.text(reason), soft_wrap=True)
    raise typer.Exit(1)


@asynccontextmanager
async def temporal(settings: Settings) -> AsyncIterator[Client]:
    """Connect to Temporal with the fleet's own data converter."""
    valkey = valkey_client(settings)
    converter = data_converter(valkey, settings.keep_payloads_for, settings.encryption_keys)
    try:
        with traced(settings, "cli") as plugins:
            yield await open_temporal(settings, converter, plugins=plugins)
    finally:
        await valkey.aclose()


@asynccontextmanager
async def handle(story_id: str) -> AsyncIterator[Story]:
    """Open a story, and report its errors as Refused."""
    async with temporal(load()) as client, command_errors(story_id, client):
        yield client.get_workflow_handle_for(
            StoryWorkflow.run, story_workflow_id(checked(story_id))
        )


@asynccontextmanager
async def command_errors(story_id: str, client: Client) -> AsyncIterator[None]:
    """Turn Temporal's errors into one line that names the rule and the remedy."""
    quoted = shlex.quote(story_id)
    try:
        yield
    except WorkflowUpdateFailedError as error:
        cause = error.cause
        raise CommandError(
            cause.message if isinstance(cause, ApplicationError) else str(cause)
        ) from None
    except WorkflowFailureError as error:
        raise CommandError(
            f"Story {story_id} has failed: {_root_cause(error)}. Start it again with `fleet start` "
            "when that is corrected"
        ) from None
    except WorkflowAlreadyStartedError:
        raise CommandError(
            f"Story {story_id} runs already: look at it with `fleet show {quoted}`, change "
            f"it with `fleet amend {quoted}`, or give the new one another story_id"
        ) from None
    except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError):
        raise CommandError(
            f"Story {story_id} does not answer in {UPDATE_WITHIN_S:.0f} s. Is a story worker "
            "running? `python -m workers story` starts one. The request may still be carried "
            f"out then: look with `fleet show {quoted}` before you repeat it"
        ) from None
    except WorkflowQueryFailedError as error:
        raise CommandError(f"Story {story_id} cannot answer: {error}") from None
    except RPCError as error:
        raise CommandError(_rpc_reason(story_id, client, error)) from None


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return error.message if isinstance(error, ApplicationError) else str(error)


def ended(story_id: str) -> str:
    """Return why a story that has ended cannot be changed."""
    shown = shlex.quote(story_id)
    return f"Story {story_id} has ended: nothing can change it any more. `fleet show {shown}`"


def _rpc_reason(story_id: str, client: Client, error: RPCError) -> str:
    where = client.service_client.config.target_host
    if error.status == RPCStatusCode.NOT_FOUND and "workflow execution already completed" in (
        error.message
    ):
        return ended(story_id)
    if error.status == RPCStatusCode.NOT_FOUND:
        return (
            f"There is no story {story_id} in namespace {client.namespace} at {where}. "
            "`fleet list --all` lists those there are"
        )
    if error.status in AWAY:
        return (
            f"No answer from Temporal at {where}, or from a story worker ({error.message}). "
            "Start them: `make status` shows what runs"
        )
    return f"Temporal at {where} refuses: {error.message}"


def file_text(file: Path, name: str) -> str:
    """Return the text of a file that a command is given; `-` is stdin.

    Args:
        file: The file.
        name: The name of the command's argument, for the error.

    Raises:
        CommandError: It cannot be read, or is not UTF-8.
    """
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{name}: {error}; give a file in UTF-8") from None


def checked(story_id: str) -> str:
    """Return the id if it is valid: it goes into workflow ids and queries."""
    try:
        return TypeAdapter(Id).validate_python(story_id)
    except ValidationError:
        raise CommandError(f"STORY: {story_id[:60]!r} is not a story id: it is {ID_RULE}") from None


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show progress bars on stderr if it is a terminal; they disappear when the work is done."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as progress:
        yield progress


def emit(value: object, shown: RenderableType, as_json: bool, wide: bool = False) -> None:
    """Print for a program, or for a person.

    Args:
        value: What a program gets, as JSON.
        shown: What a person gets.
        as_json: Print for a program.
        wide: Print every column, however narrow the terminal is.
    """
    if as_json:
        print(TypeAdapter(type(value)).dump_json(value, indent=2).decode())
    elif wide:
        out.print(shown, width=WIDE, crop=False)
    else:
        out.print(shown)
