"""Sets Pillow's options as the service does."""

import pytest

from service.pictures.decoding import configure_pillow


@pytest.fixture(autouse=True)
def configured_pillow() -> None:
    configure_pillow()
