"""The manifests of deploy/k8s, rendered by kubectl as an operator would apply them."""

import base64
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from deploy.local.server import script
from workers.environment import ROOT

K8S = ROOT / "deploy" / "k8s"
OVERLAYS = ("dev", "production")
SECRETS: Mapping[str, Mapping[str, str]] = {
    "neo4j": {"NEO4J_USER": "neo4j", "NEO4J_PASSWORD": "graph-password"},
    "nats": {
        "NATS_USER": "fleet",
        # NATS would read it as a number.
        "NATS_PASSWORD": "1e5",
        "NATS_AGENT_PASSWORD": "007",
        "NATS_SUBSCRIBER_PASSWORD": "true",
        "NATS_PUBLISHER_PASSWORD": "plain",
    },
    "valkey": {"REDIS_PASSWORD": "two words"},
    "fleet": {"GRPC_TOKEN_KEY": "k" * 32, "PAYLOAD_KEYS": f"{'a1' * 32},{'b2' * 32}"},
}
"""What an operator writes to `secrets/NAME.env`, with values that are easily misread."""

Manifest = dict[str, Any]


def copy_with_secrets(folder: Path) -> Path:
    """Copy deploy/k8s to a folder, with the secrets that an operator adds."""
    copied = folder / "k8s"
    ignore = shutil.ignore_patterns("*.env", "__pycache__")
    shutil.copytree(K8S, copied, ignore=ignore)
    for overlay in OVERLAYS:
        for name, variables in SECRETS.items():
            lines = "".join(f"{variable}={value}\n" for variable, value in variables.items())
            (copied / "overlays" / overlay / "secrets" / f"{name}.env").write_text(lines)
    return copied


def kustomize(folder: Path) -> str:
    """Return what `kubectl kustomize` prints for a folder."""
    command = [str(script("kubectl")), "kustomize", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@dataclass(frozen=True)
class Manifests:
    """The rendered objects of one overlay."""

    text: str
    objects: tuple[Manifest, ...]

    def of_kind(self, *kinds: str) -> dict[str, Manifest]:
        """Return the objects of these kinds, by name."""
        return {each["metadata"]["name"]: each for each in self.objects if each["kind"] in kinds}

    def pods(self) -> Iterator[tuple[str, Manifest]]:
        """Yield each pod template with its owner's name; Ray's are `ray-head` and `ray-engines`."""
        for name, owner in self.of_kind("DaemonSet", "Deployment", "Job", "StatefulSet").items():
            yield name, owner["spec"]["template"]
        for service in self.of_kind("RayService").values():
            cluster = service["spec"]["rayClusterConfig"]
            yield "ray-head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield f"ray-{group['groupName']}", group["template"]

    def fleet_pods(self) -> dict[str, Manifest]:
        """Return the pods of the fleet's own image, by name."""
        return {name: pod for name, pod in self.pods() if pod["metadata"]["labels"].get("image")}

    def environment(self, pod: Manifest) -> dict[str, str]:
        """Return the variables of a pod's first container.

        Raises:
            KeyError: a ConfigMap, a Secret or a key does not exist, and is not optional.
        """
        container = pod["spec"]["containers"][0]
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            kind, reference = next((k, v) for k, v in source.items() if k.endswith("Ref"))
            found |= self._values(kind, reference["name"])
        for variable in container.get("env", []):
            if "value" in variable:
                found[variable["name"]] = variable["value"]
                continue
            kind, reference = next(iter(variable["valueFrom"].items()))
            if kind == "fieldRef":
                continue
            if reference.get("optional"):
                continue
            values = self._values(kind, reference["name"])
            found[variable["name"]] = values[reference["key"]]
        return found

    def _values(self, kind: str, name: str) -> dict[str, str]:
        if kind.startswith("configMap"):
            return dict(self.of_kind("ConfigMap")[name]["data"])
        data = self.of_kind("Secret")[name]["data"]
        return {key: base64.b64decode(value).decode() for key, value in data.items()}


@cache
def rendered(overlay: str) -> Manifests:
    """Return an overlay as kubectl renders it."""
    with TemporaryDirectory() as folder:
        text = kustomize(copy_with_secrets(Path(folder)) / "overlays" / overlay)
    return Manifests(text, tuple(yaml.safe_load_all(text)))
