"""The manifests, applied to a real Kubernetes API server: `make k8s-test` builds and runs it.

Nothing schedules or runs a pod. What the server refuses, and what its Pod Security admission warns
of, fails a test.
"""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from deploy.local.ports import free_ports
from deploy.local.server import script
from tests.k8s.schemas import MODULES, source_files
from tests.support.manifests import OVERLAYS, Manifest, copy_with_secrets, rendered
from tests.support.polling import until
from workers.environment import ROOT

BINARY = ROOT / ".fleet" / "k8s" / "apiserver"
TOKEN = "of-the-test"
NAMESPACE = "swe-ai-fleet"


class Kubectl:
    """kubectl with the test's server."""

    def __init__(self, config: Path) -> None:
        self._config = config

    def run(self, *arguments: str | Path, objects: Any = None) -> subprocess.CompletedProcess[str]:
        command = [str(script("kubectl")), f"--kubeconfig={self._config}", *map(str, arguments)]
        text = yaml.safe_dump_all(objects) if objects is not None else None
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    def __call__(self, *arguments: str | Path, objects: Any = None) -> str:
        """Return what it prints.

        Raises:
            AssertionError: the server refused something, or warns of it.
        """
        ended = self.run(*arguments, objects=objects)
        assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
        return ended.stdout


def service_account_key() -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


@pytest.fixture(scope="module")
async def kubectl(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Kubectl]:
    """Run the API server with the kinds of the operators; yield a client of it."""
    folder = tmp_path_factory.mktemp("api-server")
    etcd, peer, port = free_ports(3)
    (folder / "tokens.csv").write_text(f'{TOKEN},test,test,"system:masters"\n')
    (folder / "key").write_bytes(service_account_key())
    arguments = {
        "secure-port": port,
        "bind-address": "127.0.0.1",
        "cert-dir": folder / "certificates",
        "token-auth-file": folder / "tokens.csv",
        "authorization-mode": "RBAC",
        "service-account-issuer": "https://kubernetes.default.svc",
        "service-account-key-file": folder / "key",
        "service-account-signing-key-file": folder / "key",
        "service-cluster-ip-range": "10.0.0.0/24",
    }
    command = [str(BINARY), str(folder), str(etcd), str(peer)]
    command += [f"--{name}={value}" for name, value in arguments.items()]
    with (folder / "log").open("w") as log:
        server = await asyncio.create_subprocess_exec(
            *command, stdout=log, stderr=log, env={"PATH": os.defpath}
        )
        try:
            await until_ready(server, f"https://127.0.0.1:{port}/readyz", folder / "log")
            config = folder / "kubeconfig"
            config.write_text(
                yaml.safe_dump(
                    {
                        "apiVersion": "v1",
                        "kind": "Config",
                        "current-context": "test",
                        "contexts": [
                            {"name": "test", "context": {"cluster": "test", "user": "test"}}
                        ],
                        "users": [{"name": "test", "user": {"token": TOKEN}}],
                        "clusters": [
                            {
                                "name": "test",
                                "cluster": {
                                    "server": f"https://127.0.0.1:{port}",
                                    "certificate-authority": str(
                                        folder / "certificates/apiserver.crt"
                                    ),
                                },
                            }
                        ],
                    }
                )
            )
            client = Kubectl(config)
            kinds = [
                path for name in MODULES if name != "kubernetes" for path in source_files(name)
            ]
            client("apply", "--server-side", *(f"--filename={path}" for path in kinds))
            await until_established(client)
            for namespace in ("cert-manager", "temporal"):
                client("create", "namespace", namespace)
            yield client
        finally:
            server.terminate()
            await server.wait()


async def until_ready(server: asyncio.subprocess.Process, url: str, log: Path) -> None:
    async def ready() -> bool:
        assert server.returncode is None, f"it ended: see {log}"
        # The server has made its certificate just now.
        async with httpx.AsyncClient(verify=False, trust_env=False) as http:
            try:
                answer = await http.get(url, headers={"Authorization": f"Bearer {TOKEN}"})
            except httpx.TransportError:
                return False
        return answer.status_code == 200

    await until(ready, bool)


