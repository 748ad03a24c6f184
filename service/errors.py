"""Everything that can go wrong, under a fixed code, and the one table that says what HTTP makes of it.

An error carries a ``code`` (a key of :data:`PROBLEMS`) and a ``detail``: a sentence for the client, never a
path, a traceback or a library's own text. The same codes stand in a failed job's ``error``.
"""

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import NamedTuple


class ProblemType(NamedTuple):
    """What a code means: its HTTP status (None: it only ever ends a job) and its title."""

    status: HTTPStatus | None
    title: str


PROBLEMS: Mapping[str, ProblemType] = MappingProxyType(
    {
        # The request.
        "bad_request": ProblemType(HTTPStatus.BAD_REQUEST, "The request cannot be understood"),
        "not_found": ProblemType(HTTPStatus.NOT_FOUND, "There is nothing here"),
        "method_not_allowed": ProblemType(HTTPStatus.METHOD_NOT_ALLOWED, "Method not allowed"),
        "unauthorized": ProblemType(HTTPStatus.UNAUTHORIZED, "A valid API key is needed"),
        "headers_too_large": ProblemType(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The request's headers are too large"
        ),
        "cross_site": ProblemType(HTTPStatus.FORBIDDEN, "Another site's page has sent the request"),
        "foreign_host": ProblemType(HTTPStatus.MISDIRECTED_REQUEST, "The request is for another host"),
        "rate_limited": ProblemType(HTTPStatus.TOO_MANY_REQUESTS, "Too many requests"),
        "quota_exceeded": ProblemType(HTTPStatus.TOO_MANY_REQUESTS, "The key's quota is used up"),
        "request_timeout": ProblemType(HTTPStatus.REQUEST_TIMEOUT, "The upload came to a halt"),
        "invalid_options": ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "The options are not valid"),
        "idempotency_key_reused": ProblemType(
            HTTPStatus.UNPROCESSABLE_ENTITY, "The idempotency key belongs to another request"
        ),
        "missing_video": ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "The request holds no video"),
        "upload_too_large": ProblemType(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The upload is too large"),
        "unsupported_media_type": ProblemType(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The content type is not supported"
        ),
        "range_not_satisfiable": ProblemType(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "The range lies outside the artifact"
        ),
        # The job.
        "job_not_found": ProblemType(HTTPStatus.NOT_FOUND, "No such job"),
        "job_gone": ProblemType(HTTPStatus.GONE, "The job is gone"),
        "artifact_not_found": ProblemType(HTTPStatus.NOT_FOUND, "No such artifact"),
        "artifact_not_ready": ProblemType(HTTPStatus.CONFLICT, "The artifact is not ready"),
        "artifact_damaged": ProblemType(HTTPStatus.INTERNAL_SERVER_ERROR, "The artifact is damaged"),
        # The video, found at upload or while decoding.
        "empty_file": ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "The file is empty"),
        "not_a_video": ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "The file is not a readable video"),
        "unsupported_container": ProblemType(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The container format is not supported"
        ),
        "unsupported_codec": ProblemType(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The video codec is not supported"
        ),
        "no_video_stream": ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "The file holds no video stream"),
        "undecodable_stream": ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "No frame can be decoded"),
        "dimensions_below_limit": ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "The picture is too small"),
        "dimensions_exceed_limit": ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "The picture is too large"),
        "duration_exceeds_limit": ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "The video is too long"),
        "too_many_frames": ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "The video has too many frames"),
        "too_many_streams": ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "The file has too many streams"),
        "resource_limit": ProblemType(
            HTTPStatus.UNPROCESSABLE_ENTITY, "Reading the file takes more than it is allowed"
        ),
        "truncated_input": ProblemType(None, "The video ends too early"),
        "corrupt_input": ProblemType(None, "Too much of the video is damaged"),
        # The work.
        "engine_failed": ProblemType(None, "The segmentation engine failed"),
        "worker_crashed": ProblemType(None, "The worker died while working on the job"),
        "job_timeout": ProblemType(None, "The job took longer than it is allowed"),
        # The service.
        "queue_full": ProblemType(HTTPStatus.SERVICE_UNAVAILABLE, "Too many jobs are waiting"),
        "queue_unavailable": ProblemType(HTTPStatus.SERVICE_UNAVAILABLE, "The job queue cannot be reached"),
        "storage_full": ProblemType(HTTPStatus.INSUFFICIENT_STORAGE, "The storage is full"),
        "storage_unavailable": ProblemType(HTTPStatus.SERVICE_UNAVAILABLE, "The storage cannot be used"),
        "misconfigured": ProblemType(None, "The service is misconfigured"),
        "internal_error": ProblemType(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error"),
    }
)


