import io
import json
import tarfile

import pytest
import webdataset

from data_pipelines.errors import RecordError, ShardError
from data_pipelines.shards.writer import ShardWriter

RECORD = {"caption": "a dög"}


def write_three(folder, **options):
    with ShardWriter(folder, "web", **options) as writer:
        for number in range(3):
            writer.write(f"web/{number:04d}", RECORD, {"0.jpg": bytes([number]) * 10, "1.png": b"second"})
    return writer


def test_webdataset_reads_what_was_written(tmp_path):
    write_three(tmp_path)
    samples = list(webdataset.WebDataset(str(tmp_path / "web-00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["web/0000", "web/0001", "web/0002"]
    assert json.loads(samples[1]["json"]) == RECORD
    assert samples[1]["0.jpg"] == b"\x01" * 10
    assert samples[1]["1.png"] == b"second"


def test_same_samples_give_same_bytes(tmp_path):
    write_three(tmp_path / "a")
    write_three(tmp_path / "b")
    assert (tmp_path / "a/web-00000.tar").read_bytes() == (tmp_path / "b/web-00000.tar").read_bytes()


def test_members_carry_no_clock_and_no_user(tmp_path):
    write_three(tmp_path)
    with tarfile.open(tmp_path / "web-00000.tar") as tar:
        facts = {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in tar}
    assert facts == {(0, 0, 0, "root", "root")}


def test_a_long_key_survives(tmp_path):
    key = "/".join(["folder" * 10] * 5)
    with ShardWriter(tmp_path, "web") as writer:
        writer.write(key, RECORD, {})
    with tarfile.open(tmp_path / "web-00000.tar") as tar:
        assert tar.getnames() == [f"{key}.json"]


def test_shards_are_cut_at_max_records_and_listed_in_the_manifest(tmp_path):
    writer = write_three(tmp_path, max_records=2)
    sizes = [(tmp_path / f"web-0000{number}.tar").stat().st_size for number in range(2)]
    wanted = [
        {"path": "web-00000.tar", "records": 2, "bytes": sizes[0]},
        {"path": "web-00001.tar", "records": 1, "bytes": sizes[1]},
    ]
    assert json.loads((tmp_path / "manifest.json").read_text())["shards"] == wanted
    assert [shard.records for shard in writer.shards] == [2, 1]


def test_an_exception_leaves_no_unfinished_shard_and_no_manifest(tmp_path):
    def write_and_fail():
        with ShardWriter(tmp_path, "web", max_records=1) as writer:
            writer.write("a", RECORD, {})
            writer.write("b", RECORD, {})
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["web-00000.tar"]


def test_an_unfinished_shard_has_another_name(tmp_path):
    with ShardWriter(tmp_path, "web") as writer:
        writer.write("a", RECORD, {})
        assert [path.name for path in tmp_path.iterdir()] == [".web-00000.tar.part"]


def test_no_sample_makes_no_shard(tmp_path):
    with ShardWriter(tmp_path, "web") as writer:
        pass
    assert writer.shards == []
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("key", ["", "a/b.c", "/a", "../a", "a/"])
def test_keys_that_readers_split_differently_are_refused(tmp_path, key):
    with ShardWriter(tmp_path, "web") as writer, pytest.raises(RecordError, match="bad_key"):
        writer.write(key, RECORD, {})


@pytest.mark.parametrize("name", ["a/b.jpg", ".jpg", "__key__", "json"])
def test_member_names_that_readers_take_for_something_else_are_refused(tmp_path, name):
    with ShardWriter(tmp_path, "web") as writer, pytest.raises(RecordError, match="bad_member"):
        writer.write("a", RECORD, {name: b""})


def test_a_key_written_twice_is_refused(tmp_path):
    with ShardWriter(tmp_path, "web", max_records=1) as writer:
        writer.write("a", RECORD, {})
        with pytest.raises(ShardError, match="duplicate_key"):
            writer.write("a", RECORD, {})


def test_a_record_that_is_not_json_is_refused_and_its_key_stays_free(tmp_path):
    with ShardWriter(tmp_path, "web") as writer:
        with pytest.raises(RecordError, match="bad_json"):
            writer.write("a", {"box": float("nan")}, {})
        with pytest.raises(RecordError, match="bad_json"):
            writer.write("a", {"picture": io.BytesIO()}, {})
        writer.write("a", RECORD, {})
    assert writer.shards[0].records == 1
