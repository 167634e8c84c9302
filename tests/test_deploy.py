"""The files in `deploy/` are valid for clusters, and agree with the service."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml  # type: ignore[import-untyped] # PyYAML ships no types
from jsonschema import Draft202012Validator

from service.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = ("1.34", "1.35", "1.36", "1.37")
OVERLAYS = ("base", "overlays/local", "overlays/gpu")
KNOWN_VARIABLES = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}

# KServe's own definitions are not ours to commit: KSERVE_CRDS names a folder that holds
# servingruntimes.yaml and inferenceservices.yaml from config/crd/full of github.com/kserve/kserve.
KSERVE_CRDS = os.environ.get("KSERVE_CRDS")


def documents(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every manifest of a folder, without kustomize's own files."""
    for file in sorted(folder.glob("*.yaml")):
        if file.name != "kustomization.yaml":
            yield from yaml.safe_load_all(file.read_text())


def built(overlay: str) -> dict[str, dict[str, Any]]:
    """Return an overlay's manifests by kind, as kustomize builds them."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / overlay)],  # noqa: S607 - whichever there is
        capture_output=True,
        text=True,
        check=False,
    )
    if "unknown field" in done.stderr:
        pytest.skip("this kubectl is too old for kustomize's inline patches")
    assert done.returncode == 0, done.stderr
    return {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}


def container_of(deployment: dict[str, Any]) -> dict[str, Any]:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(container)


class TestKubernetes:
    @pytest.mark.parametrize("version", KUBERNETES)
    def test_every_manifest_of_the_base_is_valid(self, version: str) -> None:
        kinds = []
        for document in documents(DEPLOY / "kubernetes" / "base"):
            kubernetes_validate.validate(document, version, strict=True)
            kinds.append(document["kind"])
        assert sorted(kinds) == [
            "Deployment",
            "HorizontalPodAutoscaler",
            "NetworkPolicy",
            "PodDisruptionBudget",
            "Service",
        ]

    def test_every_resource_has_the_name_of_the_service(self) -> None:
        """As in the commands of docs/operations.md, and in compose."""
        folders = ("kubernetes/base", "kubernetes/components/service-monitor", "kserve")
        names = [d["metadata"]["name"] for folder in folders for d in documents(DEPLOY / folder)]
        for overlay in ("local", "gpu"):
            path = DEPLOY / "kubernetes" / "overlays" / overlay / "kustomization.yaml"
            patches = yaml.safe_load(path.read_text())["patches"]
            names += [yaml.safe_load(each["patch"])["metadata"]["name"] for each in patches]
        for path in (ROOT / "compose.yaml", ROOT / "compose.gpu.yaml"):
            names += yaml.safe_load(path.read_text())["services"]
        assert len(names) == 13
        assert set(names) == {"bn-lenet"}

    def test_the_pod_has_these_rights_limits_and_probes(self) -> None:
        by_kind = {d["kind"]: d for d in documents(DEPLOY / "kubernetes" / "base")}
        pod = by_kind["Deployment"]["spec"]["template"]["spec"]
        container = container_of(by_kind["Deployment"])
        assert pod.keys() == {  # and none of the node's own, such as hostNetwork
            *("automountServiceAccountToken", "enableServiceLinks", "securityContext", "volumes"),
            *("terminationGracePeriodSeconds", "topologySpreadConstraints", "containers"),
        }
        assert container.keys() == {  # and the image's own command
            *("name", "image", "imagePullPolicy", "ports", "env", "resources", "securityContext"),
            *("startupProbe", "livenessProbe", "readinessProbe", "volumeMounts"),
        }
        assert by_kind["Service"]["spec"].keys() == {"selector", "ports"}  # within the cluster
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["terminationGracePeriodSeconds"] == 30
        assert pod["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert (container["image"], container["imagePullPolicy"]) == ("bn-lenet", "IfNotPresent")
        assert container["ports"] == [{"name": "http", "containerPort": 8000}]
        assert container["resources"] == {
            "requests": {"cpu": "1", "memory": "192Mi"},
            "limits": {"memory": "512Mi"},
        }
        assert container["startupProbe"] == {
            "httpGet": {"path": "/readyz", "port": "http"},
            "periodSeconds": 1,
            "failureThreshold": 30,
        }
        assert container["livenessProbe"] == {
            "httpGet": {"path": "/livez", "port": "http"},
            "periodSeconds": 10,
            "timeoutSeconds": 3,
        }
        assert container["readinessProbe"] == {
            "httpGet": {"path": "/readyz", "port": "http"},
            "periodSeconds": 2,
            "timeoutSeconds": 2,
            "failureThreshold": 1,
        }
        (volume,) = pod["volumes"]
        assert volume == {"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}}
        assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108 - the mount's own name
        strategy = by_kind["Deployment"]["spec"]["strategy"]["rollingUpdate"]
        assert strategy == {"maxUnavailable": 0, "maxSurge": 1}
        assert by_kind["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
        scaler = by_kind["HorizontalPodAutoscaler"]["spec"]
        assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 10)
        (port,) = by_kind["Service"]["spec"]["ports"]
        assert port == {"name": "http", "port": 80, "targetPort": "http"}

    def test_the_pod_gets_the_key_from_a_secret_and_is_scraped(self) -> None:
        by_kind = {d["kind"]: d for d in documents(DEPLOY / "kubernetes" / "base")}
        template = by_kind["Deployment"]["spec"]["template"]
        assert template["metadata"]["annotations"] == {
            "prometheus.io/scrape": "true",
            "prometheus.io/port": "8000",
            "prometheus.io/path": "/metrics",
        }
        secret = {"name": "bn-lenet", "key": "api-key", "optional": True}
        assert container_of(by_kind["Deployment"])["env"] == [
            {"name": "BNLENET_API_KEY", "valueFrom": {"secretKeyRef": secret}}
        ]

    def test_every_resource_selects_the_deployments_pods(self) -> None:
        by_kind = {d["kind"]: d for d in documents(DEPLOY / "kubernetes" / "base")}
        deployment = by_kind["Deployment"]["spec"]
        labels = {"app.kubernetes.io/name": "bn-lenet"}
        assert deployment["template"]["metadata"]["labels"] == labels
        assert deployment["selector"] == {"matchLabels": labels}
        assert by_kind["Service"]["spec"]["selector"] == labels
        assert by_kind["PodDisruptionBudget"]["spec"]["selector"] == {"matchLabels": labels}
        assert deployment["template"]["spec"]["topologySpreadConstraints"] == [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": labels},
            }
        ]
        assert "replicas" not in deployment  # the autoscaler's
        scaler = by_kind["HorizontalPodAutoscaler"]["spec"]
        target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "bn-lenet"}
        assert scaler["scaleTargetRef"] == target
        utilization = {"type": "Utilization", "averageUtilization": 60}
        cpu = {"type": "Resource", "resource": {"name": "cpu", "target": utilization}}
        assert scaler["metrics"] == [cpu]

    def test_the_overlays_change_these_values(self) -> None:
        """Read as written: on many machines kustomize is not installed."""
        base, local, gpu = (
            yaml.safe_load((DEPLOY / "kubernetes" / overlay / "kustomization.yaml").read_text())
            for overlay in OVERLAYS
        )
        files = {path.name for path in (DEPLOY / "kubernetes" / "base").glob("*.yaml")}
        assert {*base["resources"], "kustomization.yaml"} == files
        assert base["images"] == [{"name": "bn-lenet", "newTag": "latest"}]
        assert (local["resources"], gpu["resources"]) == (["../../base"], ["../../base"])
        deployment, scaler = (yaml.safe_load(each["patch"]) for each in local["patches"])
        assert container_of(deployment) == {
            "name": "bn-lenet",
            "imagePullPolicy": "Never",
            "resources": {"requests": {"cpu": "100m"}},
        }
        assert scaler["spec"] == {"minReplicas": 1, "maxReplicas": 1}
        (deployment,) = (yaml.safe_load(each["patch"]) for each in gpu["patches"])
        assert gpu["images"] == [{"name": "bn-lenet", "newTag": "gpu"}]
        assert container_of(deployment) == {
            "name": "bn-lenet",
            "env": [{"name": "BNLENET_DEVICE", "value": "cuda"}],
            "resources": {
                "requests": {"memory": "2Gi"},
                "limits": {"memory": "4Gi", "nvidia.com/gpu": "1"},
            },
        }

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_every_overlay_builds_to_valid_manifests(self, overlay: str) -> None:
        manifests = built(overlay)
        for document in manifests.values():
            for version in (KUBERNETES[0], KUBERNETES[-1]):
                kubernetes_validate.validate(document, version, strict=True)
        assert manifests.keys() >= {"Deployment", "Service", "NetworkPolicy"}

    def test_a_misspelt_field_is_not_valid(self) -> None:
        """The validator detects a misspelt field."""
        (service,) = (
            d for d in documents(DEPLOY / "kubernetes" / "base") if d["kind"] == "Service"
        )
        service["spec"]["selectors"] = service["spec"].pop("selector")
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(service, KUBERNETES[0], strict=True)

    def test_the_local_overlay_uses_the_image_that_was_loaded(self) -> None:
        manifests = built("overlays/local")
        container = container_of(manifests["Deployment"])
        assert container["image"] == "bn-lenet:latest"
        assert container["imagePullPolicy"] == "Never"
        assert manifests["HorizontalPodAutoscaler"]["spec"]["maxReplicas"] == 1

    def test_the_gpu_overlay_asks_for_one_gpu_and_insists_on_it(self) -> None:
        container = container_of(built("overlays/gpu")["Deployment"])
        assert container["image"] == "bn-lenet:gpu"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        variables = {each["name"]: each.get("value") for each in container["env"]}
        assert variables.items() >= {"BNLENET_DEVICE": "cuda"}.items()
        assert "BNLENET_API_KEY" in variables

    def test_only_the_service_port_is_open_and_no_pod_calls_out(self) -> None:
        by_kind = {d["kind"]: d for d in documents(DEPLOY / "kubernetes" / "base")}
        policy = by_kind["NetworkPolicy"]["spec"]
        template = by_kind["Deployment"]["spec"]["template"]
        assert policy["podSelector"]["matchLabels"] == template["metadata"]["labels"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert policy["ingress"] == [{"ports": [{"port": "http"}]}]
        assert policy["egress"] == []
        assert {"name": "http", "containerPort": 8000} in container_of(by_kind["Deployment"])[
            "ports"
        ]

    def test_the_service_monitor_watches_the_service_under_the_alerts_job(self) -> None:
        (monitor,) = documents(DEPLOY / "kubernetes" / "components" / "service-monitor")
        by_kind = {d["kind"]: d for d in documents(DEPLOY / "kubernetes" / "base")}
        service = by_kind["Service"]
        labels = service["metadata"]["labels"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        assert endpoint == {"port": "http", "path": "/metrics", "interval": "15s"}
        folder = DEPLOY / "kubernetes" / "components" / "service-monitor"
        component = yaml.safe_load((folder / "kustomization.yaml").read_text())
        assert (component["kind"], component["resources"]) == (
            "Component",
            ["service-monitor.yaml"],
        )
        job = labels[monitor["spec"]["jobLabel"]]
        assert f'job="{job}"' in (DEPLOY / "prometheus" / "alerts.yaml").read_text()


class TestKServe:
    @pytest.fixture
    def manifests(self) -> dict[str, dict[str, Any]]:
        return {document["kind"]: document for document in documents(DEPLOY / "kserve")}

    @pytest.mark.parametrize("kind", ["ServingRuntime", "InferenceService"])
    def test_it_is_valid_by_kserves_own_definition(
        self, manifests: dict[str, dict[str, Any]], kind: str
    ) -> None:
        if KSERVE_CRDS is None:
            pytest.skip("KSERVE_CRDS does not name a folder with KServe's definitions")
        text = Path(KSERVE_CRDS, f"{kind.lower()}s.yaml").read_text()
        definition = yaml.load(text, Loader=yaml.CSafeLoader)
        manifest = manifests[kind]
        version = manifest["apiVersion"].partition("/")[2]
        (schema,) = (
            entry["schema"]["openAPIV3Schema"]
            for entry in definition["spec"]["versions"]
            if entry["name"] == version
        )
        validator = Draft202012Validator(strict(schema))
        assert [error.message for error in validator.iter_errors(manifest)] == []
        manifest = {**manifest, "spec": {**manifest["spec"], "containrs": []}}
        assert not validator.is_valid(manifest)

    def test_the_runtime_runs_as_the_protocol_and_the_deployment_do(
        self, manifests: dict[str, dict[str, Any]]
    ) -> None:
        spec = manifests["ServingRuntime"]["spec"]
        (container,) = spec["containers"]
        by_kind = {d["kind"]: d for d in documents(DEPLOY / "kubernetes" / "base")}
        pod = by_kind["Deployment"]["spec"]["template"]["spec"]
        ours = container_of(by_kind["Deployment"])
        assert container["name"] == "kserve-container"  # the name KServe looks for
        assert spec["protocolVersions"] == ["v2"]
        assert container["image"] == "bn-lenet:latest"
        assert container["ports"] == [{"name": "http1", "containerPort": 8080, "protocol": "TCP"}]
        variables = {each["name"]: each["value"] for each in container["env"]}
        assert variables == {
            "BNLENET_PORT": "8080",
            "BNLENET_MODEL_PATH": "/mnt/models",
            "BNLENET_MODEL_NAME": "{{.Name}}",
        }
        assert spec["annotations"] == {
            "prometheus.kserve.io/port": "8080",
            "prometheus.kserve.io/path": "/metrics",
        }
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] == 8080
            assert {
                **container[probe],
                "httpGet": {**container[probe]["httpGet"], "port": "http"},
            } == ours[probe]
        assert container["resources"] == ours["resources"]
        assert container["securityContext"] == {**pod["securityContext"], **ours["securityContext"]}
        assert (container["volumeMounts"], spec["volumes"]) == (
            ours["volumeMounts"],
            pod["volumes"],
        )

    def test_the_inference_service_uses_the_runtime(
        self, manifests: dict[str, dict[str, Any]]
    ) -> None:
        runtime = manifests["ServingRuntime"]
        predictor = manifests["InferenceService"]["spec"]["predictor"]
        assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
        served = {"name": "bn-lenet", "version": "1"}
        assert runtime["spec"]["supportedModelFormats"] == [{**served, "autoSelect": True}]
        assert predictor["model"]["modelFormat"] == served
        assert predictor["model"]["protocolVersion"] == "v2"
        assert (predictor["minReplicas"], predictor["maxReplicas"]) == (1, 10)
        settings = Settings.model_construct()
        needed = settings.drain_seconds + settings.request_timeout_seconds
        assert predictor["terminationGracePeriodSeconds"] > needed


def strict(schema: Any) -> Any:
    """Return a schema that refuses unknown fields, as the API server does."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(value) for name, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault(
            "additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        )
        if "metadata" in closed["properties"] and "apiVersion" in closed["properties"]:
            closed["properties"]["metadata"] = {
                "type": "object"
            }  # Kubernetes' own, checked elsewhere
    return closed


