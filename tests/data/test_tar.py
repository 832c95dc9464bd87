"""The tar scan against tars made here and, where present, a folder of broken ones."""

import bz2
import gzip
import io
import lzma
import re
import tarfile

import pytest
import webdataset

from data_pipelines.errors import ShardError
from data_pipelines.shards.storage import LocalFile, OpenShards, expand_braces, expand_shards
from data_pipelines.shards.tar import scan_tar


def make_tar(path, members, tar_format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def scan(path):
    return scan_tar(LocalFile(str(path)))


def contents(path):
    file = LocalFile(str(path))
    return {
        sample.key: {suffix: file.read(m.offset, m.size) for suffix, m in sample.members.items()}
        for sample in scan_tar(file).samples
    }


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_with_their_bytes(tmp_path, tar_format):
    members = [("d.v1/a.0.JPG", b"x" * 700), ("d.v1/a.json", b"{}"), ("b.json", b"[]")]
    path = make_tar(tmp_path / "s.tar", members, tar_format)
    assert contents(path) == {"d.v1/a": {"0.jpg": b"x" * 700, "json": b"{}"}, "b": {"json": b"[]"}}
    assert scan(path).problems == []


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names_are_resolved(tmp_path, tar_format):
    key = "图片/" + "k" * 150
    assert contents(make_tar(tmp_path / "s.tar", [(f"{key}.json", b"{}")], tar_format)) == {key: {"json": b"{}"}}


def test_a_shard_cut_in_a_member_keeps_the_whole_samples_before(tmp_path):
    path = make_tar(tmp_path / "s.tar", [(f"{i}.{ext}", b"x" * 600) for i in range(3) for ext in ("json", "jpg")])
    # a member takes 512 + 1024 bytes; 5.9 members are left, so sample 2 lacks the end of its jpg
    path.write_bytes(path.read_bytes()[: 5 * 1536 + 900])
    found = scan(path)
    assert [sample.key for sample in found.samples] == ["0", "1"]
    assert [problem.reason for problem in found.problems] == ["cut_shard"]
    assert str(path) in str(found.problems[0])


def test_a_wrong_checksum_ends_the_reading_with_a_problem(tmp_path):
    path = make_tar(tmp_path / "s.tar", [(f"{i}.{ext}", b"x" * 600) for i in range(3) for ext in ("json", "jpg")])
    data = bytearray(path.read_bytes())
    data[3 * 1536] ^= 1  # the header of the second sample's jpg
    path.write_bytes(data)
    found = scan(path)
    assert [sample.key for sample in found.samples] == ["0"]
    assert [problem.reason for problem in found.problems] == ["bad_header"]
    assert "byte 4608" in str(found.problems[0])


def test_a_repeated_key_is_dropped_and_scattered_members_are_joined(tmp_path):
    names = ["a.json", "b.json", "a.jpg", "b.jpg", "c.json", "c.json"]
    found = scan(make_tar(tmp_path / "s.tar", [(name, b"1") for name in names]))
    assert {sample.key: list(sample.members) for sample in found.samples} == {
        "a": ["json", "jpg"],
        "b": ["json", "jpg"],
    }
    assert [(problem.key.split("/")[-1], problem.reason) for problem in found.problems] == [
        ("c", "duplicate_key"),
        ("a", "scattered_key"),
        ("b", "scattered_key"),
    ]


def test_bytes_after_the_end_marker_are_reported(tmp_path):
    one = make_tar(tmp_path / "1.tar", [("a.json", b"1")]).read_bytes()
    (tmp_path / "2.tar").write_bytes(one + one)
    assert [problem.reason for problem in scan(tmp_path / "2.tar").problems] == ["data_after_end"]


def test_links_and_names_that_point_outside_are_refused(tmp_path):
    names = ["../a.json", "../a.jpg", "x/../../c.json", "d.json"]
    path = make_tar(tmp_path / "s.tar", [(name, b"1") for name in names])
    with tarfile.open(path, "a") as tar:
        for name in ("e.json", "README", "._e.json"):  # the last two are no samples', so nothing is lost with them
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    found = scan(path)
    assert [sample.key for sample in found.samples] == ["d"]
    assert [(problem.key.removeprefix(f"{path}/"), problem.reason) for problem in found.problems] == [
        ("../a", "unsafe_name"),
        ("x/../../c", "unsafe_name"),
        ("e", "not_a_file"),
    ]


def test_absolute_names_are_read_as_relative_ones(tmp_path):
    """`tar -P` writes them, webdataset reads them; a key is never a path."""
    path = make_tar(
        tmp_path / "s.tar", [("/a/b.json", b"1"), ("/a/b.jpg", b"1"), ("//c.json", b"1"), ("./d.json", b"1")]
    )
    found = scan(path)
    assert [(sample.key, list(sample.members)) for sample in found.samples] == [
        ("a/b", ["json", "jpg"]),
        ("c", ["json"]),
        ("d", ["json"]),
    ]
    assert found.problems == []
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert [sample.key for sample in found.samples] == [key.removeprefix("./").lstrip("/") for key in theirs]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (gzip.compress(bytes(600)), r"compressed with gzip: decompress it \(gunzip\)"),
        (bz2.compress(bytes(600)), r"compressed with bzip2: decompress it \(bunzip2\)"),
        (lzma.compress(bytes(600)), r"compressed with xz: decompress it \(unxz\)"),
        (b"\n<!DOCTYPE html><html>404" + bytes(600), "begins with b'.n<!DOCTYPE html><html>4.*fetch it again"),
        (b"Entry not found" + bytes(600), "wrong checksum; it begins with b'Entry not found"),
    ],
)
def test_what_is_no_tar_is_named(tmp_path, head, words):
    (tmp_path / "s.tar").write_bytes(head)
    (problem,) = scan(tmp_path / "s.tar").problems
    assert problem.reason == "bad_header"
    assert re.search(words, str(problem))


