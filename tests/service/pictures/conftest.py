"""Pillow is set up as the service sets it up."""

import pytest

from service.pictures.decoding import configure_pillow


@pytest.fixture(autouse=True)
def configured_pillow() -> None:
    configure_pillow()
