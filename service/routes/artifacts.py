"""``/jobs/{id}/artifacts``: what a succeeded job has published."""

from io import BufferedReader

from fastapi import APIRouter, Request, Response

from service.downloads import ArtifactResponse
from service.durable import disk_errors_translated
from service.errors import ArtifactDamaged, ArtifactNotReady
from service.jobs import Artifact, PublishedArtifact
from service.problems import documented
from service.services import ServicesDep
from service.storage import JobStorage

_FILE = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

router = APIRouter()


@router.get(
    "/jobs/{job_id}/artifacts", responses=documented("job_not_found", "job_gone", "queue_unavailable")
)
@router.head("/jobs/{job_id}/artifacts", include_in_schema=False)
def list_artifacts(services: ServicesDep, job_id: str) -> tuple[PublishedArtifact, ...]:
    """What can be downloaded; nothing until the job has succeeded."""
    return services.job(job_id).artifacts


@router.get(
    "/jobs/{job_id}/artifacts/{name}",
    response_class=Response,
    responses={
        200: {"description": "The file.", "content": _FILE},
        206: {"description": "The range asked for.", "content": _FILE},
        304: {"description": "Unchanged since `If-None-Match`."},
        **documented(
            "bad_request",
            "job_not_found",
            "artifact_not_found",
            "job_gone",
            "artifact_not_ready",
            "range_not_satisfiable",
            "artifact_damaged",
            "storage_unavailable",
        ),
    },
)
@router.head("/jobs/{job_id}/artifacts/{name}", include_in_schema=False)
def get_artifact(request: Request, services: ServicesDep, job_id: str, name: str) -> Response:
    """Download an artifact, whole or in ranges. Its `ETag` is its SHA-256, and holds for what is sent."""
    artifact, file = _open(services.storage, job_id, name)
    return ArtifactResponse(artifact, file, if_none_match=request.headers.get("if-none-match"))


def _open(storage: JobStorage, job_id: str, name: str) -> tuple[Artifact, BufferedReader]:
    """Raises: As :meth:`JobStorage.artifact`, and ArtifactDamaged: The file is missing."""
    with disk_errors_translated():
        try:
            artifact, path = storage.artifact(job_id, name)
            return artifact, path.open("rb")
        except (ArtifactNotReady, FileNotFoundError) as error:
            storage.load(job_id)  # raises JobGone where the job has gone while we looked
            if isinstance(error, ArtifactNotReady):
                raise
            raise ArtifactDamaged("The artifact is missing.") from error