def test_a_tar_may_begin_with_a_name_that_looks_compressed(tmp_path):
    found = scan(make_tar(tmp_path / "s.tar", [("BZhou/1.json", b"1"), ("<b>.json", b"1")]))
    assert [sample.key for sample in found.samples] == ["BZhou/1", "<b>"]


EXPECTED = {  # file: (samples that can be used, reasons)
    "good": (4, []),
    "truncated_in_member": (2, ["cut_shard"]),
    "no_end_blocks": (4, ["no_end_marker"]),
    "bad_checksum": (0, ["bad_header"]),
    "huge_claimed_size": (0, ["cut_shard"]),
    "path_traversal": (2, ["unsafe_name"] * 2),
    "links_devices": (1, ["not_a_file"] * 4),
    "duplicate_key": (3, ["duplicate_key"]),
    "interleaved_keys": (2, ["scattered_key", "scattered_key"]),
    "unicode_dots_names": (2, []),
    "macos_junk": (1, []),
    "empty": (0, []),
    "zero_byte": (0, ["bad_header"]),
    "not_a_tar": (0, ["bad_header"]),
    "gzip_named": (0, ["bad_header"]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_broken_shards_end_as_stated(shared_data, name):
    found = scan(shared_data / "bad" / "tar" / f"{name}.tar")
    assert (len(found.samples), [problem.reason for problem in found.problems]) == EXPECTED[name]


def test_reading_behind_the_end_is_an_error(tmp_path):
    path = make_tar(tmp_path / "s.tar", [("a.json", b"1")])
    with pytest.raises(ShardError, match="cut_shard"):
        LocalFile(str(path)).read(10_000, 1000)


def test_a_copy_keeps_its_tag_and_other_content_changes_it(tmp_path):
    first = make_tar(tmp_path / "1.tar", [("a.json", b"1" * 9000)])
    (tmp_path / "2.tar").write_bytes(first.read_bytes())
    make_tar(tmp_path / "3.tar", [("a.json", b"1" * 8999 + b"2")])
    tags = [LocalFile(str(tmp_path / f"{n}.tar")).tag() for n in (1, 2, 3)]
    assert tags[0] == tags[1] != tags[2]


def test_open_shards_are_bounded(tmp_path):
    shards = OpenShards(limit=2)
    paths = [str(make_tar(tmp_path / f"{n}.tar", [("a.json", b"%d" % n)])) for n in range(3)]
    first = shards.get(paths[0])
    assert shards.get(paths[0]) is first
    shards.get(paths[1]), shards.get(paths[2])
    assert shards.get(paths[0]) is not first
    shards.close()


def test_patterns_expand_to_sorted_files(tmp_path):
    for name in ("a-08", "a-09", "a-10", "b"):
        (tmp_path / f"{name}.tar").write_bytes(b"")
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{x,y}-{0..1}") == ["x-0", "x-1", "y-0", "y-1"]
    shards = expand_shards("s", [f"{tmp_path}/a-{{08..09}}.tar", f"{tmp_path}/*.tar"])
    assert [shard.rsplit("/")[-1] for shard in shards] == ["a-08.tar", "a-09.tar", "a-10.tar", "b.tar"]


def test_a_pattern_without_files_is_named(tmp_path):
    with pytest.raises(ShardError, match=r"source 'web'.*nothing.*the folder exists and holds 0"):
        expand_shards("web", [f"{tmp_path}/nothing-*.tar"])
    with pytest.raises(ShardError, match="does not exist"):
        expand_shards("web", [f"{tmp_path}/absent/x.tar"])
