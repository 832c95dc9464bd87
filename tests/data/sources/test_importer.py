"""Imports as a whole: the same bytes again, whatever the processes; manifest, ledger, interruption."""

import hashlib
import json
from dataclasses import replace

import pytest

from data_pipelines.cli import build_parser, main
from data_pipelines.errors import RecordError
from data_pipelines.sources import text
from data_pipelines.sources.clean_media import Similarity
from data_pipelines.sources.importer import run_import
from data_pipelines.sources.item import Annotations, Expected, Item, Labelled, MediaSource, problem
from data_pipelines.sources.shard_groups import ImportSettings
from tests.data.sources.conftest import read_back


def items(folder, make_picture, count=7):
    for number in range(count):
        path = make_picture(f"{folder}/{number}.jpg", seed=number)
        yield Item(f"k/{number:03d}", Annotations(captions=(f"picture {number}",)), (MediaSource("x", "image", path),))


def digest(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def test_the_same_items_give_the_same_bytes_for_any_number_of_processes(tmp_path, make_picture):
    listed = list(items("p", make_picture))
    for name, processes in (("a", 1), ("b", 2)):
        settings = ImportSettings(tmp_path / name, "s", "test", {"x": 1}, max_records=3, processes=processes)
        run_import(listed, settings, lambda _: None)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert sorted(digest(tmp_path / "a")) == [
        "ledger.jsonl",
        "manifest.json",
        "s-00000.tar",
        "s-00001.tar",
        "s-00002.tar",
    ]


def test_the_manifest_counts_and_the_ledger_names_everything_left_out(tmp_path, make_picture, load):
    def entries():
        yield problem("line:3", "bad_json", "broken")
        yield from items("p", make_picture, 2)
        yield Item("gone", Annotations(captions=("x",)), (MediaSource("g", "image", tmp_path / "gone.jpg"),))
        yield Item("k/000", Annotations(captions=("again",)), (MediaSource("0", "image", tmp_path / "p/0.jpg"),))
        yield Item("empty", Annotations(), (MediaSource("0", "image", tmp_path / "p/0.jpg"),))

    imported = load(entries())
    assert imported.reasons() == [
        ("line:3", "bad_json"),
        ("gone", "missing_media"),
        ("k/000", "duplicate_key"),
        ("empty", "no_annotation"),
    ]
    assert {line["dataset"] for line in imported.ledger} == {"test"}
    counts = {name: imported.manifest[name] for name in ("items", "records", "media", "tasks")}
    assert counts == {"items": 6, "records": 2, "media": 2, "tasks": {"caption": 2}}
    (shard,) = imported.manifest["shards"]
    assert (shard["records"], len(shard["sha256"])) == (2, 64)


def test_shards_are_cut_by_number_and_bytes(make_picture, load):
    listed = list(items("p", make_picture, 5))
    size = listed[0].media[0].path.stat().st_size
    assert [shard["records"] for shard in load(listed, max_records=2).manifest["shards"]] == [2, 2, 1]
    assert [shard["records"] for shard in load(listed, max_bytes=3 * size + 99).manifest["shards"]] == [3, 2]


def test_an_interrupted_import_continues_and_ends_alike(tmp_path, make_picture):
    listed = list(items("p", make_picture))
    whole = ImportSettings(tmp_path / "whole", "s", "test", {}, max_records=3)
    run_import(listed, whole, lambda _: None)
    cut = ImportSettings(tmp_path / "cut", "s", "test", {}, max_records=3)

    def broken_off():
        yield from listed[:7]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_import(broken_off(), cut, lambda _: None)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.tar")}
    assert sorted(times) == ["s-00000.tar", "s-00001.tar"]
    run_import(listed, cut, lambda _: None)
    assert digest(tmp_path / "whole") == digest(tmp_path / "cut")
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == time for name, time in times.items())


def test_shards_of_changed_items_are_made_again_and_stale_ones_removed(tmp_path, make_picture):
    listed = list(items("p", make_picture))
    settings = ImportSettings(tmp_path / "out", "s", "test", {}, max_records=3)

    def broken_off():
        yield from listed
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_import(broken_off(), settings, lambda _: None)
    report = run_import(listed[4:6], settings, lambda _: None)
    imported = read_back(tmp_path / "out", report)
    assert list(imported.records) == ["k/004", "k/005"]
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["s-00000.tar"]


def test_a_finished_import_is_not_overwritten_by_chance(tmp_path, make_picture):
    listed = list(items("p", make_picture, 2))
    settings = ImportSettings(tmp_path / "out", "s", "test", {})
    run_import(listed, settings, lambda _: None)
    with pytest.raises(ValueError, match="--overwrite"):
        run_import(listed, settings, lambda _: None)
    again = ImportSettings(tmp_path / "out", "t", "test", {}, overwrite=True)
    run_import(listed[:1], again, lambda _: None)
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["t-00000.tar"]


def test_overwriting_begins_once_the_source_can_be_read(tmp_path, make_picture):
    settings = ImportSettings(tmp_path / "out", "s", "test", {}, overwrite=True)
    run_import(items("p", make_picture, 2), settings, lambda _: None)
    before = digest(tmp_path / "out")

    def unreadable():
        yield problem("line:1", "bad_json", "broken")
        raise RecordError("none.json", "missing_file", "cannot be read")

    with pytest.raises(RecordError):
        run_import(unreadable(), settings, lambda _: None)
    assert digest(tmp_path / "out") == before


