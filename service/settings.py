"""Settings, from ``IMCNET_…`` environment variables; read at the edge, below it there are plain values."""

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.embedded import url_of_running
from service.errors import Misconfigured
from service.media import MediaLimits

PRIVATE_REDIS = "redis"  # the folder of the data directory that belongs to the one of `imcnet up`
MIB = 2**20
GIB = 2**30


class SharedSettings(BaseSettings):
    """What the API and the workers have to agree on."""

    model_config = SettingsConfigDict(
        env_prefix="IMCNET_", env_ignore_empty=True, frozen=True, extra="ignore"
    )

    redis_url: str | None = Field(
        default=None,
        validation_alias=AliasChoices("IMCNET_REDIS_URL", "REDIS_URL"),
        description="Redis of the queue. `imcnet up` starts one of its own where none is given.",
    )
    redis_password_file: Path | None = Field(
        default=None, description="File with the password of the user whom the URL of Redis names."
    )
    redis_timeout_seconds: PositiveFloat = Field(
        default=1.0, description="How long the API waits for Redis before it answers 503."
    )
    data_dir: Annotated[Path, AfterValidator(Path.absolute)] = Field(
        default=Path("imcnet-data"),
        description="Uploads, jobs and artifacts; shared by the API and all workers.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Log level.")
    log_format: Literal["text", "json"] = Field(
        default="text", description="`text` for people, `json` for machines: one object a line."
    )
    lease_seconds: PositiveInt = Field(
        default=30, description="A worker silent for this long loses its job to another one."
    )
    reconcile_seconds: PositiveFloat = Field(
        default=5, description="How often jobs are looked for that nobody works at."
    )
    max_attempts: PositiveInt = Field(default=3, description="Attempts at a job whose worker or engine dies.")
    job_timeout_seconds: PositiveInt = Field(default=7200, description="Time limit of one attempt at a job.")
    keep_originals: bool = Field(default=False, description="Keep the uploaded video until the job expires.")
    max_pixels: PositiveInt = Field(default=4096 * 2304, description="Largest picture, in pixels of area.")
    min_side: PositiveInt = Field(default=16, description="Shortest picture side, in pixels.")
    max_duration_seconds: PositiveInt = Field(default=600, description="Longest video.")
    max_frames: PositiveInt = Field(default=20_000, description="Most frames of a video.")
    max_streams: PositiveInt = Field(default=32, description="Most streams in a container.")
    max_corrupt_fraction: float = Field(
        default=0.05, ge=0, le=1, description="Share of damaged packets above which a job fails."
    )

    @model_validator(mode="after")
    def _know_whose_password_it_is(self) -> Self:
        if self.redis_password_file is not None and self.redis_url is None:
            raise ValueError("IMCNET_REDIS_PASSWORD_FILE needs an IMCNET_REDIS_URL that names its user")
        return self

    @model_validator(mode="after")
    def _reconcile_often_enough(self) -> Self:
        # A gap of half a lease is taken for an outage of Redis, after which nobody's lease is called lost.
        if self.reconcile_seconds > self.lease_seconds / 4:
            raise ValueError("IMCNET_RECONCILE_SECONDS must be a fourth of IMCNET_LEASE_SECONDS at most")
        return self

    def require_redis_url(self) -> str:
        """The Redis that is configured, else the private one of an `imcnet up` with the same data directory.

        Raises:
            Misconfigured: There is neither, or the password's file cannot be read.
        """
        if self.redis_url is not None:
            return self._with_password(self.redis_url)
        url = url_of_running(self.data_dir / PRIVATE_REDIS)
        if url is None:
            raise Misconfigured(
                f"No Redis is configured, and no `imcnet up` runs in {self.data_dir}: set IMCNET_REDIS_URL."
            )
        return url

    def _with_password(self, url: str) -> str:
        if self.redis_password_file is None:
            return url
        try:
            password = self.redis_password_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Misconfigured(f"{self.redis_password_file}, Redis' password, cannot be read.") from error
        parts = urlsplit(url)
        user, _, server = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user.partition(':')[0]}:{quote(password, safe='')}@{server}").geturl()

    @property
    def media_limits(self) -> MediaLimits:
        return MediaLimits(
            max_pixels=self.max_pixels,
            min_side=self.min_side,
            max_duration_seconds=self.max_duration_seconds,
            max_frames=self.max_frames,
            max_streams=self.max_streams,
        )


class ServiceSettings(SharedSettings):
    """What only the API needs."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on.")
    published: str | None = Field(
        default=None,
        description="Address and port at which others reach this one, if a container or proxy is in between.",
    )
    key_requests_per_minute: PositiveInt = Field(default=600, description="Requests of one API key a minute.")
    key_active_jobs: PositiveInt = Field(default=50, description="Jobs of one API key that have not ended.")
    key_queued_bytes: PositiveInt = Field(
        default=20 * GIB, description="Uploads of one API key's jobs that have not ended."
    )
    key_stored_bytes: PositiveInt = Field(
        default=100 * GIB, description="All that is stored of one API key's jobs."
    )
    root_path: str = Field(default="", description="Path prefix that a reverse proxy strips.")
    max_upload_bytes: PositiveInt = Field(default=2 * GIB, description="Largest request body.")
    max_form_field_bytes: PositiveInt = Field(
        default=64 * 1024, description="Largest option field of a form."
    )
    max_header_bytes: PositiveInt = Field(
        default=16 * 1024, description="Longest head of a request: its line and headers."
    )
    header_seconds: PositiveFloat = Field(
        default=30, description="A connection on which no request arrives for this long is closed."
    )
    upload_max_seconds: PositiveFloat = Field(default=7200, description="Longest upload, however fast it is.")
    upload_idle_seconds: PositiveFloat = Field(
        default=30, description="An upload that sends nothing for this long is dropped."
    )
    upload_min_bytes_per_second: NonNegativeInt = Field(
        default=64 * 1024,
        description="Slowest upload, of a client that has kept us waiting that long in all.",
    )
    disk_reserve_bytes: NonNegativeInt = Field(
        default=5 * GIB, description="Free disk space that an upload must leave, beside twice its own size."
    )
    max_probes: PositiveInt = Field(
        default=4, description="Uploads that are probed at the same time; others wait for their turn."
    )
    probe_timeout_seconds: PositiveFloat = Field(
        default=15, description="Time limit of the probe of an upload."
    )
    probe_memory_bytes: PositiveInt = Field(
        default=3 * GIB // 2, description="Address space of the probe of an upload."
    )
    max_queued_jobs: PositiveInt = Field(default=100, description="Jobs that may wait; more are refused.")
    retention_seconds: PositiveInt = Field(
        default=86_400, description="Finished jobs are kept for this long."
    )
    tombstone_seconds: PositiveInt = Field(
        default=7 * 86_400, description="For this long an expired or deleted job answers 410, later 404."
    )
    sweep_interval_seconds: PositiveFloat = Field(
        default=30, description="How often expired jobs and left-over uploads are removed."
    )
