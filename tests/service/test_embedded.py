import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from redis import Redis

from service.embedded import EmbeddedRedis, find_redis_server, url_of_running
from service.errors import Misconfigured
from service.settings import PRIVATE_REDIS, SharedSettings
from tests.waiting import wait_until_gone

pytestmark = pytest.mark.processes

OWNER = """
import sys, time
from pathlib import Path
from service.embedded import EmbeddedRedis
with EmbeddedRedis(Path(sys.argv[1])) as server:
    print(server.url, flush=True)
    time.sleep(600)
"""


def client(server: EmbeddedRedis) -> "Redis":
    return Redis.from_url(server.url, decode_responses=True)


def test_it_answers_on_its_url(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server, client(server) as redis:
        assert redis.ping()
        assert server.answers()


def test_what_it_holds_survives_a_restart(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server, client(server) as redis:
        redis.set("queued", "job")
    with EmbeddedRedis(tmp_path) as server, client(server) as redis:
        assert redis.get("queued") == "job"


def test_its_socket_lies_in_a_folder_that_nobody_else_may_enter(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        folder = Path(server.url.removeprefix("unix://")).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()


def test_it_does_not_listen_on_the_network(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server, client(server) as redis:
        process = psutil.Process(int(redis.info("server")["process_id"]))
        assert process.net_connections(kind="inet") == []


def test_whoever_knows_the_directory_finds_it_while_it_runs(tmp_path: Path) -> None:
    assert url_of_running(tmp_path) is None
    with EmbeddedRedis(tmp_path) as server:
        assert url_of_running(tmp_path) == server.url
        with pytest.raises(Misconfigured, match="in use"):
            EmbeddedRedis(tmp_path)
        assert url_of_running(tmp_path) == server.url
    assert url_of_running(tmp_path) is None


def test_commands_without_a_redis_of_their_own_use_that_of_the_data_directory(tmp_path: Path) -> None:
    settings = SharedSettings(data_dir=tmp_path)
    with pytest.raises(Misconfigured, match="No Redis is configured"):
        settings.require_redis_url()
    with EmbeddedRedis(tmp_path / PRIVATE_REDIS) as server:
        assert settings.require_redis_url() == server.url
    configured = SharedSettings(data_dir=tmp_path, IMCNET_REDIS_URL="redis://elsewhere")
    assert configured.require_redis_url() == "redis://elsewhere"


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path), pytest.raises(Misconfigured, match="in use"):
        EmbeddedRedis(tmp_path)


def test_a_socket_path_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(Misconfigured, match="TMPDIR"):
        EmbeddedRedis(tmp_path / "redis")


def test_a_server_that_cannot_start_says_where_its_log_is(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_bytes(b"\x00 this is no append-only file")
    (tmp_path / "appendonlydir").write_bytes(b"")  # where newer servers keep it
    server = EmbeddedRedis(tmp_path)
    with pytest.raises(Misconfigured, match=r"redis\.log"):
        server.start()


def test_nothing_is_left_once_it_is_stopped(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server, client(server) as redis:
        process = psutil.Process(int(redis.info("server")["process_id"]))
    wait_until_gone([process])
    server.stop()  # may be repeated


def test_it_dies_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        with Redis.from_url(owner.stdout.readline().strip()) as redis:
            process = psutil.Process(int(redis.info("server")["process_id"]))
        owner.kill()
    wait_until_gone([process])


def test_an_installed_server_comes_before_the_bundled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "redis-server"
    installed.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == str(installed)
