"""What a container may do, as Dockerfile and compose files have it: asserted for every service there is."""

import re
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY

PINNED = r"[\w.-]+@sha256:[0-9a-f]{64}"
COMPOSE_FILES = ("docker-compose.yml", "docker-compose.cpu.yml")
READ_ONLY_FOLDERS = {"/weights", "/run/secrets"}
TMPFS = {
    ("docker-compose.yml", "worker"): ["/tmp", "/var/cache/triton:exec,uid=10001,gid=10001,mode=700"],
}
VOLUMES = {
    "api": {"/data"},
    "worker": {"/data"},
    "redis": {"/data"},
    "secrets": {"/secrets/api", "/secrets/worker", "/secrets/redis"},
}


def compose(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((REPOSITORY / name).read_text())
    return {"file": name, **document}


SERVICES = [
    pytest.param(document["services"][service], document, service, id=f"{name}-{service}")
    for name in COMPOSE_FILES
    for document in [compose(name)]
    for service in document["services"]
]
EVERY_SERVICE = pytest.mark.parametrize(("service", "document", "name"), SERVICES)


def dockerfile() -> str:
    return (REPOSITORY / "docker" / "Dockerfile").read_text()


def stages() -> dict[str, list[str]]:
    """The lines of the Dockerfile by stage."""
    found: dict[str, list[str]] = {}
    for line in dockerfile().splitlines():
        if match := re.fullmatch(r"FROM \S+ AS (\S+)", line):
            found[match[1]] = []
        elif found:
            found[list(found)[-1]].append(line)
    return found


@EVERY_SERVICE
def test_a_service_has_no_more_rights_than_it_needs(
    service: dict[str, Any], document: dict[str, Any], name: str
) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    more = {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode"}
    assert not more & set(service)


@EVERY_SERVICE
def test_a_service_has_limits(service: dict[str, Any], document: dict[str, Any], name: str) -> None:
    assert service["pids_limit"] <= 4096
    assert re.fullmatch(r"\$\{[A-Z_]+:-\d+g\}", service["mem_limit"])
    assert service["ulimits"] == {"nofile": 65536, "core": 0}


@EVERY_SERVICE
def test_a_service_writes_to_its_volume_and_tmpfs_alone(
    service: dict[str, Any], document: dict[str, Any], name: str
) -> None:
    assert service["tmpfs"] == TMPFS.get((document["file"], name), ["/tmp"])
    writable = {volume.split(":")[-1] for volume in service["volumes"] if not volume.endswith(":ro")}
    assert writable == VOLUMES[name]
    read_only = {volume.split(":")[-2] for volume in service["volumes"] if volume.endswith(":ro")}
    assert read_only <= READ_ONLY_FOLDERS


@EVERY_SERVICE
def test_only_the_api_is_reached_from_outside_and_reaches_out(
    service: dict[str, Any], document: dict[str, Any], name: str
) -> None:
    assert document["networks"]["inside"] == {"internal": True}
    assert service["networks"] == (["outside", "inside"] if name == "api" else ["inside"])
    assert ("ports" in service) == (name == "api")


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_the_api_is_published_on_loopback_unless_told_otherwise_and_knows_it(name: str) -> None:
    api = compose(name)["services"]["api"]
    assert api["ports"] == ["${IMCNET_PUBLISH:-127.0.0.1:8000}:8000"]
    assert api["environment"]["IMCNET_PUBLISHED"] == "${IMCNET_PUBLISH:-127.0.0.1:8000}"


@EVERY_SERVICE
def test_no_service_runs_as_root(service: dict[str, Any], document: dict[str, Any], name: str) -> None:
    if "build" in service:
        assert "user" not in service
        assert "USER 10001:10001" in stages()[service["build"]["target"]]
    else:
        assert service["user"] == "${REDIS_USER:-999:999}"


@EVERY_SERVICE
def test_secrets_are_files_and_each_service_sees_its_own(
    service: dict[str, Any], document: dict[str, Any], name: str
) -> None:
    told = service.get("environment", {})
    assert not [key for key in told if re.search("PASSWORD|SECRET|TOKEN", key) and not key.endswith("_FILE")]
    if name != "secrets":
        seen = [volume for volume in service["volumes"] if "secrets" in volume]
        assert seen == [f"{name}-secrets:/run/secrets:ro"]


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_redis_lets_in_those_it_knows_and_they_say_who_they_are(name: str) -> None:
    services = compose(name)["services"]
    command = services["redis"]["command"]
    assert command[command.index("--aclfile") + 1] == "/run/secrets/users.acl"
    assert services["secrets"]["command"] == ["imcnet", "redis-users", "/secrets"]
    for user in ("api", "worker"):
        told = services[user]["environment"]
        assert told["IMCNET_REDIS_URL"] == f"redis://{user}@redis:6379/0"
        assert told["IMCNET_REDIS_PASSWORD_FILE"] == "/run/secrets/redis-password"


def test_base_images_are_pinned_by_digest_and_can_be_exchanged() -> None:
    assert re.search(rf"^ARG PYTHON_IMAGE=python:{PINNED}$", dockerfile(), re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", dockerfile(), re.MULTILINE)[0] == "${PYTHON_IMAGE}"
    for name in COMPOSE_FILES:
        services = compose(name)["services"]
        assert services["api"]["build"]["args"] == ["PYTHON_IMAGE"]
        assert re.fullmatch(rf"\$\{{REDIS_IMAGE:-redis:{PINNED}\}}", services["redis"]["image"])


def test_images_hold_no_more_than_the_installed_packages_and_a_compiler_for_the_worker() -> None:
    for name in ("api", "worker"):
        copies = [line for line in stages()[name] if line.startswith(("COPY", "ADD"))]
        assert len(copies) == 1
        assert copies[0].endswith("/opt/imcnet /opt/imcnet")
    assert not [line for line in stages()["api"] if line.startswith("RUN")]
    commands = re.findall(r"^RUN (.*)", re.sub(r"\\\n\s*", "", "\n".join(stages()["worker"])), re.MULTILINE)
    assert [command.strip() for line in commands for command in line.split("&&")] == [
        "apt-get update",
        "apt-get install --yes --no-install-recommends gcc libc6-dev",
        "rm -rf /var/lib/apt/lists/*",
        "install -d -m 700 -o imcnet -g imcnet /var/cache/triton",
    ]


def test_code_that_is_made_while_the_worker_runs_lies_where_no_other_service_writes() -> None:
    text = "\n".join(stages()["worker"])
    (folder,) = re.findall(r"TRITON_CACHE_DIR=(\S+)", text)
    for name in COMPOSE_FILES:
        for service in compose(name)["services"].values():
            places = [volume.removesuffix(":ro").split(":")[-1] for volume in service["volumes"]]
            assert not [place for place in places if folder.startswith(place)]
            assert not [key for key in service.get("environment", {}) if key.startswith("TRITON")]
