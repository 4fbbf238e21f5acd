"""`python -m deploy.local up|down|kill|restart|status|logs|clean`: control the local stack."""

import asyncio
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

try:
    from deploy.local.parts import Part
    from deploy.local.server import NotInstalled, ServerNotReady
    from deploy.local.settings import InvalidStackSettings, StackSettings
    from deploy.local.stack import (
        OtherSettings,
        PartStatus,
        PortsTaken,
        Stack,
        Stage,
        StillRunning,
    )
    from deploy.local.supervisor import SupervisorFailed
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"{missing.name} is not installed; install the extra `local`: "
        "pip install 'swe-ai-fleet[local]'"
    ) from None

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="The whole fleet on this machine."
)
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

Without = Annotated[
    list[str] | None, typer.Option("--without", help="A part to leave out, such as workers or ray.")
]


@app.command()
def up(
    free_ports: Annotated[
        bool, typer.Option("--free-ports", help="Take free ports, to run beside another stack.")
    ] = False,
    without: Without = None,
) -> None:
    """Start what does not run, and wait until everything is ready."""
    stack = _stack(free_ports=free_ports, without=without)
    with Progress() as progress:
        started = asyncio.run(stack.up(progress.report))
    if not started:
        console.print("everything runs already")
    _show(asyncio.run(stack.status()))
    console.print(f"logs in {_short(stack.supervisor.logs)}, settings in {_short(stack.env_file)}")
    if stack.settings.observe:
        console.print(
            "Grafana is in no package registry: start your own, and import "
            "deploy/observability/dashboards/*.json with Prometheus as the data source"
        )


@app.command()
def down() -> None:
    """Stop everything gracefully; stored data is kept."""
    stack = _stack()
    with Progress() as progress:
        ran = asyncio.run(stack.down(progress.report))
    console.print("stopped" if ran else "nothing ran")


@app.command()
def kill() -> None:
    """End everything at once, as a power cut would."""
    ended = _stack().kill()
    console.print(f"killed {len(ended)} processes" if ended else "nothing ran")


@app.command()
def restart(part: Annotated[str, typer.Argument(help="temporal, nats, ray, workers, ...")]) -> None:
    """Stop one part, start it again, and wait until it is ready."""
    stack = _stack()
    known = [one.name for one in stack.wanted if one.ours]
    if part not in known:
        _fail(f"{part} is not a part of this stack; its parts are {', '.join(known)}")
    with Progress() as progress:
        asyncio.run(stack.restart(part, progress.report))


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what runs, where, and whether it is healthy; exit code 1 when something is not."""
    found = asyncio.run(_stack().status())
    if as_json:
        print(json.dumps([_as_json(one) for one in found], indent=1))
    else:
        _show(found)
    if not all(one.healthy for one in found):
        raise SystemExit(1)


@app.command()
def logs(
    parts: Annotated[
        list[str] | None, typer.Argument(help="Parts whose logs are shown; all if none is named.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they grow.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Of each log.")] = 20,
) -> None:
    """Print the ends of the logs."""
    stack = _stack()
    folder = stack.supervisor.logs
    files = [folder / f"{part}.log" for part in parts] if parts else sorted(folder.glob("*.log"))
    if missing := [file.name for file in files if not file.exists()]:
        have = ", ".join(sorted(file.stem for file in folder.glob("*.log"))) or "none yet"
        _fail(f"no {', '.join(missing)} in {_short(folder)}; logs there: {have}")
    if not files:
        _fail(f"there are no logs in {_short(folder)} yet: start the stack first (make up)")
    flags = ["-F"] if follow else []
    os.execvp("tail", ["tail", "-n", str(lines), *flags, *map(str, files)])  # noqa: S606


@app.command()
def clean(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove what the stack stored: stories, graph, events, logs, credentials."""
    stack = _stack()
    if not yes:
        if not sys.stdin.isatty():
            _fail("this removes every story and credential: say --yes (make clean YES=1)")
        typer.confirm(f"Remove every story, event and credential in {stack.home}?", abort=True)
    removed = stack.clean()
    console.print(
        f"removed {', '.join(_short(path) for path in removed)}" if removed else "nothing to remove"
    )


