"""The alert rules do what they say, and a real Prometheus gets from the service what they need."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.contract.conftest import ROOT, serving
from tests.contract.neighbours import answers, executable, free_port, running, wait_until

FOLDER = ROOT / "deploy" / "prometheus"
PREDICTIONS = 7


@pytest.mark.parametrize(
    "check",
    [
        ("check", "config", "prometheus.yaml"),
        ("check", "rules", "alerts.yaml"),
        ("test", "rules", "alerts_test.yaml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts(check: tuple[str, ...]) -> None:
    """`test rules` shows each alert a history in which it must fire, and a healthy one."""
    run = subprocess.run(
        [executable("prometheus", "promtool"), *check],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Start the service, send it traffic, and let the configured Prometheus scrape it."""
    folder = tmp_path_factory.mktemp("prometheus")
    with ExitStack() as stack:
        url, _ = stack.enter_context(serving(folder / "service"))
        for size in (784,) * PREDICTIONS + (783,):
            headers = {"Content-Type": "application/octet-stream"}
            httpx.post(f"{url}/predict", content=bytes(size), headers=headers)

        config = (FOLDER / "prometheus.yaml").read_text()
        for ours, here in (
            ("15s", "250ms"),
            ("127.0.0.1:8000", url.removeprefix("http://")),
            ("[alerts.yaml]", f"['{FOLDER / 'alerts.yaml'}']"),
        ):
            assert ours in config
            config = config.replace(ours, here)
        (folder / "prometheus.yaml").write_text(config)
        address = f"127.0.0.1:{free_port()}"
        stack.enter_context(
            running(
                "prometheus",
                "prometheus",
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
                "--log.level=error",
            )
        )
        wait_until(lambda: answers(f"http://{address}/-/ready"))
        client = stack.enter_context(httpx.Client(base_url=f"http://{address}/api/v1/"))
        wait_until(lambda: query(client, 'bnlenet_model_info{job="bn-lenet"}') == [1])
        yield client


def test_the_scraped_numbers_are_the_requests_that_were_sent(prometheus: httpx.Client) -> None:
    sent = 'http_requests_total{route="/predict",method="POST",status="%s"}'
    assert query(prometheus, sent % 200) == [PREDICTIONS]
    assert query(prometheus, sent % 422) == [1]
    assert query(prometheus, 'bnlenet_rejected_total{reason="invalid_input"}') == [1]
    assert query(prometheus, "up") == [1]


def test_no_alert_fires_and_no_rule_fails(prometheus: httpx.Client) -> None:
    def rules() -> list[dict[str, Any]]:
        groups = prometheus.get("rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_until(lambda: {rule["health"] for rule in rules()} == {"ok"})
    # Until the first scrape, the alert that no instance is known is pending.
    wait_until(lambda: {rule.get("state", "inactive") for rule in rules()} == {"inactive"})


@pytest.mark.parametrize("file", ["alerts.yaml", "dashboard.json"])
def test_every_metric_that_is_asked_for_exists(prometheus: httpx.Client, file: str) -> None:
    names = set(re.findall(r"\b(?:http|process|bnlenet)_[a-z_]+", (FOLDER / file).read_text()))
    assert len(names) >= 5
    missing = {name for name in names if not query(prometheus, f'{{__name__=~"{name}(_bucket)?"}}')}
    assert missing == set()


def query(prometheus: httpx.Client, expression: str) -> list[float]:
    """Return the values of the series that the expression has now."""
    answer = prometheus.get("query", params={"query": expression}).json()
    return [float(series["value"][1]) for series in answer["data"]["result"]]
