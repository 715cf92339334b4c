"""Tars that every reader understands, byte for byte the same each time."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from shards.tar import Member, build_tar, padded_bytes, sample_key

SIZES = [0, 1, 511, 512, 513, 1024, 70_001]


def members() -> list[Member]:
    return [
        Member(name=f"{sample_key(7, n)}.jpg", data=bytes([n + 1]) * size)
        for n, size in enumerate(SIZES)
    ]


def test_offsets_point_at_the_data() -> None:
    buffers, offsets = build_tar(members())
    tar = b"".join(buffers)

    for member, offset in zip(members(), offsets, strict=True):
        assert tar[offset : offset + len(member.data)] == member.data
        assert offset % 512 == 0
    assert len(tar) == sum(map(padded_bytes, SIZES)) + 1024


def test_the_headers_say_nothing_that_changes() -> None:
    buffers, _ = build_tar(members())

    with tarfile.open(fileobj=io.BytesIO(b"".join(buffers))) as tar:
        found = tar.getmembers()
        assert [entry.size for entry in found] == SIZES
        for entry in found:
            assert entry.isreg()
            assert (entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) == (
                0,
                0,
                0,
                "",
                "",
            )
            assert (entry.mode, entry.pax_headers) == (0o444, {})
    assert all(bytes(b)[257:265] == b"ustar\x0000" for b in buffers[::1] if b[:6] == b"000007")


def test_gnu_tar_lists_and_extracts_it_without_a_complaint(tmp_path: Path) -> None:
    buffers, _ = build_tar(members())
    path = tmp_path / "shard.tar"
    path.write_bytes(b"".join(buffers))

    listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, timeout=30)
    subprocess.run(["tar", "xf", path, "-C", tmp_path], check=True, timeout=30)

    assert (listed.returncode, listed.stderr) == (0, "")
    assert listed.stdout.split() == [member.name for member in members()]
    for member in members():
        assert (tmp_path / member.name).read_bytes() == member.data


def test_keys_are_unique_fixed_width_and_ordered() -> None:
    pairs = [(s, p) for s in (0, 1, 255, 16**6 - 1) for p in (0, 1, 4096, 16**6 - 1)]

    keys = [sample_key(shard, position) for shard, position in pairs]

    assert keys == sorted(set(keys))
    assert {len(key) for key in keys} == {12}
    assert set("".join(keys)) <= set("0123456789abcdef")
    with pytest.raises(AssertionError):
        sample_key(16**6, 0)
