"""The users of a Redis that is reached over a network: what API and workers may do there, and no more.

::

    redis/users.acl          for Redis' ``aclfile``: rules, and the SHA-256 of each password
    api/redis-password       for IMCNET_REDIS_PASSWORD_FILE of the API, whose user is ``api``
    worker/redis-password    for that of the workers, whose user is ``worker``

Each folder is for one container alone. The rules are those of Redis 6.2 and later (ACL, redis.io).
"""

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path

from service.durable import sync, write_synced

# Data of our own and of RQ, by commands that read or write them. Not what takes the server down, empties it,
# configures it or lists its clients (@dangerous), and no scripts (@scripting), of which we have none.
_RULES = "on ~imcnet:* ~rq:* resetchannels +@read +@write +@connection +@transaction -@scripting -@dangerous"
_USERS = {
    # INFO and TIME are for `imcnet doctor`, and RQ asks for the version.
    "api": f"{_RULES} -@blocking +info +time",
    # RQ's worker names its connection, looks for its own address, and listens for commands.
    "worker": f"{_RULES} &rq:pubsub:* +@pubsub +info +time +client|setname +client|list",
}
# Nothing but what a health check needs.
_WITHOUT_A_PASSWORD = "user default on nopass resetkeys resetchannels -@all +ping"


def access_rules(passwords: Mapping[str, str]) -> str:
    """The content of an ACL file. Args: passwords: By user, ``api`` and ``worker``."""
    lines = [_WITHOUT_A_PASSWORD]
    for user, rules in _USERS.items():
        lines.append(f"user {user} {rules} #{hashlib.sha256(passwords[user].encode()).hexdigest()}")
    return "\n".join(lines) + "\n"


def create_redis_users(root: Path) -> bool:
    """Make passwords and the ACL file, unless they are there.

    Returns:
        Whether they had to be made.
    Raises:
        OSError: ``root`` cannot be written.
    """
    rules = root / "redis" / "users.acl"
    if rules.exists():
        return False
    rules.parent.mkdir(parents=True, exist_ok=True)
    passwords = {user: _password(root / user / "redis-password") for user in _USERS}
    # In one step: a Redis that finds half a file would not start, and nobody would write the other half.
    unfinished = rules.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    write_synced(unfinished, access_rules(passwords).encode())
    unfinished.rename(rules)
    sync(rules.parent)
    return True


def _password(path: Path) -> str:
    """The password at ``path``, made now if there is none: 256 random bits, for its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        unfinished.unlink(missing_ok=True)
        write_synced(unfinished, secrets.token_urlsafe(32).encode())
        unfinished.chmod(0o400)
        unfinished.rename(path)
        sync(path.parent)
    return path.read_text()