class Progress:
    """Lines that grow while parts start and stop: live on a terminal, else one for each change."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[Stage, str, Spinner]] = {}
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if console.is_terminal:
            self._live = Live(get_renderable=self._table, console=console, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def report(self, part: Part, stage: Stage, seconds: float) -> None:
        """Show the new stage of a part."""
        text = {
            "starting": f"[yellow]{'starting' if part.ours else 'asked'}[/] {part.where}",
            "ready": f"[green]ready[/] in {seconds:.1f} s  {part.where}",
            "failed": f"[red]failed[/] after {seconds:.1f} s",
            "stopping": "[yellow]stopping[/]",
            "stopped": f"stopped in {seconds:.1f} s",
        }[stage]
        self._rows[part.name] = (stage, text, Spinner("dots"))
        if self._live is None:
            console.print(f"{part.name:<9} {text}", soft_wrap=True)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        marks = {"ready": "[green]✓[/]", "failed": "[red]✗[/]", "stopped": "·"}
        for name, (stage, text, spinner) in self._rows.items():
            table.add_row(marks.get(stage, spinner), name, text)
        return table


def _stack(*, free_ports: bool = False, without: list[str] | None = None) -> Stack:
    stack = Stack(StackSettings.load(pick_free_ports=free_ports), without=without or ())
    if unknown := set(without or ()) - {part.name for part in stack.parts.all}:
        known = ", ".join(part.name for part in stack.parts.all)
        _fail(f"--without {', '.join(sorted(unknown))}: the parts are {known}")
    return stack


def _end_of(log: Path | None) -> str:
    if log is None or not log.exists():
        return ""
    last = log.read_text(errors="replace").splitlines()[-8:]
    return "".join(f"\n  | {line[:200]}" for line in last)


def _show(found: list[PartStatus]) -> None:
    table = Table(box=None, pad_edge=False, show_edge=False)
    for column in ("part", "state", "healthy", "pid", "up", "where"):
        table.add_column(column, overflow="fold")
    for one in found:
        table.add_row(
            one.name,
            one.state,
            "[green]yes[/]" if one.healthy else f"[red]no[/] {one.why}",
            str(one.pid or ""),
            str(timedelta(seconds=int(one.up.total_seconds()))) if one.up else "",
            one.where,
        )
    console.print(table)


def _as_json(one: PartStatus) -> dict[str, object]:
    return {
        "name": one.name,
        "state": one.state,
        "healthy": one.healthy,
        "why": one.why,
        "pid": one.pid,
        "up_seconds": int(one.up.total_seconds()),
        "where": one.where,
        "log": str(one.log) if one.log else None,
    }


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _fail(message: str) -> NoReturn:
    errors.print(message, style="red", markup=False, soft_wrap=True)
    raise SystemExit(1)


def _leave(code: int) -> NoReturn:
    """Exit without the interpreter's own shutdown, during which Temporal's client may crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _answering_errors() -> None:
    try:
        app()
    except PortsTaken as error:
        _fail(
            f"{error}\nend it, or give the part another port (docs/settings.md names the "
            "variables), or start this stack with --free-ports, or use the server that runs there "
            "by its address"
        )
    except ServerNotReady as error:
        _fail(f"{error}{_end_of(error.log)}\nwhat runs is left running: correct it, then try again")
    except (
        InvalidStackSettings,
        NotInstalled,
        OtherSettings,
        StillRunning,
        SupervisorFailed,
    ) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{type(error).__name__}: {error}")


def main() -> NoReturn:
    """Run one command; exit with 1 if it failed, with 2 if the command line cannot be parsed."""
    try:
        _answering_errors()
    except SystemExit as ended:
        _leave(ended.code if isinstance(ended.code, int) else 1)
    _leave(0)


if __name__ == "__main__":
    main()
