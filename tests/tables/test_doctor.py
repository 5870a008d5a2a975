"""`mshare doctor` on page tables of programs that are no clients of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from commanding import mshare

from libmshare.cli import collapsible
from msharetables import proc

pytestmark = pytest.mark.shm_only


@pytest.mark.parametrize(
    ("own", "sized", "good", "says"),
    [
        ("always within_size advise [never] deny force", "[inherit]", True, "mshare run"),
        ("always within_size [advise] never deny force", "[inherit]", True, "mshare collapse"),
        ("always [within_size] advise never deny force", "[inherit]", True, "sparse"),
        ("[always] within_size advise never deny force", "[inherit]", True, "small objects"),
        ("always within_size advise never [deny] force", "[inherit]", False, "switched off"),
        ("always within_size advise [never] deny force", "[advise] never", False, "EINVAL"),
        ("always within_size advise [never] deny force", None, True, "mshare run"),
        (None, None, False, "nothing to free"),
    ],
)
def test_settings(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str | None,
    sized: str | None,
    good: bool,
    says: str,
) -> None:
    monkeypatch.setattr(collapsible, "THP", tmp_path)
    (tmp_path / "hugepages-2048kB").mkdir()
    for name, text in (("shmem_enabled", own), ("hugepages-2048kB/shmem_enabled", sized)):
        if text is not None:
            (tmp_path / name).write_text(text)
    found = list(collapsible.lines())[2:]
    assert all(line.good for line in found) == good
    assert says in " ".join(line.advice for line in found)


def test_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    text = mshare("doctor").stdout
    assert "telling page tables: PAGEMAP_SCAN" in text
    assert "huge_pages=on" in text
    both = 1 << 19 | 1 << 23
    for mask, found in (
        (both, "can be shown and freed"),
        (1 << 19, "without CAP_SYS_NICE"),
        (0, "without CAP_SYS_PTRACE and CAP_SYS_NICE"),
    ):
        monkeypatch.setattr(proc, "read", lambda *_, mask=mask: b"CapEff:\t%016x\n" % mask)
        assert list(collapsible.lines())[1].found == found
