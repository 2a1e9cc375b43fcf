"""The Kubernetes manifests use settings, ports and paths that exist, and leave time to drain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

pytest.importorskip("yaml")

import yaml

from evolink_mcp.cli.arguments import parse_arguments
from evolink_mcp.cli.process import EXIT_WITHIN_S
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.transports.http import DRAIN_TIMEOUT_S, LEAVE_TIMEOUT_S, LINGER_S
from evolink_mcp.transports.http_guard import HttpGuard

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
OBJECTS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in FOLDER.glob("*.yaml")}
DEPLOYMENT: dict[str, Any] = OBJECTS["deployment"]["spec"]
POD: dict[str, Any] = DEPLOYMENT["template"]["spec"]
(SERVER,) = POD["containers"]
VARIABLES = {entry["name"]: entry["value"] for entry in SERVER["env"]}
CONFIGURED: dict[str, str] = dict(
    literal.split("=", 1) for literal in OBJECTS["kustomization"]["configMapGenerator"][0]["literals"]
)
LABELS = DEPLOYMENT["template"]["metadata"]["labels"]
DRAIN_S = 10


def test_kustomize_includes_every_manifest() -> None:
    assert sorted(OBJECTS["kustomization"]["resources"]) == sorted(
        f"{name}.yaml" for name in OBJECTS if name != "kustomization"
    )


def test_every_variable_is_a_setting_and_every_secret_is_a_file() -> None:
    assert set(CONFIGURED) <= set(TeamSettings.variables())
    assert set(VARIABLES) <= {*TeamSettings.file_variables(), "EVOLINK_MCP_TOKENS_FILE"}
    secrets = {name.removesuffix("_FILE") for name in TeamSettings.file_variables()}
    assert {f"{name}_FILE" for name in secrets} <= set(VARIABLES)
    assert not secrets & {*CONFIGURED, *VARIABLES}
    mounts = {mount["mountPath"]: mount["name"] for mount in SERVER["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    for path in VARIABLES.values():
        assert "secret" in volumes[mounts[str(Path(path).parent)]]  # the folder: a mount of one file is never updated


def test_the_server_starts_with_the_settings_of_the_manifests(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    pytest.importorskip("obstore")
    pytest.importorskip("prometheus_client")
    values = {
        "EVOLINK_API_KEY": "sk-test-key", "EVOLINK_MCP_DATABASE_URL": "postgresql://x@db.example.com/x",
        "EVOLINK_MCP_SECRET": "s" * 32, "EVOLINK_MCP_METRICS_TOKEN": "m" * 32,
    }  # fmt: skip
    environ = dict(CONFIGURED)
    for name, value in values.items():
        (tmp_path / name).write_text(value)
        environ[f"{name}_FILE"] = str(tmp_path / name)
    settings = TeamSettings.from_environment(environ)
    assert settings.metrics_port == port("metrics")
    assert settings.metrics_token is not None
    options = parse_arguments([str(word) for word in SERVER["args"]])
    assert (options.command, options.host, options.port) == ("http", "0.0.0.0", port("http"))
    hosts = [rule["host"] for rule in OBJECTS["ingress"]["spec"]["rules"]]
    assert settings.public_url == f"https://{hosts[0]}"


def port(name: str) -> int:
    return next(entry["containerPort"] for entry in SERVER["ports"] if entry["name"] == name)


@pytest.mark.anyio
async def test_the_server_answers_its_probes() -> None:
    """A server answers to known hostnames only, and a probe would send the address of the pod."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("a probe reached the MCP server")

    async def without_database() -> str:
        return "the database does not answer"

    guard = HttpGuard(app, ["pictures.example.com"], 1_000, not_ready=without_database)
    statuses: dict[str, int] = {}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://10.0.0.7:8000") as http:
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = SERVER[name]["httpGet"]
            assert probe["port"] == "http"
            headers = {header["name"]: header["value"] for header in probe["httpHeaders"]}
            statuses[name] = (await http.get(probe["path"], headers=headers)).status_code
    assert statuses == {"startupProbe": 200, "livenessProbe": 200, "readinessProbe": 503}


def test_a_pod_has_time_to_drain_after_the_ingress_knows_that_it_ends() -> None:
    assert DRAIN_TIMEOUT_S + LINGER_S + LEAVE_TIMEOUT_S + EXIT_WITHIN_S <= DRAIN_S
    program, seconds = SERVER["lifecycle"]["preStop"]["exec"]["command"]
    assert (program, int(seconds) >= 5) == ("sleep", True)
    assert POD["terminationGracePeriodSeconds"] > int(seconds) + DRAIN_S


def test_at_least_one_server_runs_during_an_update() -> None:
    assert DEPLOYMENT["replicas"] >= 2
    assert DEPLOYMENT["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert OBJECTS["disruption"]["spec"]["minAvailable"] >= 1


def test_all_selectors_select_the_pods() -> None:
    assert DEPLOYMENT["selector"]["matchLabels"] == LABELS
    assert OBJECTS["service"]["spec"]["selector"] == LABELS
    assert OBJECTS["disruption"]["spec"]["selector"]["matchLabels"] == LABELS
    assert OBJECTS["network"]["spec"]["podSelector"]["matchLabels"] == LABELS
    assert POD["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"] == LABELS
    backend = OBJECTS["ingress"]["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend["name"] == OBJECTS["service"]["metadata"]["name"]
    assert {entry["targetPort"] for entry in OBJECTS["service"]["spec"]["ports"]} == {"http"}


def test_kubernetes_adds_no_variable_that_looks_like_a_setting() -> None:
    """A service evolink-mcp would become EVOLINK_MCP_PORT, and each start would warn about it."""
    assert POD["enableServiceLinks"] is False


def test_the_pod_has_no_rights_that_it_does_not_need() -> None:
    assert POD["automountServiceAccountToken"] is False
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["runAsUser"] == 10001
    assert "--uid 10001" in (FOLDER.parents[1] / "Dockerfile").read_text("utf-8")
    context = SERVER["securityContext"]
    assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert {"/data", "/tmp"} <= {mount["mountPath"] for mount in SERVER["volumeMounts"]}


def test_only_prometheus_reaches_the_port_without_authentication() -> None:
    for rule in OBJECTS["network"]["spec"]["ingress"]:
        if "metrics" in {entry["port"] for entry in rule["ports"]}:
            assert rule["from"]
