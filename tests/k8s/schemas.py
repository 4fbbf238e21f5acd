"""The schemas of the manifests' kinds: `python -m tests.k8s.schemas` makes them from Go modules.

Kubernetes publishes its API as OpenAPI, and an operator its resources as CustomResourceDefinitions.
Only the kinds that deploy/k8s uses are kept, without descriptions, and a field that a schema does
not name is an error. It needs `go`; the tests need only the files.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "schemas"
KUBERNETES = "v1.37.2"
MODULES = {
    "kubernetes": ("k8s.io/kubernetes", KUBERNETES, ["api/openapi-spec/swagger.json"]),
    "kuberay": (
        "github.com/ray-project/kuberay/ray-operator",
        "v1.5.0",
        ["config/crd/bases/ray.io_rayservices.yaml"],
    ),
    "keda": (
        "github.com/kedacore/keda/v2",
        "v2.21.0",
        [
            "config/crd/bases/keda.sh_scaledobjects.yaml",
            "config/crd/bases/keda.sh_triggerauthentications.yaml",
        ],
    ),
    "cert-manager": (
        "github.com/cert-manager/cert-manager",
        "v1.21.2",
        [
            "deploy/crds/cert-manager.io_certificates.yaml",
            "deploy/crds/cert-manager.io_clusterissuers.yaml",
        ],
    ),
    "prometheus-operator": (
        "github.com/prometheus-operator/prometheus-operator",
        "v0.85.0",
        [
            f"example/prometheus-operator-crd/monitoring.coreos.com_{kind}.yaml"
            for kind in ("podmonitors", "prometheusrules")
        ],
    ),
}
"""The Go module of each source, its version, and its files."""

KINDS = {
    "v1": [
        *("ConfigMap", "Namespace", "PersistentVolumeClaim", "Secret", "Service"),
        "ServiceAccount",
    ],
    "apps/v1": ["DaemonSet", "Deployment", "StatefulSet"],
    "autoscaling/v2": ["HorizontalPodAutoscaler"],
    "batch/v1": ["Job"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
    "policy/v1": ["PodDisruptionBudget"],
}
"""The kinds of Kubernetes itself."""

INT_OR_STRING = {"type": ["integer", "string"]}
QUANTITY = {"type": ["number", "string"]}


def source_files(name: str) -> list[Path]:
    """Return the files of a source from Go's module cache, downloaded if needed."""
    module, version, files = MODULES[name]
    with tempfile.TemporaryDirectory() as empty:
        output = subprocess.run(
            ["go", "mod", "download", "-json", f"{module}@{version}"],
            check=True,
            capture_output=True,
            text=True,
            cwd=empty,
        ).stdout
    folder = Path(json.loads(output)["Dir"])
    return [folder / file for file in files]


def strict(schema: Any) -> Any:
    """Return a JSON schema for validation: no descriptions, no fields beyond those it names."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string") or schema.get("format") == "int-or-string":
        return INT_OR_STRING
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("description", "example", "default", "format") or key.startswith("x-kubernetes"):
            continue
        # The names of properties are not keywords, whatever they are.
        made[key] = (
            {name: strict(each) for name, each in value.items()}
            if key in ("properties", "definitions", "patternProperties")
            else strict(value)
        )
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or (
        schema.get("x-kubernetes-embedded-resource")
    )
    if made.get("properties") and "additionalProperties" not in made and not open_ended:
        made["additionalProperties"] = False
    return made


def kubernetes(swagger: Path) -> dict[str, Any]:
    """Return the definitions that KINDS need, and the definition of each kind."""
    definitions = json.loads(swagger.read_text())["definitions"]
    of_kind = {}
    for name, definition in definitions.items():
        for kind in definition.get("x-kubernetes-group-version-kind", []):
            version = "/".join(filter(None, (kind["group"], kind["version"])))
            if kind["kind"] in KINDS.get(version, ()):
                of_kind[f"{version}/{kind['kind']}"] = name
    needed: dict[str, Any] = {}
    waiting = [*of_kind.values()]
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed[name] = strict(definitions[name])
        if name.endswith(".Quantity"):
            needed[name] = QUANTITY
        waiting += re.findall(r'"#/definitions/([^"]+)"', json.dumps(needed[name]))
    kinds = {kind: {"$ref": f"#/definitions/{name}"} for kind, name in sorted(of_kind.items())}
    return {"definitions": needed, "kinds": kinds}


def resources(definitions: list[Path]) -> dict[str, Any]:
    """Return the schema of each kind that CustomResourceDefinitions define."""
    kinds = {}
    for path in definitions:
        for definition in yaml.safe_load_all(path.read_text()):
            spec = definition["spec"]
            for version in spec["versions"]:
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                name = f"{spec['group']}/{version['name']}/{spec['names']['kind']}"
                kinds[name] = schema
    return {"definitions": {}, "kinds": kinds}


def make() -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Return the files with their contents."""
    for name, (module, version, _) in MODULES.items():
        files = source_files(name)
        made = kubernetes(files[0]) if name == "kubernetes" else resources(files)
        yield FOLDER / f"{name}.json", {"from": f"{module}@{version}", **made}


def main() -> int:
    """Write the files."""
    for path, content in make():
        path.write_text(json.dumps(content, separators=(",", ":"), sort_keys=True) + "\n")
        print(path.relative_to(HERE.parents[1]), path.stat().st_size // 1024, "KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
