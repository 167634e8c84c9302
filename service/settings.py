"""The settings: environment variables `BNLENET_*`, checked at start-up."""

import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.model.artefact import NAME_FORM, is_path_segment

PREFIX = "BNLENET_"
MODELS = Path(__file__).parent.parent / "models"
MODEL, PICTURE_MODEL = MODELS / "bn_lenet.onnx", MODELS / "bn_lenet_photos.onnx"


class SettingsError(Exception):
    """A setting has a wrong value; the message is one sentence with its name."""


class Settings(BaseSettings):
    """The service's settings; a field's description is its row in the settings table."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, env_ignore_empty=True)

    model_path: Path = Field(
        default=MODEL,
        description="The model file to serve, or a folder with one `.onnx` file.",
    )
    picture_model_path: Path | None = Field(
        default=None,
        description="The model file for pictures that the service converts. If it is not set:"
        " the committed one, or that of `BNLENET_MODEL_PATH` if that is set.",
    )
    model_name: str | None = Field(
        default=None,
        description="The model's name in answers, metrics and the paths of the Open Inference"
        " Protocol, in place of the file's own.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where the model runs. `cuda` refuses to start without a working GPU;"
        " `auto` is `cpu`, the faster for single images.",
    )
    host: str = Field(default="127.0.0.1", description="The address to listen on.")
    port: int = Field(
        default=8000, ge=0, le=65535, description="The port to listen on; 0 takes any free one."
    )
    workers: int = Field(default=1, ge=1, le=64, description="The number of worker processes.")
    api_key: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="When set, `Authorization: Bearer KEY` is needed for everything but health,"
        " metrics, documentation and the page.",
    )
    max_body_bytes: int = Field(
        default=10 * 2**20,
        ge=1024,
        description="The largest body, as sent and when unpacked, in bytes.",
    )
    max_in_flight: int = Field(
        default=512,
        ge=1,
        description="How many whole requests may wait for their answers in one worker; the next"
        " gets a 503. Half of them may be pictures to convert.",
    )
    request_timeout_seconds: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="The deadline for a whole request, reading its body included.",
    )
    drain_seconds: float = Field(
        default=5.0,
        ge=0,
        le=3600,
        description="How long requests are still accepted after SIGTERM, while `/readyz` says 503.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Origins whose pages may call, comma-separated, or `*`; none by default.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="The least serious lines logged; `warning` leaves out the access log.",
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="The form of log lines."
    )

    @field_validator("model_name")
    @classmethod
    def _check_model_name(cls, name: str | None) -> str | None:
        if name is not None and not is_path_segment(name):
            raise ValueError(f"{name!r} is not a valid name; use up to {NAME_FORM}")
        return name

    @field_validator("api_key")
    @classmethod
    def _check_api_key(cls, key: SecretStr | None) -> SecretStr | None:
        text = "" if key is None else key.get_secret_value()
        if text != text.strip() or not text.isprintable():
            raise ValueError(
                "it has control characters or outer white space, which no request can send"
            )
        return key

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        origins = tuple(origin.strip().rstrip("/").lower() for origin in origins)  # as browsers do
        for origin in origins:
            scheme, separator, host = origin.partition("://")
            if origin != "*" and not (separator and scheme in ("http", "https") and host):
                raise ValueError(f"{origin!r} is not an origin such as https://example.org")
            if "/" in host:
                raise ValueError(f"{origin!r} has a path; an origin is scheme, host and port")
        return origins

    @field_validator("log_level", "log_format", "device", mode="before")
    @classmethod
    def _lower_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @property
    def model_paths(self) -> list[Path]:
        """The model files: for pixels, then for converted pictures, unless they are the same."""
        of_pictures = self.picture_model_path
        if of_pictures is None and self.model_path == MODEL:
            of_pictures = PICTURE_MODEL
        return list(dict.fromkeys([self.model_path, of_pictures or self.model_path]))

    @classmethod
    def from_environment(cls) -> Self:
        """Read the settings from the environment.

        Raises:
            SettingsError: a variable has a wrong value.
        """
        try:
            return cls()
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_context=False)[0]
            name = f"{PREFIX}{str(first['loc'][0]).upper()}"
            reason = first["msg"].removeprefix("Value error, ")  # pydantic's, before our own
            raise SettingsError(f"{name} is set wrongly: {reason}.") from None

    @classmethod
    def unknown_variables(cls) -> Iterator[str]:
        """Yield a warning for each environment variable that looks like a setting and is none."""
        known = [f"{PREFIX}{name.upper()}" for name in cls.model_fields]
        for variable in sorted(os.environ):
            name = variable.upper()
            rest = name.removeprefix(PREFIX)
            holding = [it for it in known if rest != name and rest in it.removeprefix(PREFIX)]
            near = holding or get_close_matches(name, known, 1, 0.85)
            if name not in known and (near or rest != name):
                advice = f"did you mean {near[0]}?" if near else "the README lists the settings."
                yield f"{variable} is not a setting; {advice}"
