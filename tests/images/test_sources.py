"""What an administrator allows, and what a user says of a store."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ALIGNMENT, Daemon
from objectstores import sources_fixture as _sources  # noqa: F401 - a fixture

from libmshare import ImageError, Region
from libmshare.images import sources as own
from libmshare.images.sources import settings
from libmshare.images.store import Url

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="what is allowed is said by root")
Sources = Callable[[str], Path]


@pytest.fixture(name="allowed")
def allowed_fixture(directory: Path, monkeypatch: pytest.MonkeyPatch, sources: Sources) -> Path:
    """Where what is allowed is said; the user has no settings."""
    place = directory / "sources.d"
    place.mkdir()
    monkeypatch.setattr(own, "ALLOWED", place)
    sources("source = []\n")
    return place


def refused(url: str) -> str:
    with pytest.raises(ImageError) as caught:
        settings(Url(url))
    assert caught.value.errno == errno.EACCES
    return str(caught.value)


def test_everything_is_allowed_if_nothing_is_said(allowed: Path) -> None:
    assert settings(Url("s3://any/r.img")) == {}
    (allowed / "README").write_text("no configuration")
    assert settings(Url("s3://any/r.img")) == {}
    allowed.joinpath("README").unlink()
    allowed.rmdir()
    assert settings(Url("file:///any/r.img")) == {}


def test_only_what_is_said_is_allowed(allowed: Path) -> None:
    """By the prefix, which ends with a slash: nothing that only begins alike."""
    (allowed / "a.toml").write_text('[[allow]]\nprefix = "s3://indexes/public/"\n')
    (allowed / "b.toml").write_text('[[allow]]\nprefix = "file:///srv/images/"\n')
    for url in ("s3://indexes/public/r.img", "s3://indexes/public/a/r.img", "file:///srv/images/r"):
        assert settings(Url(url)) == {}
    for url in (
        "s3://indexes/r.img",
        "s3://indexes/publicity/r.img",
        "s3://indexes-public/r.img",
        "gs://indexes/public/r.img",
        "file:///srv/image/r",
        "file:///srv/images/../secret/r",
        "file:///srv/images/%2e%2e/secret/r",
        "file:///srv/images/..%2fsecret/r",
    ):
        assert str(allowed) in refused(url)
    (allowed / "a.toml").write_text("allow = []\n")
    (allowed / "b.toml").unlink()
    refused("s3://indexes/public/r.img")


def test_an_endpoint_is_the_one_that_is_allowed(
    allowed: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials stay the user's; neither their settings nor the environment leads elsewhere."""
    (allowed / "a.toml").write_text(
        '[[allow]]\nprefix = "s3://indexes/"\nendpoint = "https://good.example"\n'
        '[[allow]]\nprefix = "s3://any/"\n'
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://bad.example")
    assert settings(Url("s3://indexes/r.img")) == {"endpoint": "https://good.example"}
    sources('[[source]]\nprefix = "s3://"\naccess_key_id = "K"\n')
    assert settings(Url("s3://indexes/r.img")) == {
        "endpoint": "https://good.example",
        "access_key_id": "K",
    }
    sources('[[source]]\nprefix = "s3://"\nendpoint = "https://bad.example"\n')
    assert "this endpoint" in refused("s3://indexes/r.img")
    assert settings(Url("s3://any/r.img")) == {"endpoint": "https://bad.example"}
    sources('[[source]]\nprefix = "s3://"\nendpoint = "https://good.example"\n')
    assert settings(Url("s3://indexes/r.img")) == {"endpoint": "https://good.example"}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("[[allow]", errno.EINVAL),
        ("", errno.EINVAL),
        ('[[allow]]\nprefix = "s3://indexes"\n', errno.EINVAL),
        ('[[allow]]\nprefix = "s3://indexes/"\nsecret_access_key = "x"\n', errno.EINVAL),
        ("[[allow]]\nprefix = 1\n", errno.EINVAL),
        ('[[source]]\nprefix = "s3://indexes/"\n', errno.EINVAL),
    ],
)
def test_what_is_wrong_allows_nothing(allowed: Path, content: str, code: int) -> None:
    (allowed / "a.toml").write_text('[[allow]]\nprefix = "s3://indexes/"\n')
    (allowed / "b.toml").write_text(content)
    with pytest.raises(ImageError) as caught:
        settings(Url("s3://indexes/r.img"))
    assert caught.value.errno == code and "b.toml" in str(caught.value)


def test_only_root_says_what_is_allowed(allowed: Path) -> None:
    file = allowed / "a.toml"
    file.write_text('[[allow]]\nprefix = "s3://indexes/"\n')
    for mode in (0o664, 0o646):
        file.chmod(mode)
        assert "only root" in refused("s3://indexes/r.img")
    file.chmod(0o644)
    os.chown(file, 65530, 65530)
    assert "only root" in refused("s3://indexes/r.img")


@pytest.mark.shm_only
def test_pull_and_push_go_by_it(
    make_daemon: Callable[..., Daemon],
    allowed: Path,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}").start()
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    good, bad = directory / "good", directory / "bad"
    (allowed / "a.toml").write_text(f'[[allow]]\nprefix = "file://{good}/"\n')
    with Region.create("r", ALIGNMENT) as region:
        region[5] = 5
        region.push(f"file://{good}/r.img")
        with pytest.raises(ImageError) as caught:
            region.push(f"file://{bad}/r.img")
        assert caught.value.errno == errno.EACCES and not bad.exists()
        region.unlink()
    good.rename(bad)
    with pytest.raises(ImageError, match="does not allow"):
        Region.pull(f"file://{bad}/r.img")
    bad.rename(good)
    with Region.pull(f"file://{good}/r.img") as region:
        assert region[5] == 5
        region.unlink()
