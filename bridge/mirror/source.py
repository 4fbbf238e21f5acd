"""The `ce-source` of the fleet's own events: `/swe-ai-fleet/{cluster id}/{namespace}/{workflow}`.

The cluster id is the id of the Temporal namespace. The server assigns it when the namespace is
created, and keeps it across restarts. So two fleets on one bus differ even if the namespaces of
both are called `default`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

SOURCE_PREFIX = "/swe-ai-fleet/"
OLD_CLUSTER = "temporal"
"""What older releases sent in place of the cluster id."""

RUN_ID_CHARACTERS = 36


@dataclass(frozen=True)
class Source:
    """A fleet's identity on the bus."""

    cluster_id: str
    namespace: str

    def of(self, workflow_id: str) -> str:
        """Return the `ce-source` of the events of that workflow."""
        return f"{SOURCE_PREFIX}{self.cluster_id}/{self.namespace}/{workflow_id}"

    def owns(self, headers: Mapping[str, str]) -> bool:
        """Return whether this fleet sent the message: graph and workflow already have its event."""
        return headers.get("ce-source", "").startswith(self.of(""))

    def may_own(self, headers: Mapping[str, str]) -> bool:
        """Return whether an older release of a fleet with this namespace name sent the message."""
        old = Source(OLD_CLUSTER, self.namespace)
        return self.cluster_id != OLD_CLUSTER and old.owns(headers)


async def read_source(client: Client) -> Source:
    """Read this fleet's identity from Temporal.

    Raises:
        RPCError: Temporal does not answer.
    """
    request = DescribeNamespaceRequest(namespace=client.namespace)
    answer = await client.workflow_service.describe_namespace(request)
    return Source(answer.namespace_info.id, client.namespace)


async def has_sent(client: Client, headers: Mapping[str, str]) -> bool:
    """Return whether Temporal knows the run that the message's `ce-id` names; run ids are unique.

    Raises:
        RPCError: Temporal does not answer.
    """
    workflow_id, _, rest = headers.get("ce-id", "").rpartition("/")[0].rpartition("/")
    handle = client.get_workflow_handle(workflow_id, run_id=rest[:RUN_ID_CHARACTERS])
    try:
        await handle.describe()
    except RPCError as error:
        if error.status in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
            return False
        raise
    return True
