"""What `imcnet doctor` looks at on this machine: settings, weights, device, media, and its API."""

import io
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from importlib.util import find_spec
from urllib.error import HTTPError, URLError

import av
import av.codec
import numpy as np
from av.codec.codec import UnknownCodecError

from service.cli.examination import Check, Finding, Patient, fail, ok, skip, warn
from service.cli.serve import http_url, imcnet_command
from service.cli.settings import require_weights
from service.errors import Misconfigured
from service.media import CODECS
from service.settings import ServiceSettings
from worker.settings import WorkerSettings

_CHILD_SECONDS = 120
_HTTP_SECONDS = 5
_FRAMES = 3
_NO_TORCH = "The extra `worker` is not installed here"
# Something is computed: a driver that is broken may still count its devices.
_TRY_DEVICE = """
import sys, torch
from model.segmenter import resolve_device
device = resolve_device(sys.argv[1])
torch.ones(8, device=device).sum().item()
print(device.type, torch.cuda.get_device_name(device) if device.type == "cuda" else "")
"""


def settings(patient: Patient) -> Finding:
    """Names only: a value may hold a password."""
    try:
        _ = patient.settings, patient.worker_settings
    except Misconfigured as error:
        return fail(error.detail, "Change the environment; README.md says what each setting means.")
    known = {
        f"IMCNET_{name.upper()}" for kind in (ServiceSettings, WorkerSettings) for name in kind.model_fields
    }
    given = sorted(name for name in os.environ if name.startswith("IMCNET_"))
    if unknown := [name for name in given if name not in known]:
        return warn(
            f"No settings of the service: {', '.join(unknown)}", "Is that a slip? README.md has the names."
        )
    return ok(f"From the environment: {', '.join(given) or 'none'}")


def weights(patient: Patient) -> Finding:
    path = require_weights(patient.worker_settings)
    if find_spec("torch") is None:
        return skip(_NO_TORCH)
    shown = _run(imcnet_command("weights", "show", str(path)))
    if shown.returncode:
        return fail(_last_line(shown), "Restore the file, or set IMCNET_WEIGHTS.")
    facts = json.loads(shown.stdout)
    wanted = patient.worker_settings.weights_sha256
    if wanted is not None and facts["sha256"] != wanted:
        return fail(
            f"{path} has the SHA-256 {facts['sha256']}",
            "IMCNET_WEIGHTS_SHA256 is another: restore the file, or change the setting.",
        )
    checked = "not compared: IMCNET_WEIGHTS_SHA256 is not set" if wanted is None else "as it should be"
    return ok(f"{facts['name']}; its SHA-256 {facts['sha256'][:12]}… is {checked}")


def device(patient: Patient) -> Finding:
    if find_spec("torch") is None:
        return skip(_NO_TORCH)
    wanted = patient.worker_settings.device
    try:
        tried = _run([sys.executable, "-P", "-c", _TRY_DEVICE, wanted])
    except subprocess.TimeoutExpired:
        return fail(f"{wanted} hangs", "See dmesg and nvidia-smi; a reboot if these hang too.")
    if tried.returncode:
        return fail(_last_line(tried), "See nvidia-smi, the driver, and IMCNET_DEVICE.")
    kind, _, name = tried.stdout.strip().partition(" ")
    if wanted == "auto" and kind == "cpu":
        return warn(
            "There is no CUDA device, so a worker here takes the CPU, slowly",
            "See nvidia-smi; or set IMCNET_DEVICE=cpu, if it is to be so.",
        )
    return ok(f"{wanted}: {name or kind} computes")


def media(patient: Patient) -> Finding:
    decoded = _decode(_encode())
    if decoded != _FRAMES:
        return fail(
            f"Of {_FRAMES} frames of H.264, {decoded} are decoded", "Install PyAV from PyPI: pip install av"
        )
    if missing := [name for name in CODECS.split(",") if not _can_decode(name)]:
        return warn(f"There is no decoder for {', '.join(missing)}", "Install PyAV from PyPI: pip install av")
    return ok(f"H.264 is encoded and decoded; FFmpeg has {CODECS}")


def api(patient: Patient) -> Finding:
    url = http_url(patient.settings.host, patient.settings.port)
    try:
        _get(f"{url}/livez")
        return ok(f"{url} is ready: {_get(f'{url}/readyz')}")
    except HTTPError as error:  # before OSError, which it is too
        return fail(f"{url} answers {error.code}: {error.read(500).decode(errors='replace')}", "See its log.")
    except URLError:
        return warn(f"No API answers at {url}", "No fault where it runs elsewhere; else start it.")
    except (TimeoutError, ConnectionError, HTTPException) as error:
        return fail(f"{url} hangs ({type(error).__name__})", "Restart the API; see its log.")


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Raises: subprocess.TimeoutExpired."""
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_CHILD_SECONDS, stdin=subprocess.DEVNULL
    )


def _last_line(ended: "subprocess.CompletedProcess[str]") -> str:
    """What a child has died of."""
    return (ended.stderr.strip().splitlines() or [f"It ended with {ended.returncode}"])[-1]


def _encode() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(_FRAMES):
            image = np.full((48, 64, 3), 60 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _decode(data: bytes) -> int:
    with av.open(io.BytesIO(data), "r") as container:
        return len(list(container.decode(video=0)))


def _can_decode(name: str) -> bool:
    try:
        av.codec.Codec(name, "r")
    except UnknownCodecError:
        return False
    return True


def _get(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is for the way out
    with opener.open(url, timeout=_HTTP_SECONDS) as answer:
        return str(answer.read(500).decode(errors="replace"))


SETTINGS = Check(name="settings", look=settings)
CHECKS = (
    Check(name="weights", look=weights, needs=("settings",)),
    Check(name="device", look=device, needs=("settings",)),
    Check(name="media", look=media),
    Check(name="API", look=api, needs=("settings",)),
)
