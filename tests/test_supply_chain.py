"""What the images download is locked: each package by version and hash, watched over by strict tools."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY

LOCKS = ("api", "worker", "build")
EXTRAS = {"api": (), "worker": ("worker", "cpu"), "build": ()}


def lock_text(name: str) -> str:
    return (REPOSITORY / "requirements" / f"{name}.txt").read_text()


def packages(name: str) -> dict[str, str]:
    """The version of each package in a lock. Raises: AssertionError: One has no version, or no hash."""
    found = {}
    text = re.sub(r"^#.*\n", "", lock_text(name), flags=re.MULTILINE)
    for entry in re.sub(r"\\\n\s*", " ", text).splitlines():
        requirement, *hashes = entry.split(" --hash=")
        match = re.fullmatch(r"(?P<name>[a-z0-9-]+)==(?P<version>[\w.+]+)( ; .+)?", requirement.strip())
        assert match, entry
        assert hashes, entry
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", hash_.strip()) for hash_ in hashes), entry
        found[match["name"]] = match["version"]
    return found


def wanted(name: str) -> list[Requirement]:
    """What a lock has to hold: by pyproject.toml."""
    document = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    if name == "build":
        return [Requirement(line) for line in document["build-system"]["requires"]]
    project = document["project"]
    lines = [*project["dependencies"]]
    for extra in EXTRAS[name]:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_what_is_asked_for_in_versions_that_will_do(name: str) -> None:
    locked = packages(name)
    for requirement in wanted(name):
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: run `make lock`"


def test_both_images_hold_the_same_versions() -> None:
    api, worker = packages("api"), packages("worker")
    assert {name: worker[name] for name in api} == api


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_place_to_download_from(name: str) -> None:
    assert not re.search(r"://|--(extra-)?index-url|--find-links|--trusted-host|(?<!\w)/\w", lock_text(name))


def test_images_install_nothing_but_what_is_locked_and_our_own_package() -> None:
    dockerfile = re.sub(r"\\\n\s*", " ", (REPOSITORY / "docker" / "Dockerfile").read_text())
    commands = re.findall(r"pip (?:install|wheel|download) [^&\n]*", dockerfile)
    locked = [command for command in commands if "--require-hashes" in command]
    ours = [command for command in commands if command not in locked]
    assert len(locked) == len(LOCKS)
    for command in ours:
        assert "--no-deps" in command
        assert "--no-build-isolation" in command or "--no-index" in command
    assert not re.search(r"curl|wget|apt-get|git clone|^ADD", dockerfile, re.MULTILINE)


def test_an_audit_that_could_not_look_fails() -> None:
    makefile = re.sub(r"\\\n\s*", " ", (REPOSITORY / "Makefile").read_text())
    (audit,) = re.findall(r"^\t\S*pip-audit .*", makefile, re.MULTILINE)
    assert "--strict" in audit.split()
    assert "--require-hashes" in audit.split()