def test_a_source_that_cannot_be_opened_leaves_the_old_shards(tmp_path, make_picture):
    run_import(items("p", make_picture, 2), ImportSettings(tmp_path / "out", "s", "test", {}), lambda _: None)
    before = digest(tmp_path / "out")
    missing = ["--images", str(tmp_path), "--instances", str(tmp_path / "missing.json")]
    assert main(["import", "coco", *missing, "--out", str(tmp_path / "out"), "--overwrite"]) == 2
    assert digest(tmp_path / "out") == before
    again = ImportSettings(tmp_path / "out", "s", "test", {}, overwrite=True)
    with pytest.raises(ValueError, match=r"nothing to import \(a: no such file\)"):
        run_import([problem("a", "missing_media", "no such file")], again, lambda _: None)
    assert digest(tmp_path / "out") == before


@pytest.mark.parametrize("change", ["score", "relative"])
def test_a_shard_is_made_again_where_any_field_of_its_items_changed(tmp_path, make_picture, change):
    settings = ImportSettings(tmp_path / "out", "s", "test", {}, rules=[("similarity", Similarity(min=0.5))])
    media = MediaSource("x", "image", make_picture("a.jpg", width=40, height=20))
    told = Annotations(captions=("x",), objects=(Labelled("dog", ((0.0, 0.0, 1.0, 1.0),)),))

    def broken_off():
        yield Item("k", told, (media,), score=0.9)
        yield Item("other", told, (media,))
        raise KeyboardInterrupt

    cut = replace(settings, max_records=1)
    with pytest.raises(KeyboardInterrupt):
        run_import(broken_off(), cut, lambda _: None)
    if change == "score":
        run_import([Item("k", told, (media,), score=0.1)], cut, lambda _: None)
        assert read_back(tmp_path / "out").reasons() == [("k", "similarity")]
    else:
        run_import([Item("k", told, (replace(media, relative=True),), score=0.9)], cut, lambda _: None)
        (region,) = read_back(tmp_path / "out").only().messages[3].parts
        assert region.boxes == ((0.0, 0.0, 40.0, 20.0),)


def test_an_import_ends_well_after_one_that_was_killed_while_it_wrote(tmp_path, make_picture):
    (tmp_path / "out" / ".import").mkdir(parents=True)
    (tmp_path / "out" / ".import" / ".0.json.4711.part").write_text("{")
    run_import(items("p", make_picture, 2), ImportSettings(tmp_path / "out", "s", "test", {}), lambda _: None)
    assert sorted(digest(tmp_path / "out")) == ["ledger.jsonl", "manifest.json", "s-00000.tar"]


def test_a_folder_with_other_shards_is_left_alone(tmp_path):
    (tmp_path / "mine.tar").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"mine\.tar"):
        run_import([], ImportSettings(tmp_path, "s", "test", {}), lambda _: None)
    assert (tmp_path / "mine.tar").read_bytes() == b"x"


def test_progress_counts_every_entry_when_it_is_done(tmp_path, make_picture):
    seen = []
    settings = ImportSettings(tmp_path / "out", "s", "test", {}, max_records=3)
    run_import([problem("line:1", "bad_json", "broken"), *items("p", make_picture)], settings, seen.append)
    assert seen == [1] * 8
    seen.clear()
    run_import(items("p", make_picture), replace(settings, out=tmp_path / "two", processes=2), seen.append)
    assert sum(seen) == 7


def test_what_sources_expect_becomes_the_number_in_all(tmp_path, make_picture):
    listed, totals = list(items("p", make_picture)), []
    # Two files, the first of which is half of the bytes: 3 entries of it make 6 in all; 4 more are told then.
    entries = [Expected(3, 0.5), *listed[:3], Expected(4, 0.5), *listed[3:]]
    run_import(entries, ImportSettings(tmp_path / "out", "s", "test", {}), lambda _: None, totals.append)
    assert totals == [6, 7]


def test_files_tell_what_to_expect_as_their_share_of_the_bytes(tmp_path):
    for name, lines in (("a", 3), ("b", 6)):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "word"}\n' * lines)
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    options = build_parser().parse_args(["import", "text", *files, "--out", "none"])
    told = [entry for entry in text.read(options) if isinstance(entry, Expected)]
    assert [entry.count for entry in told] == [3, 6]
    assert [round(3 * entry.share) for entry in told] == [1, 2]


def test_what_a_trainer_would_refuse_never_reaches_a_shard(make_picture, load):
    media = (MediaSource("x", "image", make_picture("a.jpg")),)
    imported = load(
        [
            Item("a", Annotations(captions=("bad \ud800",)), media),
            Item("b", Annotations(messages=({"role": "user", "content": "only a question"},)), media),
            Item("c.d", Annotations(captions=("dot in the key",)), media),
        ]
    )
    assert imported.reasons() == [("a", "bad_text"), ("b", "bad_turns"), ("c.d", "bad_key")]
    assert json.dumps(imported.ledger).isascii()
