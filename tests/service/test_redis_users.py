import hashlib
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.broker import connect
from service.errors import Misconfigured
from service.redis_users import create_redis_users
from service.settings import SharedSettings

USERS = ("api", "worker")


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_users_are_made_once(tmp_path: Path) -> None:
    assert create_redis_users(tmp_path)
    made = files(tmp_path)
    assert sorted(made) == ["api/redis-password", "redis/users.acl", "worker/redis-password"]
    assert not create_redis_users(tmp_path)
    assert files(tmp_path) == made


def test_a_password_is_for_its_user_alone_and_redis_gets_its_hash(tmp_path: Path) -> None:
    create_redis_users(tmp_path)
    passwords = [(tmp_path / user / "redis-password").read_text() for user in USERS]
    assert len({*passwords}) == 2
    assert all(len(password) == 43 for password in passwords)
    assert {(tmp_path / user / "redis-password").stat().st_mode & 0o777 for user in USERS} == {0o400}
    rules = (tmp_path / "redis" / "users.acl").read_text()
    for password in passwords:
        assert password not in rules
        assert hashlib.sha256(password.encode()).hexdigest() in rules


def test_what_was_interrupted_is_finished(tmp_path: Path) -> None:
    create_redis_users(tmp_path)
    made = files(tmp_path)
    (tmp_path / "redis" / "users.acl").rename(tmp_path / "redis" / "users.unfinished")
    assert create_redis_users(tmp_path)
    assert files(tmp_path) == made


def settings(url: str | None, password_file: Path) -> SharedSettings:
    return SharedSettings.model_validate({"IMCNET_REDIS_URL": url, "redis_password_file": password_file})


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("redis://api@redis:6379/2", "redis"),
        ("redis://api:another@redis:6379/2", "redis"),
        ("rediss://api@[::1]:6379/2?ssl_ca_certs=/ca.pem", "::1"),
    ],
)
def test_the_password_in_the_file_is_that_of_the_urls_user(tmp_path: Path, url: str, host: str) -> None:
    (tmp_path / "password").write_text("a/b:c@d?e#f%20 ä\n")
    url = settings(url, tmp_path / "password").require_redis_url()
    told = connect(url, timeout_seconds=1).connection_pool.connection_kwargs
    assert (told["host"], told["username"], told["password"]) == (host, "api", "a/b:c@d?e#f%20 ä")
    assert (told["port"], told["db"]) == (6379, 2)


def test_a_password_for_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="IMCNET_REDIS_PASSWORD_FILE needs an IMCNET_REDIS_URL"):
        settings(None, tmp_path / "password")


def test_a_password_that_cannot_be_read_is_not_left_out(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="cannot be read"):
        settings("redis://api@redis", tmp_path / "password").require_redis_url()
