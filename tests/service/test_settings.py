"""Settings come from the environment and are checked before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from service.settings import PREFIX, Settings, SettingsError

GOOD: dict[str, tuple[str, Any]] = {
    "model_path": ("/somewhere/model.onnx", Path("/somewhere/model.onnx")),
    "model_name": ("garments-2.v1", "garments-2.v1"),
    "device": ("CUDA", "cuda"),
    "host": ("0.0.0.0", "0.0.0.0"),  # noqa: S104 - nothing listens in this test
    "port": ("0", 0),
    "workers": ("4", 4),
    "api_key": ("secret", "secret"),
    "max_body_bytes": ("2048", 2048),
    "max_in_flight": ("7", 7),
    "request_timeout_seconds": ("0.5", 0.5),
    "drain_seconds": ("0", 0.0),
    "cors_origins": (
        "https://a.example, http://b.example:8080/",
        ("https://a.example", "http://b.example:8080"),
    ),
    "log_level": ("Warning", "warning"),
    "log_format": ("json", "json"),
}

BAD = {
    "model_name": ["a/b", "two words", ".hidden", "stats", "caf\u00e9", "x" * 65, "a\n"],
    "device": ["tpu"],
    "port": ["-1", "65536", "http", "tcp://10.0.0.1:80"],
    "workers": ["0", "1.5", "65"],
    "api_key": [" secret", "secret\n", "sec\nret", "sec\udcffret"],
    "max_body_bytes": ["0", "1e99"],
    "max_in_flight": ["0"],
    "request_timeout_seconds": ["0", "nan", "inf", "-1"],
    "drain_seconds": ["-1", "nan"],
    "cors_origins": ["example.org", "https://a.example/path", "ftp://a.example", "https://"],
    "log_level": ["loud"],
    "log_format": ["xml"],
}


def test_every_setting_has_a_default_and_a_description() -> None:
    assert set(GOOD) == set(Settings.model_fields)
    Settings.from_environment()
    assert all(
        f.description and f.description.endswith(".") for f in Settings.model_fields.values()
    )


@pytest.mark.parametrize("name", GOOD)
def test_a_setting_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, value = GOOD[name]
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", text)
    read = getattr(Settings.from_environment(), name)
    assert (read.get_secret_value() if name == "api_key" else read) == value


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, texts in BAD.items() for t in texts])
def test_a_wrong_value_is_named_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", text)
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment()
    assert str(caught.value).startswith(f"BNLENET_{name.upper()} is set wrongly: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", GOOD)
def test_an_empty_variable_means_the_default(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", "")
    assert Settings.from_environment() == Settings()


def test_the_key_is_not_shown_when_settings_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNLENET_API_KEY", "very-secret")
    assert "very-secret" not in repr(Settings.from_environment())
