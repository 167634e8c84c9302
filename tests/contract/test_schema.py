"""Whatever Schemathesis makes of the service's own document gets a documented answer."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

load_all_checks()
# Random bytes are seldom a picture: what the document calls valid may still be refused.
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]  # its speed
EXCLUDED: Any = CHECKS.get_by_names(["positive_data_acceptance"])
# A body over its limit is refused by a status that Schemathesis does not expect.
REFUSALS = ["400", "401", "403", "404", "405", "406", "409", "411", "413", "415", "422"]
CONFIG = schemathesis.Config.from_dict(
    {"checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}}}
)


@pytest.mark.parametrize("examples", [10, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", GenerationMode)
def test_every_operation_keeps_its_word(base_url: str, mode: GenerationMode, examples: int) -> None:
    document = schemathesis.openapi.from_url(f"{base_url}/openapi.json", config=CONFIG)
    asked: set[str] = set()
    for found in document.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr] # an error fails the test
        if mode is GenerationMode.NEGATIVE and not can_be_wrong(operation.definition.raw):
            continue

        @given(operation.as_strategy(generation_mode=mode))
        @settings(max_examples=examples, deadline=None, suppress_health_check=SLOW)
        def check(case: Any) -> None:
            asked.add(case.operation.label)
            case.call_and_validate(excluded_checks=EXCLUDED, timeout=10)

        check()
    assert "POST /predict" in asked
    assert "POST /v2/models/{model_name}/infer" in asked


def can_be_wrong(operation: dict[str, Any]) -> bool:
    """Return whether there is anything but a path, where any text is as the document says."""
    places = {parameter["in"] for parameter in operation.get("parameters", [])}
    return "requestBody" in operation or bool(places - {"path"})