class ImcnetError(Exception):
    """Base of all errors of this project outside the network itself."""

    code = "internal_error"
    retry_after_seconds: int | None = None

    def __init__(self, detail: str, *, code: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        if code is not None:
            self.code = code


class InvalidRequest(ImcnetError):
    """The request itself is at fault; ``code`` says how."""

    code = "bad_request"


class Unauthorized(ImcnetError):
    """No API key, or none that is valid."""

    code = "unauthorized"

    def __init__(self) -> None:
        super().__init__("Send a valid API key: Authorization: Bearer KEY.")


class CrossSite(ImcnetError):
    """A browser was made to send this by a page of another site."""

    code = "cross_site"

    def __init__(self) -> None:
        super().__init__("Requests that change something are not taken from other sites' pages.")


class ForeignHost(ImcnetError):
    """Without keys, only this machine is served, and this is none of its names."""

    code = "foreign_host"

    def __init__(self) -> None:
        super().__init__(
            "Without API keys, only requests to localhost and loopback addresses are answered; "
            "`imcnet keys create NAME` makes a key."
        )


class RateLimited(ImcnetError):
    """The key has sent as many requests as it may, for now."""

    code = "rate_limited"

    def __init__(self, wait_seconds: int) -> None:
        super().__init__("The key has sent as many requests as it may within a minute.")
        self.retry_after_seconds = wait_seconds


class QuotaExceeded(ImcnetError):
    """The key's jobs take as much as they may."""

    code = "quota_exceeded"
    retry_after_seconds = 60


class UnusableVideo(ImcnetError):
    """The file is no video that this service takes; ``code`` says why."""

    code = "not_a_video"


class JobNotFound(ImcnetError):
    """No job has this id, or it is no id at all."""

    code = "job_not_found"

    def __init__(self) -> None:
        super().__init__("There is no job with this id.")


class JobGone(ImcnetError):
    """The job existed; it has expired or was deleted."""

    code = "job_gone"

    def __init__(self) -> None:
        super().__init__("The job has expired or was deleted.")


class ArtifactNotFound(ImcnetError):
    """The job has no artifact of this name and never will."""

    code = "artifact_not_found"


class ArtifactNotReady(ImcnetError):
    """The job has not succeeded (yet), so it has no artifacts."""

    code = "artifact_not_ready"


class ArtifactDamaged(ImcnetError):
    """What is stored of the artifact is not what was published."""

    code = "artifact_damaged"


class QueueUnavailable(ImcnetError):
    """Redis cannot be reached or does not answer in time."""

    code = "queue_unavailable"
    retry_after_seconds = 5


class QueueFull(ImcnetError):
    """As many jobs are waiting as the settings allow."""

    code = "queue_full"
    retry_after_seconds = 30


class StorageUnavailable(ImcnetError):
    """The disk refuses to work."""

    code = "storage_unavailable"
    retry_after_seconds = 30


class StorageFull(StorageUnavailable):
    """The disk has no room for what is to be written."""

    code = "storage_full"
    retry_after_seconds = 60


class EngineFailed(ImcnetError):
    """The engine process died, hung or reported an error; another attempt may succeed."""

    code = "engine_failed"


class WorkerCrashed(ImcnetError):
    """No attempt is left."""

    code = "worker_crashed"


class AttemptRefused(ImcnetError):
    """The job is not this worker's to begin: an attempt at it lives, or it is a newer release's."""


class JobTimedOut(ImcnetError):
    """The job ran longer than its limit."""

    code = "job_timeout"


class KeyUnknown(ImcnetError):
    """An operator named a key that there is not."""

    code = "misconfigured"


class Misconfigured(ImcnetError):
    """The operator has to change something: a restart alone will not help."""

    code = "misconfigured"