class TestScaling:
    def test_the_balancer_checks_readiness_within_the_drain_time(self) -> None:
        lines = [line.split() for line in (DEPLOY / "haproxy.cfg").read_text().splitlines()]
        (check,) = (line for line in lines if line[:2] == ["http-check", "send"])
        assert check[check.index("uri") + 1] == "/readyz"
        (defaults,) = (line for line in lines if line[:1] == ["default-server"])
        seconds = int(defaults[defaults.index("inter") + 1].removesuffix("ms")) / 1000
        falls = int(defaults[defaults.index("fall") + 1])
        assert 2 * falls * seconds < Settings.model_construct().drain_seconds

    def test_the_balancer_waits_longer_than_the_service_and_sends_no_more_than_its_limit(
        self,
    ) -> None:
        lines = [line.split() for line in (DEPLOY / "haproxy.cfg").read_text().splitlines()]
        timeouts = {line[1]: line[2] for line in lines if line[:1] == ["timeout"]}
        settings = Settings.model_construct()
        assert int(timeouts["server"].removesuffix("s")) > settings.request_timeout_seconds
        (defaults,) = (line for line in lines if line[:1] == ["default-server"])
        assert int(defaults[defaults.index("maxconn") + 1]) <= settings.max_in_flight

    def test_the_balancer_does_this(self) -> None:
        """By its lines: on many machines HAProxy is not installed."""
        text = (DEPLOY / "haproxy.cfg").read_text()
        lines = [line.strip() for line in text.splitlines()]
        sections = {"global", "resolvers docker", "defaults", "frontend http", "backend containers"}
        expected = sections | {
            "mode http",
            "timeout connect 1s",
            "maxconn 4000",
            "log stdout format raw local0 notice",
            "log global",
            "timeout resolve 500ms",
            "timeout client 75s",
            "timeout server 15s",
            "timeout check 2s",
            "timeout http-request 10s",
            "retries 3",
            "retry-on conn-failure",  # of requests that no container has got
            "option redispatch 1",
            "bind :8000",
            "default_backend containers",
            "balance leastconn",
            "option httpchk",
            "http-check send meth GET uri /readyz hdr Host bn-lenet",
            "http-check expect status 200",
            "default-server check inter 500ms fall 1 rise 1 maxconn 512",
            "server-template container 16 bn-lenet:8000 resolvers docker init-addr none",
            "nameserver dns 127.0.0.11:53",
            "accepted_payload_size 8192",
            *(f"hold {kind} 500ms" for kind in ("valid", "nx", "obsolete")),
        }
        assert sorted(line for line in lines if line[0] != "#") == sorted(expected)

    def test_haproxy_accepts_the_configuration(self) -> None:
        if shutil.which("haproxy") is None:
            pytest.skip("haproxy is not installed: apt-get install haproxy")
        done = subprocess.run(
            ["haproxy", "-c", "-f", str(DEPLOY / "haproxy.cfg")],  # noqa: S607 - whichever there is
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "WARNING" not in done.stderr

    def test_the_balancer_has_the_same_restrictions_as_the_service(self) -> None:
        (balancer,) = yaml.safe_load((DEPLOY / "compose.scale.yaml").read_text())[
            "services"
        ].values()
        service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["bn-lenet"]
        config = "/usr/local/etc/haproxy/haproxy.cfg"
        assert balancer == {
            **{key: service[key] for key in ("read_only", "cap_drop", "security_opt", "restart")},
            "image": "${HAPROXY_IMAGE:-haproxy:3.0}",
            "command": ["haproxy", "-f", config],
            "ports": ["127.0.0.1:${BALANCER_PORT:-8000}:8000"],
            "volumes": [f"./deploy/haproxy.cfg:{config}:ro"],
            "mem_limit": "256m",
            "pids_limit": 64,
        }


class TestDashboard:
    @pytest.fixture
    def dashboard(self) -> dict[str, Any]:
        return dict(json.loads((DEPLOY / "prometheus" / "dashboard.json").read_text()))

    def test_each_panel_shows_this(self, dashboard: dict[str, Any]) -> None:
        def rate(metric: str) -> str:
            return f"rate({metric}[$__rate_interval])"

        def quantiles(metric: str, chosen: str = "") -> list[str]:
            rates = rate(f'{metric}_bucket{{job="$job"{chosen}}}')
            return [f"histogram_quantile({q}, sum by (le) ({rates}))" for q in (0.5, 0.99)]

        requests = 'http_requests_total{job="$job"}'
        answers = requests.replace("}", ', route!~"/livez|/readyz|/metrics"}')
        predictions = ', route=~"/predict|/v2/models/.+/infer"'
        refused = rate('bnlenet_rejected_total{job="$job"}')
        panels = {
            panel["title"]: [target["expr"] for target in panel["targets"]]
            for panel in dashboard["panels"]
        }
        assert panels == {
            "Requests by status": [f"sum by (status) ({rate(answers)})"],
            "Requests by route": [f"sum by (route) ({rate(requests)})"],
            "Time to answer a prediction": quantiles("http_request_duration_seconds", predictions),
            "Time in the model": quantiles("bnlenet_inference_duration_seconds"),
            "Time to decode": quantiles("bnlenet_decode_duration_seconds"),
            "In flight": ['sum by (instance) (http_requests_in_flight{job="$job"})'],
            "Refused by reason": [f"sum by (reason) ({refused})"],
            "Resident memory": ['process_resident_memory_bytes{job="$job"}'],
            "Models served": [
                'count by (name, version, revision, provider) (bnlenet_model_info{job="$job"})'
            ],
        }

    def test_each_panel_has_the_unit_of_its_figures(self, dashboard: dict[str, Any]) -> None:
        for panel in dashboard["panels"][:-1]:
            expression = panel["targets"][0]["expr"]
            unit = panel["fieldConfig"]["defaults"]["unit"]
            if expression.startswith("histogram_quantile"):
                assert unit == "s"
            elif "rate(" in expression:
                assert unit == "reqps"
            else:
                assert unit == ("bytes" if "_bytes" in expression else "short")

    def test_each_line_has_the_name_of_what_it_shows(self, dashboard: dict[str, Any]) -> None:
        for panel in dashboard["panels"][:-1]:
            names = [target["legendFormat"] for target in panel["targets"]]
            expression = panel["targets"][0]["expr"]
            (by,) = re.findall(r"by \((\w+)\)", expression) or ["instance"]
            assert names == (["p50", "p99"] if by == "le" else [f"{{{{{by}}}}}"])
        for panel in dashboard["panels"]:
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}

    def test_the_job_is_chosen_among_those_that_are_scraped(
        self, dashboard: dict[str, Any]
    ) -> None:
        (job,) = (v for v in dashboard["templating"]["list"] if v["name"] == "job")
        assert job["query"] == "label_values(bnlenet_model_info, job)"


