"""What libmshare.ray sends, without a cluster: where it arrives it is the region."""

from __future__ import annotations

import pickle
import shutil
import sys
from pathlib import Path

import pytest
from conftest import BASE, Daemon
from machines import SIZE, named, on
from machines import both_fixture as _both  # noqa: F401 - a fixture
from machines import here_fixture as _here  # noqa: F401 - a fixture
from machines import there_fixture as _there  # noqa: F401 - a fixture

from libmshare import ImageError, MshareError, Region
from libmshare.ray import _Image, _Sent, everywhere

pytestmark = pytest.mark.shm_only


def pushed(directory: Path, byte: int) -> _Image:
    """The image of a region that has that byte everywhere it has any."""
    url = f"file://{directory}/store/wiki.img"
    with Region.create("wiki", SIZE, start=BASE) as region:
        region[:8] = bytes([byte]) * 8
        digest = region.push(url).digest
        region.unlink()
    return _Image(url, "wiki", None, digest, None, 0o600, True, {})


def test_it_is_the_region_wherever_it_arrives(here: Daemon, there: Daemon, directory: Path) -> None:
    sent = pickle.dumps(_Sent(pushed(directory, 7)))
    with on(there), pickle.loads(sent) as region:
        assert isinstance(region, Region)
        assert (region.name, region.start, bytes(region[:8])) == ("wiki", BASE, b"\7" * 8)
        assert named(there) == ["wiki"] and named(here) == []
        sent_on = pickle.dumps(region)
        shutil.move(directory / "store", directory / "away")
        for each in (sent, sent_on):
            with pickle.loads(each) as again:  # is here, and needs no store
                assert again == region
        region.unlink()
    with pytest.raises(ImageError):
        pickle.loads(sent_on)
    shutil.move(directory / "away", directory / "store")
    with pickle.loads(sent_on) as region:  # on a machine that has not seen it
        assert named(here) == ["wiki"] and region[7] == 7
        region.unlink()


def test_it_is_that_image_and_no_later_one(here: Daemon, there: Daemon, directory: Path) -> None:
    sent = pickle.dumps(_Sent(pushed(directory, 7)))
    pushed(directory, 8)
    with on(there), pytest.raises(ImageError, match="the image there is"):
        pickle.loads(sent)
    assert named(there) == []


def test_what_has_no_name_is_found_by_what_was_sent_on(
    here: Daemon, there: Daemon, directory: Path
) -> None:
    image = pushed(directory, 7)._replace(kept=False)
    with on(there), pickle.loads(pickle.dumps(_Sent(image))) as region:
        region.unlink()
        shutil.rmtree(directory / "store")
        with pickle.loads(pickle.dumps(region)) as same:
            assert same == region and named(there) == []


def test_who_has_no_cluster_is_told_what_to_do() -> None:
    with pytest.raises(MshareError, match=r"call ray.init\(\)"):
        everywhere("file:///x.img")


def test_who_has_no_ray_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MshareError, match=r"pip install 'msharefs\[ray\]'"):
        everywhere("file:///x.img")


def test_who_uses_it_where_it_is_not_is_told() -> None:
    sent = _Sent(_Image("file:///x.img", "x", None, "", None, 0o600, True, {}))
    with pytest.raises(AttributeError, match="in the task that it is sent to"):
        _ = sent.buf