async def until_established(client: Kubectl) -> None:
    """Wait until the server serves the kinds; right after they are created it has no conditions."""

    async def established() -> int:
        wait = ("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
        return client.run(*wait).returncode

    await until(established, lambda code: code == 0)


def test_everything_is_accepted_twice(kubectl: Kubectl, tmp_path: Path) -> None:
    folder = copy_with_secrets(tmp_path)
    kubectl("apply", "--server-side", "-k", folder / "temporal", "--force-conflicts")
    for overlay in OVERLAYS:
        apply = ("apply", "--server-side", "--validate=strict", "-k", folder / "overlays" / overlay)
        first = kubectl.run(*apply)
        # The template of worker-agents is the one that is not `restricted`.
        warnings = [line for line in first.stderr.splitlines() if line.startswith("Warning:")]
        assert first.returncode == 0, first.stderr
        assert len(warnings) == (1 if overlay == "production" else 0), first.stderr
        assert all("procMount" in line for line in warnings)
        assert first.stdout.count("serverside-applied") == len(rendered(overlay).objects)
        assert kubectl.run(*apply, "--dry-run=server").returncode == 0
        for job in rendered(overlay).of_kind("Job"):  # its template cannot be changed
            kubectl("delete", "job", job, f"--namespace={NAMESPACE}")


def pod(name: str, template: Manifest, namespace: str) -> Manifest:
    spec = {**template["spec"], "restartPolicy": "Always"}
    # Kubernetes replaces what a StatefulSet claims.
    named = {each["name"] for each in spec.get("volumes", [])}
    for container in spec["containers"]:
        container["volumeMounts"] = [
            m for m in container.get("volumeMounts", []) if m["name"] in named
        ]
    metadata = {
        "name": f"test-{name}",
        "namespace": namespace,
        "labels": template["metadata"]["labels"],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def refused(kubectl: Kubectl, overlay: str) -> dict[str, str]:
    """Return the pods that Pod Security refuses, with the reason."""
    for namespace in (NAMESPACE, f"{NAMESPACE}-nodes"):  # a controller makes it in a cluster
        kubectl.run("create", "serviceaccount", "default", f"--namespace={namespace}")
    found = {}
    for name, template in rendered(overlay).pods():
        namespace = f"{NAMESPACE}-nodes" if name == "seccomp-profile" else NAMESPACE
        ended = kubectl.run(
            "create", "--dry-run=server", "-f", "-", objects=[pod(name, template, namespace)]
        )
        if ended.returncode:
            found[name] = ended.stderr
    return found


def test_pod_security_admits_every_pod(kubectl: Kubectl, tmp_path: Path) -> None:
    folder = copy_with_secrets(tmp_path)
    for overlay in OVERLAYS:
        kubectl.run("apply", "--server-side", "-k", folder / "overlays" / overlay)
        assert refused(kubectl, overlay) == {}


def test_only_the_sandbox_is_more_than_restricted(kubectl: Kubectl, tmp_path: Path) -> None:
    folder = copy_with_secrets(tmp_path)
    kubectl.run("apply", "--server-side", "-k", folder / "overlays" / "production")
    kubectl.run(
        *("label", "--overwrite", "namespace", NAMESPACE),
        "pod-security.kubernetes.io/enforce=restricted",
    )

    found = refused(kubectl, "production")

    assert found.keys() == {"worker-agents", "worker-workspace"}
    assert all("procMount" in reason for reason in found.values())


def test_the_server_refuses_what_it_does_not_know(kubectl: Kubectl) -> None:
    (deployment,) = [
        each
        for each in rendered("dev").objects
        if each["kind"] == "Deployment" and each["metadata"]["name"] == "worker-story"
    ]
    wrong = {**deployment, "spec": {**deployment["spec"], "replica": 2}}

    ended = kubectl.run(
        "apply",
        "--server-side",
        "--dry-run=server",
        "--validate=strict",
        "-f",
        "-",
        objects=[wrong],
    )

    assert ended.returncode != 0
    assert "replica" in ended.stderr
