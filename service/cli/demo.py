"""`imcnet demo`: a whole job over HTTP, from the upload to something to look at."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urljoin

import typer

from service.cli.serve import DeviceOption, WeightsOption, imcnet_command, worker_arguments
from service.cli.up import Api, free_port
from service.errors import ImcnetError, Misconfigured
from service.processes import tethered

if TYPE_CHECKING:
    import httpx

_START_SECONDS = 180
_POLL_SECONDS = 0.5
_DISK_RESERVE_BYTES = 256 * 2**20  # a try-out should not ask for gigabytes of free disk


def demo(
    video: Annotated[
        Path | None, typer.Argument(help="Without one, a scene with known truth is rendered.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="Zip file with the true mask of each frame, to compare with.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo"),
    url: Annotated[str | None, typer.Option(help="A service that runs already; else one is started.")] = None,
    weights: WeightsOption = None,
    device: DeviceOption = None,
) -> None:
    """Send a video through the whole service and leave masks, an overlay and a contact sheet."""
    from service.cli import showcase

    for file in (video, truth):
        if file is not None and not file.is_file():
            raise Misconfigured(f"There is no file {file}.")
    out.mkdir(parents=True, exist_ok=True)
    if video is None:
        typer.echo("Rendering a scene …")
        video, truth = out / "scene.mp4", out / "truth.zip"
        showcase.write_scene(video, truth)
    with contextlib.ExitStack() as stack:
        service = url or stack.enter_context(_private_service(out, weights=weights, device=device))
        job = _run_job(service, video, out)
    showcase.write_contact_sheet(
        out / "overlay.mp4", out / "contact_sheet.png", frames=job["input"]["frames"]
    )
    for name in ("masks.zip", "overlay.mp4", "contact_sheet.png"):
        typer.echo(f"  {out / name}")
    if truth is not None:
        typer.echo(f"Mean J against the truth: {showcase.mean_similarity(out / 'masks.zip', truth):.3f}")
    if not job["model"]["trained"]:
        typer.echo("The weights are random, not trained: these masks mean nothing yet.")


@contextlib.contextmanager
def _private_service(out: Path, *, weights: Path | None, device: str | None) -> Iterator[str]:
    """``imcnet up`` on a port and with data of its own, for as long as the context lasts. Yields its URL."""
    api = Api("127.0.0.1", free_port())
    log_path = out / "service.log"
    typer.echo(f"Starting the service, log in {log_path} …")
    with tempfile.TemporaryDirectory(prefix=".service-", dir=out) as data, log_path.open("wb") as log:
        # A queue of its own too: another worker would not find the video in this data directory.
        environment = {k: v for k, v in os.environ.items() if k not in ("IMCNET_REDIS_URL", "REDIS_URL")}
        environment |= {"IMCNET_DATA_DIR": data, "IMCNET_DISK_RESERVE_BYTES": str(_DISK_RESERVE_BYTES)}
        command = imcnet_command(
            "up",
            "--host",
            api.host,
            "--port",
            str(api.port),
            *worker_arguments(device=device, weights=weights),
        )
        up = subprocess.Popen(
            tethered(command), env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_until_ready(api, up, log_path)
            yield api.url
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait()


def _wait_until_ready(api: Api, up: "subprocess.Popen[bytes]", log_path: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not api.has_worker():
        if up.poll() is not None or time.monotonic() > deadline:
            last_line = (log_path.read_text(errors="replace").splitlines() or [""])[-1]
            raise Misconfigured(f"The service did not start: {last_line.removeprefix('imcnet: error: ')}")
        time.sleep(_POLL_SECONDS)


def _run_job(service: str, video: Path, out: Path) -> dict[str, Any]:
    """Post ``video``, wait for its job and download its artifacts to ``out``.

    Returns:
        The succeeded job.

    Raises:
        ImcnetError: The service refused the video or the job failed; its own words.
    """
    import httpx

    try:
        # The environment's proxies are for the way out, not for a service on this machine.
        with httpx.Client(timeout=60, trust_env=False) as client:
            job = _wait_for(client, service, _post(client, service, video))
            for artifact in job["artifacts"]:
                _download(client, urljoin(service, artifact["url"]), out / Path(artifact["name"]).name)
            return job
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise Misconfigured(f"The service at {service} does not answer.") from error


def _post(client: "httpx.Client", service: str, video: Path) -> dict[str, Any]:
    typer.echo(f"Posting {video} …")
    with video.open("rb") as file:
        answer = client.post(
            f"{service.rstrip('/')}/jobs",
            files={"video": (video.name, file, "application/octet-stream")},
            data={"artifacts": ["masks", "overlay"]},
        )
    return _checked(answer)


def _wait_for(client: "httpx.Client", service: str, job: dict[str, Any]) -> dict[str, Any]:
    from tqdm import tqdm

    with tqdm(desc="Segmenting", unit="frame") as bar:
        while job["status"] in ("queued", "running", "canceling"):
            time.sleep(_POLL_SECONDS)
            job = _checked(client.get(urljoin(service, job["links"]["self"])))
            bar.total = job["progress"]["frames_total"]
            bar.update(job["progress"]["frames_done"] - bar.n)
    if job["status"] != "succeeded":
        raise ImcnetError((job["error"] or {}).get("detail", f"The job was {job['status']}."))
    return job


def _download(client: "httpx.Client", url: str, path: Path) -> None:
    with client.stream("GET", url) as answer, path.open("wb") as file:
        if answer.is_error:
            raise ImcnetError(f"The service answered {answer.status_code} for {path.name}.")
        for chunk in answer.iter_bytes():
            file.write(chunk)


def _checked(answer: "httpx.Response") -> dict[str, Any]:
    try:
        body: dict[str, Any] = answer.json()
    except ValueError as error:
        raise Misconfigured(f"What answers at {answer.url} is not this service.") from error
    if answer.is_error:
        raise ImcnetError(body.get("detail", f"The service answered {answer.status_code}."))
    return body
