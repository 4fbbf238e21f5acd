"""`fleet token`: who may call the gRPC services, and in which roles."""

import json
from datetime import timedelta
from typing import Annotated

import typer

from workers.cli.render import text
from workers.cli.session import CommandError, Json, err, run, token_caller
from workers.clients.connection import secret_value
from workers.settings import load

app = typer.Typer(
    name="token",
    help="Tokens for the gRPC services, and for `fleet` itself.",
    no_args_is_help=True,
    add_completion=False,
)

DAYS_AT_MOST = 365


@app.command(
    epilog="Example:  fleet token create --actor ana --roles PO,QA --days 30  ·  then: "
    "grpcurl -plaintext -H \"authorization: Bearer $TOKEN\" -d '{}' "
    "localhost:50055 orchestrator.v1.OrchestratorService/ListCouncils"
)
def create(
    actor: Annotated[str, typer.Option("--actor", "-a", help="Whose it is: a person, a service.")],
    roles: Annotated[
        str, typer.Option(help="What it may act as, by commas: PO, QA, OPERATOR, ….")
    ] = "",
    days: Annotated[
        float, typer.Option(help="How long it is valid.", min=0.001, max=DAYS_AT_MOST)
    ] = 30.0,
    as_json: Json = False,
) -> None:
    """Make a token, signed with GRPC_TOKEN_KEY. It can't be withdrawn but by another key."""

    async def work() -> None:
        from bridge.grpc.auth import Caller, create_token  # gRPC is slow to import

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
        if as_json:
            print(json.dumps({"token": token, "actor": actor, "roles": sorted(wanted)}))
        else:
            print(token)
            has = ", ".join(sorted(wanted)) or "no role"
            err.print(text(f"Valid for {days:g} days: {actor}, {has}."), soft_wrap=True)

    run(work())


@app.command(epilog="Example:  fleet token show  ·  FLEET_TOKEN=… fleet token show --json")
def show(as_json: Json = False) -> None:
    """Show whose token FLEET_TOKEN is, and its roles."""

    async def work() -> None:
        caller = token_caller(load())
        if caller is None:
            raise CommandError("FLEET_TOKEN is not set. `fleet token create` makes one")
        if as_json:
            print(json.dumps({"actor": caller.actor, "roles": sorted(caller.roles)}))
        else:
            print(f"{caller.actor}: {', '.join(sorted(caller.roles)) or 'no role'}")

    run(work())
