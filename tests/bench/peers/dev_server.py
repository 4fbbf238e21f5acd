"""Temporal's development server as it comes, without the settings of the local stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client

from deploy.local.server import LOOPBACK, Command, Server, script


@dataclass(frozen=True)
class DevServer(Server):
    """`temporal server start-dev` with its state in a file, as the fleet's is, and no Web UI."""

    name: ClassVar[str] = "dev server"
    home: Path
    port: int

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def ports(self) -> Mapping[str, int]:
        return {"gRPC": self.port}

    def prepare(self) -> Command:
        self.home.mkdir(parents=True, exist_ok=True)
        return Command(
            (
                *(str(script("temporal")), "server", "start-dev", "--headless"),
                *("--port", str(self.port)),
                *("--db-filename", str(self.home / "temporal.sqlite")),
            ),
            {"TEMPORAL_VERSION_CHECK_DISABLED": "1"},
        )

    async def check(self) -> None:
        client = await Client.connect(self.address)
        await client.workflow_service.describe_namespace(
            DescribeNamespaceRequest(namespace=client.namespace)
        )
