"""Settings are read from the environment, and checked before anything starts."""

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

import service
from service.settings import PREFIX, Settings, SettingsError

MODELS = Path(service.__file__).parent.parent / "models"
GOOD: dict[str, tuple[str, Any]] = {
    "model_path": ("/somewhere/model.onnx", Path("/somewhere/model.onnx")),
    "picture_model_path": ("/somewhere/photos.onnx", Path("/somewhere/photos.onnx")),
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
        "https://a.example, HTTP://B.example:8080/",
        ("https://a.example", "http://b.example:8080"),
    ),
    "log_level": ("Warning", "warning"),
    "log_format": ("json", "json"),
}

DEFAULTS: dict[str, Any] = {
    "model_path": MODELS / "bn_lenet.onnx",
    "picture_model_path": None,
    "model_name": None,
    "device": "auto",
    "host": "127.0.0.1",
    "port": 8000,
    "workers": 1,
    "api_key": None,
    "max_body_bytes": 10_485_760,
    "max_in_flight": 512,
    "request_timeout_seconds": 10.0,
    "drain_seconds": 5.0,
    "cors_origins": (),
    "log_level": "info",
    "log_format": "text",
}

ENDS = {  # the extreme values that are accepted
    "port": ["0", "65535"],
    "workers": ["1", "64"],
    "max_body_bytes": ["1024"],
    "max_in_flight": ["1"],
    "request_timeout_seconds": ["1e-3", "3600"],
    "drain_seconds": ["0", "3600"],
    "device": ["auto", "cpu", "cuda"],
    "log_level": ["debug", "info", "warning", "ERROR"],
    "log_format": ["text", "JSON"],
    "cors_origins": ["*", "https://a.example,*", "http://[::1]:8080"],
    "api_key": ["two words", "clé €", "k"],
    "model_name": ["x" * 64],
}

BAD = {
    "model_name": ["a/b", "two words", ".hidden", "stats", "caf\u00e9", "x" * 65, "a\n"],
    "device": ["tpu"],
    "port": ["-1", "65536", "http", "tcp://10.0.0.1:80"],
    "workers": ["0", "1.5", "65"],
    "api_key": [" secret", "secret\n", "sec\nret", "sec\udcffret"],
    "max_body_bytes": ["0", "1023", "1e99"],
    "max_in_flight": ["0"],
    "request_timeout_seconds": ["0", "nan", "inf", "-1", "3600.1"],
    "drain_seconds": ["-1", "nan", "3600.1"],
    "cors_origins": [
        "example.org",
        "https://a.example/path",
        "ftp://a.example",
        "https://",
        "https:a.example",
        "https://a.example,",
        "*,b.example",
    ],
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


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, texts in ENDS.items() for t in texts])
def test_the_extreme_values_are_accepted(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", text)
    read = getattr(Settings.from_environment(), name)
    shown = read.get_secret_value() if name == "api_key" else read
    if isinstance(shown, tuple):
        shown = ",".join(shown)
    assert type(shown)(text.lower()) == shown


def test_the_defaults_are_those_of_the_documentation() -> None:
    assert dict(Settings()) == DEFAULTS
    assert DEFAULTS["model_path"].is_file()


@pytest.mark.parametrize(
    ("given", "files"),
    [
        ({}, [MODELS / "bn_lenet.onnx", MODELS / "bn_lenet_photos.onnx"]),
        ({"model_path": "/a"}, [Path("/a")]),
        ({"model_path": "/a", "picture_model_path": "/b"}, [Path("/a"), Path("/b")]),
        ({"model_path": "/a", "picture_model_path": "/a"}, [Path("/a")]),
        ({"picture_model_path": "/b"}, [MODELS / "bn_lenet.onnx", Path("/b")]),
        ({"picture_model_path": MODELS / "bn_lenet.onnx"}, [MODELS / "bn_lenet.onnx"]),
    ],
)
def test_the_committed_models_belong_together_and_another_one_serves_both(
    given: dict[str, Any], files: list[Path]
) -> None:
    assert Settings(**given).model_paths == files
    assert all(path.is_file() for path in files if path.parent == MODELS)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("cors_origins", "b.example", "'b.example' is not an origin such as https://example.org."),
        ("cors_origins", "http://a/b", "'http://a/b' has a path; an origin is scheme, host and"),
        ("api_key", " a", "set wrongly: it has control characters or outer white space, which"),
        ("model_name", "a/b", "'a/b' is not a valid name; use up to "),
        ("workers", "0", "greater than or equal to 1"),
    ],
)
def test_the_sentence_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, sentence: str
) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", text)
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment()
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")
    assert text not in str(caught.value) or name != "api_key"


@pytest.mark.parametrize(
    ("variable", "advice"),
    [
        ("BNLENET_PROT", "did you mean BNLENET_PORT?"),
        ("bnlenet_worker", "did you mean BNLENET_WORKERS?"),
        ("BNLENET_CORS", "did you mean BNLENET_CORS_ORIGINS?"),
        ("BNLENET_TIMEOUT", "did you mean BNLENET_REQUEST_TIMEOUT_SECONDS?"),
        ("BNLENT_PORT", "did you mean BNLENET_PORT?"),
        ("BN_LENET_API_KEY", "did you mean BNLENET_API_KEY?"),
        ("BNLENET_QUX", "the README lists the settings."),
        ("bnlenet_port", None),
        ("PORT", None),
        ("OPENAI_API_KEY", None),
    ],
)
def test_a_variable_that_looks_like_a_setting_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, variable: str, advice: str | None
) -> None:
    monkeypatch.setattr(os, "environ", {variable: "x", "HOME": "/", "BNLENET_PORT": "1"})
    warnings = [] if advice is None else [f"{variable} is not a setting; {advice}"]
    assert [*Settings.unknown_variables()] == warnings


def test_an_empty_key_is_never_a_key() -> None:
    """An empty variable means no key; and `Settings` refuses an empty key."""
    with pytest.raises(ValidationError, match="at least 1"):
        Settings(api_key=SecretStr(""))


def test_settings_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1


@pytest.mark.parametrize("name", GOOD)
def test_an_empty_variable_means_the_default(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", "")
    assert Settings.from_environment() == Settings()


def test_the_key_is_not_shown_when_settings_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNLENET_API_KEY", "very-secret")
    assert "very-secret" not in repr(Settings.from_environment())
