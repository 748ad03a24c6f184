"""API keys: who may use the service, and how much of it.

::

    keys/<id>.json    a key: its name, the SHA-256 of its secret, its limits; readable by its owner alone

A key reads ``imc_<id>_<secret>``. The secret has 256 random bits, so one round of SHA-256 is enough: there is
nothing to guess that would be worth a slow hash (OWASP, Password Storage: only for what people choose).
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from pydantic import AwareDatetime, BaseModel, ConfigDict, PositiveInt, ValidationError

from service.durable import disk_errors_translated, sync, write_synced
from service.errors import KeyUnknown
from service.jobs import read_stored, utc_now

logger = logging.getLogger(__name__)

_KEY = re.compile(r"imc_(?P<id>[0-9a-f]{12})_(?P<secret>[0-9A-Za-z_-]{43})")
_LOOK_AGAIN_SECONDS = 1.0


class KeyLimits(BaseModel):
    """What a key may use; None: as the settings have it for all keys."""

    model_config = ConfigDict(frozen=True)

    requests_per_minute: PositiveInt | None = None
    active_jobs: PositiveInt | None = None
    queued_bytes: PositiveInt | None = None
    stored_bytes: PositiveInt | None = None


class ApiKey(BaseModel):
    """A key without its secret, of which only the hash is kept."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    sha256: str
    created_at: AwareDatetime
    revoked_at: AwareDatetime | None = None
    limits: KeyLimits = KeyLimits()


class KeyStore:
    """The keys in one directory, which the command line writes and all API processes read."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def create(self, name: str, limits: KeyLimits) -> tuple[ApiKey, str]:
        """Returns: The key, and what its client has to send: it cannot be told a second time."""
        secret = secrets.token_urlsafe(32)
        key = ApiKey(
            id=secrets.token_hex(6), name=name, sha256=_hash(secret), created_at=utc_now(), limits=limits
        )
        self._write(key)
        return key, f"imc_{key.id}_{secret}"

    def revoke(self, key_id: str) -> ApiKey:
        """Let a key open nothing any more; it stays in the list.

        Raises:
            KeyUnknown: There is no such key.
        """
        keys = self.read()
        if key_id not in keys:
            raise KeyUnknown(f"There is no key {key_id}.")
        key = keys[key_id]
        if key.revoked_at is None:
            key = key.model_copy(update={"revoked_at": utc_now()})
            self._write(key)
        return key

    def exists(self) -> bool:
        """Whether there is any key, were it revoked or damaged. Raises: StorageUnavailable."""
        return bool(self._paths())

    def read(self) -> Mapping[str, ApiKey]:
        """All keys by their ids, the revoked ones too; without those whose files are damaged.

        Raises:
            StorageUnavailable: They cannot be read, which does not mean that there are none.
        """
        keys = []
        for path in self._paths():
            try:
                with disk_errors_translated():
                    keys.append(read_stored(ApiKey, path))
            except ValidationError:
                logger.error("The API key in %s is damaged", path.name)
        return {key.id: key for key in sorted(keys, key=lambda key: key.created_at)}

    def _paths(self) -> list[Path]:
        # Not glob(), which says of a directory that it may not read that there is nothing in it.
        with disk_errors_translated(), suppress(FileNotFoundError):
            return [self._root / name for name in os.listdir(self._root) if name.endswith(".json")]
        return []

    def _write(self, key: ApiKey) -> None:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._root / f".{uuid4()}"
        try:
            write_synced(draft, key.model_dump_json().encode())
            draft.chmod(0o600)
            os.replace(draft, self._root / f"{key.id}.json")
            sync(self._root)
        finally:
            with suppress(FileNotFoundError):
                draft.unlink()


class KeyRing:
    """The keys as a process of the API knows them: at most a second old.

    All but ``stale`` raise StorageUnavailable where they cannot be read.
    """

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._read_at = -_LOOK_AGAIN_SECONDS
        self._keys: Mapping[str, ApiKey] = {}
        self._closed = False

    @property
    def stale(self) -> bool:
        """Whether the next look reads the files, which may block."""
        return time.monotonic() - self._read_at >= _LOOK_AGAIN_SECONDS

    @property
    def closed(self) -> bool:
        """Whether there are keys, or ever were, revoked ones included: then nobody gets in without one."""
        self._current()
        return self._closed

    def find(self, presented: str) -> ApiKey | None:
        """The living key that was presented, if it is one; an unknown id takes as long as a known one."""
        match = _KEY.fullmatch(presented)
        key = self._current().get(match["id"]) if match else None
        expected = key.sha256 if key else _hash("")
        equal = hmac.compare_digest(_hash(match["secret"] if match else presented), expected)
        return key if key and equal and key.revoked_at is None else None

    def lives(self, key: ApiKey) -> bool:
        """Whether a key that was found has not been revoked since."""
        known = self._current().get(key.id)
        return known is not None and known.revoked_at is None

    def _current(self) -> Mapping[str, ApiKey]:
        with self._lock:
            if self.stale:
                # Whatever becomes of the files (a volume may not be mounted), no door opens by itself.
                self._closed = self._closed or self._store.exists()
                self._keys = self._store.read()
                self._read_at = time.monotonic()
            return self._keys


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