class TestPrometheus:
    """By explicit values: on many machines promtool is not installed."""

    @pytest.fixture
    def rules(self) -> dict[str, dict[str, Any]]:
        (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
        return {rule.get("alert") or rule["record"]: rule for rule in group["rules"]}

    def test_the_alerts_wait_so_long_and_are_so_severe(
        self, rules: dict[str, dict[str, Any]]
    ) -> None:
        alerts = {name: rule for name, rule in rules.items() if "alert" in rule}
        assert {n: (r["for"], r["labels"]["severity"]) for n, r in alerts.items()} == {
            "BnLenetDown": ("1m", "critical"),
            "BnLenetFailing": ("2m", "critical"),
            "BnLenetOverloaded": ("2m", "warning"),
            "BnLenetSlow": ("10m", "warning"),
            "BnLenetModelsDiffer": ("30m", "warning"),
            "BnLenetMemoryGrows": ("15m", "warning"),
        }
        for rule in alerts.values():
            assert rule["annotations"].keys() == {"summary", "description"}

    @pytest.mark.parametrize(
        ("name", "expression"),
        [
            (
                "bnlenet:predictions:rate5m",
                (
                    'sum(rate(http_requests_total{job="bn-lenet",'
                    ' route!~"/livez|/readyz|/metrics"}[5m]))'
                ),
            ),
            ("BnLenetDown", 'up{job="bn-lenet"} == 0 or absent(up{job="bn-lenet"})'),
            (
                "BnLenetFailing",
                (
                    'sum(rate(http_requests_total{job="bn-lenet", status=~"5..",'
                    ' status!="503"}[5m])) > 0.001 * bnlenet:predictions:rate5m'
                ),
            ),
            (
                "BnLenetOverloaded",
                (
                    'sum(rate(bnlenet_rejected_total{job="bn-lenet", reason="overloaded"}[5m]))'
                    " > 0.01 * bnlenet:predictions:rate5m"
                ),
            ),
            (
                "BnLenetSlow",
                (
                    "histogram_quantile(0.99, sum by (le) ("
                    'rate(http_request_duration_seconds_bucket{job="bn-lenet",'
                    ' route=~"/predict|/v2/models/.+/infer"}[5m])) ) > 0.1'
                ),
            ),
            (
                "BnLenetModelsDiffer",
                'count(count by (revision, provider) (bnlenet_model_info{job="bn-lenet"})) > 1',
            ),
            ("BnLenetMemoryGrows", 'process_resident_memory_bytes{job="bn-lenet"} > 400e6'),
        ],
    )
    def test_a_rule_has_this_expression(
        self, rules: dict[str, dict[str, Any]], name: str, expression: str
    ) -> None:
        assert " ".join(rules[name]["expr"].split()) == expression

    def test_the_rules_watch_the_job_that_is_scraped(self) -> None:
        scrape = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
        assert scrape == {
            "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
            "rule_files": ["alerts.yaml"],
            "scrape_configs": [
                {"job_name": "bn-lenet", "static_configs": [{"targets": ["127.0.0.1:8000"]}]}
            ],
        }


def test_every_variable_in_deploy_is_a_setting() -> None:
    text = "".join(file.read_text() for file in DEPLOY.rglob("*.yaml"))
    named = set(re.findall(rf"{PREFIX}[A-Z_]+", text))
    assert named
    assert named <= KNOWN_VARIABLES
