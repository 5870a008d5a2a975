"""What is installed: versions and hashes in requirements/, and who has to use them."""

from __future__ import annotations

import re
import shlex
import tomllib
from functools import cache
from typing import Any

import pytest
from conftest import TESTS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

pytestmark = pytest.mark.shm_only

PROJECT = TESTS.parent
LOCKS = ("build", "runtime", "web", "dev", "docs", "client", "lock")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")


@cache
def locked(name: str) -> dict[str, tuple[Requirement, int]]:
    """The requirements of a lock, by name, and how many hashes each has."""
    text = (PROJECT / "requirements" / f"{name}.txt").read_text()
    found: dict[str, tuple[Requirement, int]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = line.partition(" #")[0].strip()
        if not words or words.startswith("#"):
            continue
        hashes = HASH.findall(words)
        # Whatever is no requirement, such as an option, raises.
        requirement = Requirement(HASH.sub("", words))
        key = canonicalize_name(requirement.name)
        assert key not in found, "one version for all Pythons and processors"
        found[key] = (requirement, len(hashes))
    return found


def version(requirement: Requirement) -> Version:
    (specifier,) = requirement.specifier
    return Version(specifier.version)


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text())


def declared() -> list[tuple[str, str]]:
    """The project's dependencies, each with the lock that it has to be in."""
    document = pyproject()
    pairs = [("build", text) for text in document["build-system"]["requires"]]
    assert document["project"]["dependencies"] == []  # a client needs nothing
    for extra, texts in document["project"]["optional-dependencies"].items():
        lock = {"daemon": "runtime", "web": "web"}.get(extra, "dev")
        pairs += [(lock, text) for text in texts]
    for group, texts in document["dependency-groups"].items():
        pairs += [(group, text) for text in texts if isinstance(text, str)]
    return pairs


@pytest.mark.parametrize("name", LOCKS)
def test_everything_has_one_version_and_its_hashes(name: str) -> None:
    assert locked(name)
    for requirement, hashes in locked(name).values():
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        assert not specifier.version.endswith("*")
        assert requirement.url is None
        assert hashes > 0


def test_every_file_is_looked_at() -> None:
    assert {path.name for path in (PROJECT / "requirements").iterdir()} == {
        f"{name}.txt" for name in LOCKS
    }


@pytest.mark.parametrize(("name", "text"), declared())
def test_what_is_declared_is_locked(name: str, text: str) -> None:
    wanted = Requirement(text)
    requirement, _ = locked(name)[canonicalize_name(wanted.name)]
    assert wanted.specifier.contains(version(requirement), prereleases=False)


def test_what_must_not_be_chosen_is_not() -> None:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    limits = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    assert "typer" in {limit.name for limit in limits}
    for limit in limits:
        for name in LOCKS:
            if (found := locked(name).get(canonicalize_name(limit.name))) is not None:
                assert limit.specifier.contains(version(found[0]))


def test_the_files_can_be_installed_together() -> None:
    versions: dict[str, set[Version]] = {}
    for name in LOCKS:
        for key, (requirement, _) in locked(name).items():
            versions.setdefault(key, set()).add(version(requirement))
    assert {key for key, several in versions.items() if len(several) > 1} == set()


BACKPORTS = ("importlib-metadata", "lazy-importer", "zipp")
"""What is in the standard library later, and what that needs."""


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", LOCKS)
def test_it_is_for_all_that_is_supported(name: str, machine: str, python: str) -> None:
    """The same on each: no marker takes a dependency away, but what a later Python has itself."""

    def applies(requirement: Requirement, python: str) -> bool:
        environment = {"platform_machine": machine, "python_version": python}
        environment["python_full_version"] = f"{python}.0"
        return requirement.marker is None or requirement.marker.evaluate(environment)

    for requirement, _ in locked(name).values():
        assert applies(requirement, python) or (
            requirement.name in BACKPORTS and applies(requirement, PYTHONS[0])
        )


def test_the_pythons_are_those_that_the_project_names() -> None:
    prefix = "Programming Language :: Python :: 3."
    named = [
        text.rpartition(" ")[2]
        for text in pyproject()["project"]["classifiers"]
        if text.startswith(prefix)
    ]
    assert tuple(named) == PYTHONS


def installations(text: str) -> list[list[str]]:
    """The words after `pip install`, wherever it says that."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        command = re.search(r'\bpip"? (?:--python \S+ )?install (.*)', line)
        if command:
            found.append(shlex.split(command[1], comments=True))
    return found


def is_hashed(words: list[str]) -> bool:
    """Whether all that this installs is either our own or has its hash checked."""
    if "--require-hashes" in words:
        plain = [word for word in words if not word.startswith("-")]
        return all(re.fullmatch(r"requirements/(build|runtime|lock)\.txt", word) for word in plain)
    # A directory has no hash; so nothing may be fetched for it, nor by its build.
    return words[-1] == "." and {"--no-index", "--no-deps", "--no-build-isolation"} < set(words)


def test_root_installs_nothing_without_its_hash() -> None:
    page = (PROJECT / "docs" / "systemd.md").read_text()
    section = page.partition("## Installing")[2].partition("\n## ")[0]
    commands = installations(section)
    assert all(is_hashed(words) for words in commands)
    files = [word for words in commands for word in words if word.endswith(".txt")]
    assert files == ["requirements/build.txt", "requirements/runtime.txt"]
    assert page.count("pip install") == len(commands)


def test_nor_does_make() -> None:
    commands = []
    for file in (PROJECT / "Makefile", *sorted((PROJECT / "scripts").iterdir())):
        commands += installations(file.read_text())
    assert len(commands) >= 4
    for words in commands:
        assert "--require-hashes" in words or is_hashed(words)


def test_no_file_says_where_to_get_it() -> None:
    """That is the installer's decision; hashes hold whoever delivers."""
    for name in LOCKS:
        text = (PROJECT / "requirements" / f"{name}.txt").read_text()
        assert "://" not in text
        assert "--index" not in text
