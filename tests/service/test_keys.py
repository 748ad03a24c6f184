import base64
import stat
import time
from pathlib import Path

import pytest

from service.errors import KeyUnknown, QuotaExceeded, StorageUnavailable
from service.keys import ApiKey, KeyLimits, KeyRing, KeyStore
from service.ownership import Ownership, Usage
from service.quota import check_quota
from service.settings import ServiceSettings
from service.storage import JobStorage, new_job_id


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys")


def test_a_key_opens_until_it_is_revoked(store: KeyStore) -> None:
    key, text = store.create("editors", KeyLimits())
    found = KeyRing(store).find(text)
    assert found is not None
    assert (found.id, found.name) == (key.id, "editors")
    store.revoke(key.id)
    assert KeyRing(store).find(text) is None
    assert store.read()[key.id].revoked_at is not None


def test_nothing_but_the_whole_key_opens(store: KeyStore) -> None:
    key, text = store.create("one", KeyLimits())
    _, other = store.create("two", KeyLimits())
    ring = KeyRing(store)
    mixed = f"imc_{key.id}_{other.rpartition('_')[2]}"
    for presented in (
        "",
        key.id,
        text[:-1],
        text + "x",
        text.upper(),
        mixed,
        f"imc_{'0' * 12}_{text[-43:]}",
        "é" * 60,
    ):
        assert ring.find(presented) is None, presented


def test_what_is_stored_opens_nothing_and_is_its_owners_alone(store: KeyStore, tmp_path: Path) -> None:
    key, text = store.create("one", KeyLimits())
    path = tmp_path / "keys" / f"{key.id}.json"
    assert text.rpartition("_")[2] not in path.read_text()
    assert KeyRing(store).find(f"imc_{key.id}_{key.sha256[:43]}") is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_ring_learns_of_changes_within_seconds(store: KeyStore) -> None:
    ring = KeyRing(store)
    assert not ring.closed
    key, text = store.create("one", KeyLimits())
    time.sleep(1.1)
    assert ring.closed
    assert ring.find(text) is not None
    store.revoke(key.id)
    time.sleep(1.1)
    assert ring.find(text) is None


def test_after_the_last_key_is_revoked_the_door_stays_closed(store: KeyStore) -> None:
    key, _ = store.create("one", KeyLimits())
    store.revoke(key.id)
    assert KeyRing(store).closed


def test_the_door_stays_closed_when_the_keys_are_gone(
    store: KeyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, text = store.create("one", KeyLimits())
    ring = KeyRing(store)
    assert ring.lives(key)
    (tmp_path / "keys").rename(tmp_path / "elsewhere")
    monkeypatch.setattr("service.keys._LOOK_AGAIN_SECONDS", 0)
    assert ring.closed
    assert ring.find(text) is None
    assert not ring.lives(key)


def test_keys_that_cannot_be_read_are_not_taken_for_none(store: KeyStore, tmp_path: Path) -> None:
    (tmp_path / "keys").touch()
    with pytest.raises(StorageUnavailable):
        _ = KeyRing(store).closed


def test_a_damaged_key_opens_nothing_and_leaves_the_others_alone(
    store: KeyStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged, _ = store.create("damaged", KeyLimits())
    (tmp_path / "keys" / f"{damaged.id}.json").write_bytes(b"")
    assert KeyRing(store).closed
    assert f"{damaged.id}.json is damaged" in caplog.text
    key, text = store.create("whole", KeyLimits())
    assert KeyRing(store).find(text) == key


def test_only_a_key_that_there_is_can_be_revoked(store: KeyStore) -> None:
    with pytest.raises(KeyUnknown, match="no key 000000000000"):
        store.revoke("000000000000")


GIVEN = ApiKey(id="0" * 12, name="k", sha256="", created_at="2026-01-01T00:00:00Z")  # type: ignore[arg-type]
NOTHING = Usage(active_jobs=0, queued_bytes=0, stored_bytes=0)


@pytest.mark.parametrize(
    ("limits", "usage", "complaint"),
    [
        ({"active_jobs": 2}, {"active_jobs": 2}, "may have 2 jobs that have not ended"),
        ({"queued_bytes": 15}, {"queued_bytes": 6}, "may have 15 bytes of uploads"),
        ({"stored_bytes": 15}, {"stored_bytes": 6}, "may have 15 bytes of stored jobs"),
    ],
)
def test_a_quota_is_used_up_to_the_last_job_and_byte(
    limits: dict[str, int], usage: dict[str, int], complaint: str
) -> None:
    settings = ServiceSettings.model_validate({f"key_{name}": value for name, value in limits.items()})
    own = GIVEN.model_copy(update={"limits": KeyLimits(**limits)})
    full = Usage(**{**vars(NOTHING), **usage})
    just_fits = Usage(**{**vars(NOTHING), **{name: value - 1 for name, value in usage.items()}})
    for key, given in ((GIVEN, settings), (own, ServiceSettings())):
        assert check_quota(key, just_fits, given, upload_bytes=10) >= 10
        with pytest.raises(QuotaExceeded, match=complaint):
            check_quota(key, full, given, upload_bytes=10)


def test_a_job_is_its_owners_alone(tmp_path: Path) -> None:
    storage = JobStorage(tmp_path)
    storage.prepare()
    owners, job_id = Ownership(storage), new_job_id()
    with owners.locked("a"):
        owners.enter("a", job_id)
    assert owners.owns("a", job_id)
    assert owners.jobs("a") == {job_id}
    assert not owners.owns("b", job_id)
    assert not owners.owns("b", f"../a/{job_id}")
    assert not owners.owns("a", ".lock")
    owners.leave("a", job_id)
    assert not owners.owns("a", job_id)


def test_an_upload_under_way_counts_until_it_or_its_process_ends(tmp_path: Path) -> None:
    storage = JobStorage(tmp_path)
    storage.prepare()
    owners = Ownership(storage)
    with owners.locked("a"):
        first, second = owners.reserve("a", 5), owners.reserve("a", 7)
        assert owners.uploads("a") == Usage(active_jobs=2, queued_bytes=12, stored_bytes=12)
        assert owners.uploads("b") == owners.usage("a") == NOTHING
        first.release()
        first.release()
        assert owners.uploads("a") == Usage(active_jobs=1, queued_bytes=7, stored_bytes=7)
        (left_behind,) = (tmp_path / "owners" / "a").glob("*.upload")
        left_behind.rename(left_behind.with_name("00000000-0000-4000-8000-000000000000.upload"))
        second.release()  # closes what it has locked, as a death would
        assert owners.uploads("a") == NOTHING
    assert not list((tmp_path / "owners" / "a").glob("*.upload"))


def test_a_job_that_never_came_to_be_is_forgotten_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = JobStorage(tmp_path)
    storage.prepare()
    owners, job_id = Ownership(storage), new_job_id()
    with owners.locked("a"):
        owners.enter("a", job_id)
    owners.sweep()
    assert owners.owns("a", job_id)  # it may be about to be accepted
    later = time.time() + 7200
    monkeypatch.setattr(time, "time", lambda: later)
    owners.sweep()
    assert not owners.owns("a", job_id)


def test_basic_authentication_carries_the_key_as_its_password() -> None:
    from service.access import _presented

    packed = base64.b64encode(b"anyone:imc_x").decode()
    assert _presented(f"Basic {packed}") == "imc_x"
    assert _presented("bearer imc_x") == "imc_x"
    assert [
        _presented(each) for each in ("", "Basic", "Basic %%%", "Digest imc_x", "Basic gICA", "Basic ÿÿ")
    ] == [""] * 6
