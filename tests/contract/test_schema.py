"""Whatever Schemathesis makes of the service's own document gets a documented answer."""

import contextlib
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

load_all_checks()
# Random bytes are seldom a picture: what the document calls valid may still be refused.
EXCLUDED: Any = CHECKS.get_by_names(["positive_data_acceptance"])


@pytest.mark.parametrize("mode", GenerationMode)
def test_every_operation_keeps_its_word(base_url: str, mode: GenerationMode) -> None:
    document = schemathesis.openapi.from_url(f"{base_url}/openapi.json")
    for found in document.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr] # an error fails the test

        @given(operation.as_strategy(generation_mode=mode))
        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        def check(case: Any) -> None:
            case.call_and_validate(excluded_checks=EXCLUDED, timeout=10)

        with contextlib.suppress(Unsatisfiable):  # nothing can be wrong where nothing is sent
            check()
