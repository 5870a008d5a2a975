"""C and Python agree on every message; and no message can do more than be refused."""

from __future__ import annotations

import errno
import re
import struct
import subprocess
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest
from conftest import TESTS
from hypothesis import given
from hypothesis import strategies as st

from msharefsd.control import wire
from msharefsd.control.wire import Op, Reply, Request, RequestFlag
from msharefsd.errors import Refused

HEADER = TESTS.parent / "libmshare" / "core" / "wire.h"

# The fields of each struct, in the order of its format.
STRUCTS = {
    "request": (
        wire.REQUEST,
        "magic version op start size oflags flags object_count backing sequence userfaultfd",
    ),
    "object": (wire.OBJECT, "offset length file_offset prot flags"),
    "reply": (wire.REPLY, "magic version op error flags start size message"),
    "details": (wire.DETAILS, "length identity"),
}
CONSTANTS = {
    "MAGIC": wire.MAGIC,
    "VERSION": wire.VERSION,
    "MAX_OBJECTS": wire.MAX_OBJECTS,
    "NOTE": wire.NOTE,
}
ENUMS: tuple[type[IntEnum | IntFlag], ...] = (Op, RequestFlag, wire.BackingKind, wire.ReplyFlag)


def offsets(layout: struct.Struct, fields: str) -> dict[str, tuple[int, int]]:
    """Offset and size of each field of a packed struct."""
    found = {}
    order, kinds = layout.format[0], re.findall(r"\d*[a-zA-Z]", layout.format[1:])
    flat = [kind[-1] for kind in kinds for _ in range(int(kind[:-1] or 1)) if kind[-1] != "s"]
    flat += [kind for kind in kinds if kind[-1] == "s"]
    names = fields.split()
    assert len(names) == len(flat)
    at = 0
    for name, kind in zip(names, flat, strict=True):
        size = struct.calcsize(order + kind)
        found[name] = (at, size)
        at += size
    return found


def test_the_compiler_agrees(tmp_path: Path) -> None:
    lines = []
    for name, (_, fields) in STRUCTS.items():
        kind = f"struct mshare_wire_{name}"
        lines.append(f'printf("{name} %zu\\n", sizeof({kind}));')
        lines += [
            f'printf("{name}.{field} %zu %zu\\n", offsetof({kind}, {field}), '
            f"sizeof((({kind} *)0)->{field}));"
            for field in fields.split()
        ]
    names = [*CONSTANTS, *(member.name for enum in ENUMS for member in enum)]
    lines += [
        f'printf("{name} %llu\\n", (unsigned long long)MSHARE_WIRE_{name});' for name in names
    ]
    source = tmp_path / "wire.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "{HEADER}"\nint main(void) {{\n' + "\n".join(lines) + "\nreturn 0; }\n"
    )
    subprocess.run(["cc", "-Wall", "-Werror", "-o", tmp_path / "wire", source], check=True)
    said = subprocess.run([tmp_path / "wire"], capture_output=True, text=True, check=True).stdout
    expected = []
    for name, (layout, fields) in STRUCTS.items():
        expected.append(f"{name} {layout.size}")
        expected += [f"{name}.{f} {at} {size}" for f, (at, size) in offsets(layout, fields).items()]
    expected += [f"{name} {value}" for name, value in CONSTANTS.items()]
    expected += [f"{member.name} {int(member)}" for enum in ENUMS for member in enum]
    assert said.splitlines() == expected


def test_python_has_every_name_and_field_of_the_header() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    names = set(re.findall(r"\bMSHARE_WIRE_([A-Z_]+)\b", text)) - {"H"}
    assert names == {*CONSTANTS, *(member.name for enum in ENUMS for member in enum)}
    for name, (_, fields) in STRUCTS.items():
        body = re.search(rf"struct mshare_wire_{name} {{(.*?)}};", text, re.DOTALL)
        assert body is not None
        assert re.findall(r"(\w+)(?:\[\d+\])?;", body[1]) == fields.split()


def message(
    op: int = Op.DETACH,
    *,
    magic: int = wire.MAGIC,
    version: int = wire.VERSION,
    flags: int = 0,
    count: int = 0,
    backing: int = 0,
    tail: bytes = b"",
) -> bytes:
    return wire.REQUEST.pack(magic, version, op, 1, 2, 3, flags, count, backing, 4, 5) + tail


OBJECT = wire.OBJECT.pack(4096, 8192, 0, 3, 1)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", errno.EPROTO),
        (message()[:-1], errno.EPROTO),
        (message(magic=1), errno.EPROTO),
        (message(version=wire.VERSION + 1), errno.EPROTO),
        (message(0), errno.EINVAL),
        (message(99), errno.EINVAL),
        (message(wire.NOTE), errno.EINVAL),
        (message(flags=32), errno.EINVAL),
        (message(backing=1), errno.EINVAL),
        (message(Op.ATTACH, backing=3), errno.EINVAL),
        (message(tail=b"x"), errno.EINVAL),
        (message(count=1, tail=OBJECT), errno.EINVAL),
        (message(Op.COMMIT, count=2, tail=OBJECT), errno.EINVAL),
        (message(Op.COMMIT, count=2**32 - 1), errno.EINVAL),
        (message(Op.MMAP), errno.EINVAL),
        (message(Op.MUNMAP, count=2, tail=2 * OBJECT), errno.EINVAL),
    ],
)
def test_what_is_no_request_is_refused(data: bytes, code: int) -> None:
    with pytest.raises(Refused) as caught:
        wire.parse_request(data)
    assert caught.value.code == code
    assert caught.value.message


def test_a_request_says_what_was_sent() -> None:
    request = wire.parse_request(message(Op.MMAP, count=1, tail=OBJECT, flags=5))
    assert (request.op, request.start, request.size, request.oflags) == (Op.MMAP, 1, 2, 3)
    assert request.flags == RequestFlag.HAS_MAPPINGS | RequestFlag.AS_IT_LIES
    (item,) = request.objects
    assert (item.offset, item.length, item.prot, item.flags) == (4096, 8192, 3, 1)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(Refused):
        wire.parse_request(data)


@given(
    st.integers(0, 20), st.integers(0, 10), st.integers(0, 3), st.integers(0, 1),
    st.binary(max_size=100), st.integers(0, 3),
)  # fmt: skip
def test_messages_that_are_nearly_right(
    op: int, flags: int, count: int, backing: int, noise: bytes, whole: int
) -> None:
    tail = OBJECT * whole + (noise if whole == 0 else b"")
    data = message(op, flags=flags, count=count, backing=backing, tail=tail)
    try:
        request = wire.parse_request(data)
    except Refused:
        return
    assert isinstance(request, Request)
    assert len(request.objects) == count == whole


def test_a_reply_cuts_its_text_and_keeps_its_size() -> None:
    packed = Reply(1, error=22, message="ä" * 200).pack()
    assert len(packed) == wire.REPLY.size
    assert packed.endswith(b"\0")
