"""`fleet token`: who may call the gRPC services, and in which roles."""

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from workers.cli.render import text
from workers.cli.session import (
    CommandError,
    Json,
    StoryId,
    checked,
    err,
    file_text,
    run,
    token_caller,
)
from workers.clients.connection import secret_value
from workers.clients.valkey import open_valkey
from workers.settings import load
from workflows.models.base import Request
from workflows.models.errors import invalid_input
from workflows.models.ids import story_workflow_id
from workflows.models.outbox import SkipEntry
from workflows.models.report import WorkspaceReport
from workflows.models.story import Amend, Approve, RaiseBudget, Rebase, Reject

app = typer.Typer(
    name="token",
    help="Tokens for the gRPC services, and for `fleet` itself.",
    no_args_is_help=True,
    add_completion=False,
)

DAYS_AT_MOST = 365

UPDATES: dict[str, type[Request]] = {
    "approve": Approve,
    "reject": Reject,
    "amend": Amend,
    "raise_budget": RaiseBudget,
    "rebase": Rebase,
    "report": WorkspaceReport,
    "skip_entry": SkipEntry,
}
"""Update of a story -> its request."""


@app.command(
    epilog="Example:  fleet token create --actor ana --roles PO,QA --days 30  ·  then: "
    "grpcurl -plaintext -H \"authorization: Bearer $TOKEN\" -d '{}' "
    "localhost:50055 orchestrator.v1.OrchestratorService/ListCouncils"
)
def create(
    actor: Annotated[str, typer.Option("--actor", "-a", help="Whose it is: a person, a service.")],
    roles: Annotated[
        str, typer.Option(help="The roles it has, separated by commas: PO, QA, OPERATOR.")
    ] = "",
    days: Annotated[
        float, typer.Option(help="How long it is valid.", min=0.001, max=DAYS_AT_MOST)
    ] = 30.0,
    as_json: Json = False,
) -> None:
    """Make a token, signed with GRPC_TOKEN_KEY. `fleet token revoke` ends it early."""

    async def work() -> None:
        from activities.tokens import Caller, create_token, read_token

        if not days <= DAYS_AT_MOST:  # refuses NaN, too
            raise CommandError(f"--days: must be a number up to {DAYS_AT_MOST}")
        key = secret_value(load().grpc_token_key)
        if key is None:
            raise CommandError(
                "GRPC_TOKEN_KEY is not set: set it to the key that the services have, or run "
                "where the local stack's `env` file is"
            )
        wanted = frozenset(role.strip() for role in roles.split(",") if role.strip())
        caller = Caller(actor=actor, roles=wanted)
        token = create_token(key, caller, timedelta(days=days))
        token_id = read_token([key], token).token_id
        if as_json:
            made = {"token": token, "id": token_id, "actor": actor, "roles": sorted(wanted)}
            print(json.dumps(made))
        else:
            print(token)
            has = ", ".join(sorted(wanted)) or "no role"
            words = f"Valid for {days:g} days: {actor}, {has}. Its id is {token_id}."
            err.print(text(words), soft_wrap=True)

    run(work())


@app.command(epilog="Example:  fleet token show  ·  FLEET_TOKEN=… fleet token show --json")
def show(as_json: Json = False) -> None:
    """Show whose token FLEET_TOKEN is, and its roles."""

    async def work() -> None:
        caller = token_caller(load())
        if caller is None:
            raise CommandError("FLEET_TOKEN is not set. `fleet token create` makes one")
        if as_json:
            shown = {"actor": caller.actor, "roles": sorted(caller.roles), "id": caller.token_id}
            print(json.dumps(shown))
        else:
            print(f"{caller.actor}: {', '.join(sorted(caller.roles)) or 'no role'}")
            print(f"id: {caller.token_id}")

    run(work())


@app.command(epilog="Example:  fleet token revoke 5d3c5e0f8a2b4c6f9d1e7a3b2c4d6e8f")
def revoke(
    token_id: Annotated[
        str, typer.Argument(metavar="ID", help="The token's id, as `create` and `show` print it.")
    ],
) -> None:
    """End a token before it expires: every process refuses it within seconds."""

    async def work() -> None:
        from activities.revoked import RevokedTokens  # Neo4j's driver is slow to import

        if not re.fullmatch(r"[0-9a-f]{32}", token_id):
            raise CommandError("ID: must be the 32 digits that `fleet token show` prints")
        async with open_valkey(load()) as valkey:
            await RevokedTokens(valkey).revoke(token_id, timedelta(days=DAYS_AT_MOST))
        err.print(f"Revoked {token_id}.")

    run(work())


@app.command(
    epilog='Example:  echo \'{"gate": "approve_scope", "actor": "ana", "role": "PO"}\' | '
    "fleet token sign US-101 approve > approve.json  ·  then: temporal workflow update execute "
    "--workflow-id story-US-101 --name approve --input-file approve.json"
)
def sign(
    story_id: StoryId,
    update: Annotated[
        str,
        typer.Argument(
            help="What is asked of the story: approve, reject, amend, raise_budget, rebase, "
            "report, skip_entry."
        ),
    ],
    file: Annotated[Path, typer.Argument(help="Its JSON; `-` for stdin.")] = Path("-"),
    minutes: Annotated[
        float, typer.Option(help="How long it may be sent.", min=0.1, max=24 * 60)
    ] = 5.0,
) -> None:
    """Sign the JSON of a request with FLEET_TOKEN, for the `temporal` CLI."""

    async def work() -> None:
        from activities.tokens import create_proof

        model = UPDATES.get(update)
        if model is None:
            raise CommandError(f"UPDATE: must be one of {', '.join(UPDATES)}")
        settings = load()
        token, caller = secret_value(settings.fleet_token), token_caller(settings)
        if token is None or caller is None:
            raise CommandError("FLEET_TOKEN is not set. `fleet token create` makes one")
        given = file_text(file, "FILE")
        try:
            request = model.model_validate_json(given)
        except ValidationError as error:  # not JSON at all
            raise invalid_input(model.__name__, error) from None
        proof = create_proof(
            token, story_workflow_id(checked(story_id)), request, timedelta(minutes=minutes)
        )
        signed = request.model_copy(update={"proof": proof})
        print(signed.model_dump_json(exclude_defaults=True))

    run(work())
