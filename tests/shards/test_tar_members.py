"""Tars that others wrote: every regular file is found, and what is wrong is named by its byte."""

import contextlib
import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds

from shards.errors import FormatError
from shards.tar import FoundMember, HeaderWindow, Member, build_tar, read_members

KINDS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def members(tar: bytes) -> list[FoundMember]:
    def read(start: int, end: int) -> bytes:
        assert 0 <= start <= end <= len(tar)
        return tar[start:end]

    plain = list(read_members(read, len(tar), where="t.tar"))
    # What the window gives is the same, whether it jumps or reads on.
    assert list(read_members(HeaderWindow(read, len(tar)), len(tar), where="t.tar")) == plain
    return plain


def contents(tar: bytes) -> dict[str, bytes]:
    return {member.name: tar[member.start : member.start + member.size] for member in members(tar)}


def tar_of(files: dict[str, bytes], kind: str = "ustar") -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=KINDS[kind]) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return written.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_with_all_sizes_and_long_names(kind: str) -> None:
    files = {f"{size}.bin": bytes([size % 251]) * size for size in (0, 1, 511, 512, 513, 70_001)}
    files[f"{'folder/' * 20}{'n' * 90}.jpg"] = b"far down"
    if kind != "ustar":
        files[f"{'long' * 80}.jpg"] = b"long"
        files["ü 😀\n\"'.jpg"] = b"odd"

    assert contents(tar_of(files, kind)) == files


def test_our_own_tars_are_read() -> None:
    wanted = [Member(name=f"{number:012x}.jpg", data=b"x" * number) for number in range(1, 50)]
    buffers, offsets = build_tar(wanted)

    found = members(b"".join(buffers))

    assert [(m.name, m.size) for m in found] == [(m.name, len(m.data)) for m in wanted]
    assert [m.start for m in found] == list(offsets)


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "w.tar")) as tar:
        for number in range(5):
            tar.write({"__key__": f"k{number}", "jpg": b"jpeg" * number, "cls": number})

    found = contents((tmp_path / "w.tar").read_bytes())

    assert found["k4.jpg"] == b"jpeg" * 4
    assert found["k3.cls"] == b"3"
    assert len(found) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_links_folders_and_devices_are_left_out(kind: str) -> None:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=KINDS[kind]) as tar:
        for number, member_type in enumerate(
            [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
        ):
            entry = tarfile.TarInfo(f"odd{number}")
            entry.type = member_type
            entry.linkname = "l" * (99 if kind == "ustar" else 300)
            tar.addfile(entry)
        entry = tarfile.TarInfo("a.jpg")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"image"))

    assert contents(written.getvalue()) == {"a.jpg": b"image"}


@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=posix"]])
def test_sparse_files_are_left_out(options: list[str], tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        for number in range(60):  # more holes than one header holds
            file.seek(number * 200_000)
            file.write(b"data")
    (tmp_path / "z.jpg").write_bytes(b"image")
    command = ["tar", *options, "-S", "-cf", "s.tar", "sparse", "z.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)

    assert contents((tmp_path / "s.tar").read_bytes()) == {"z.jpg": b"image"}


def test_old_tars_and_other_notations() -> None:
    def changed(edit: Callable[[bytearray], None]) -> bytes:
        tar = bytearray(tar_of({"a.jpg": b"image"}))
        edit(tar)
        head = bytes(tar[:148]) + b" " * 8 + bytes(tar[156:512])
        tar[148:156] = f"{sum(head):06o}\0 ".encode()
        return bytes(tar)

    def v7(tar: bytearray) -> None:
        tar[156:157], tar[257:512] = b"\0", bytes(255)

    def base_256(tar: bytearray) -> None:
        tar[124:136] = b"\x80" + (5).to_bytes(11, "big")

    def not_utf8(tar: bytearray) -> None:
        tar[0:5] = b"\xffjpg\0"

    assert contents(changed(v7)) == {"a.jpg": b"image"}
    assert contents(changed(base_256)) == {"a.jpg": b"image"}
    assert contents(changed(not_utf8)) == {"\\xffjpg": b"image"}


def test_pax_may_give_the_size_and_a_name_for_all() -> None:
    written = io.BytesIO()
    with tarfile.open(
        fileobj=written, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all"}
    ) as tar:
        entry = tarfile.TarInfo("a.jpg")
        entry.size = 5
        entry.pax_headers = {"size": "5"}
        tar.addfile(entry, io.BytesIO(b"image"))
        tar.addfile(tarfile.TarInfo("empty"))
    data = bytearray(written.getvalue())
    # The size in the header itself is 0 where it would not fit, as for members over 8 GiB.
    start = data.index(b"a.jpg\0")
    data[start + 124 : start + 136] = b"00000000000\0"
    head = bytes(data[start : start + 148]) + b" " * 8 + bytes(data[start + 156 : start + 512])
    data[start + 148 : start + 156] = f"{sum(head):06o}\0 ".encode()

    assert contents(bytes(data)) == {"a.jpg": b"image", "empty": b""}


def test_the_end_may_be_missing() -> None:
    tar = tar_of({"a.jpg": b"image", "b.jpg": b"more"})

    assert set(contents(tar[:2048])) == {"a.jpg", "b.jpg"}
    assert contents(b"") == {}


@pytest.mark.parametrize(
    ("tar", "message"),
    [
        (
            tar_of({"a.jpg": b"x" * 2000})[:1500],
            r"t\.tar: member 'a\.jpg', header at byte 0: .*2512",
        ),
        (
            tar_of({"a.jpg": b"x", "b": b""})[:1100],
            r"t\.tar: ends within the header at byte 1024, after member 'a\.jpg'",
        ),
        (
            tar_of({"a.jpg": b"x"})[:1024] + b"garbage" * 100,
            r"t\.tar: no tar header at byte 1024, after member 'a\.jpg'",
        ),
        (b"<html>" * 200, r"t\.tar: no tar header at byte 0, at its start"),
        (tar_of({"n" * 300: b"x"}, "gnu")[:700], r"ends within the header at byte 0"),
        (
            tar_of({"n" * 300: b"x"}, "pax").replace(b" path=", b"_path=", 1),
            r"broken PAX header at byte 0",
        ),
    ],
)
def test_what_is_wrong_is_named_by_its_byte(tar: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        members(tar)
    assert "\n" not in str(caught.value)


def test_truncated_anywhere_a_tar_never_yields_a_member_beyond_its_end() -> None:
    whole = tar_of({"a.jpg": b"x" * 600, f"{'n' * 200}.jpg": b"y" * 100}, "pax")
    wanted = members(whole)

    for length in range(0, len(whole), 64):
        found = []
        with contextlib.suppress(FormatError):
            found = members(whole[:length])
        assert all(member in wanted and member.start + member.size <= length for member in found)


def test_big_members_are_jumped_over_and_small_ones_read_in_few_pieces() -> None:
    big = tar_of({f"{number}": bytes(4 << 20) for number in range(5)})
    small = tar_of({f"{number:05d}": bytes(2_000) for number in range(5_000)})
    for tar, most_requests, most_bytes in ((big, 6, 6 * (16 << 10)), (small, 5, len(small))):
        asked: list[int] = []

        def read(start: int, end: int, tar: bytes = tar, asked: list[int] = asked) -> bytes:
            asked.append(end - start)
            return tar[start:end]

        list(read_members(HeaderWindow(read, len(tar)), len(tar), where="t.tar"))

        assert len(asked) <= most_requests
        assert sum(asked) <= most_bytes
