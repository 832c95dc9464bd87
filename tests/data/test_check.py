"""`qwen2vl-data check`: everything that is wrong is named, everything that is sound passes, nothing ends the check."""

import io
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.cli import main
from data_pipelines.report import check_shard, check_workers
from data_pipelines.report.check import check_shards
from data_pipelines.report.check_shard import CheckSettings, Finding, PartChecker, ShardPart
from data_pipelines.shards.storage import LocalFile


class Heard:
    """Collects what `check_shards` tells."""

    def __init__(self):
        self.findings: list[Finding] = []

    def finding(self, finding):
        self.findings.append(finding)

    def summary(self, summary):
        self.counts = summary

    @property
    def by_key(self):
        return {(Path(finding.shard).name, finding.key): finding.reason for finding in self.findings}


def picture(width=40, height=30, kind="PNG", seed=0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return str(path)


def caption(words="a dog", **more) -> bytes:
    return json.dumps({"caption": words, **more}).encode()


def run(shards, settings=None, processes=1, timeout_s=120.0):
    heard = Heard()
    summary = check_shards([str(shard) for shard in shards], settings or CheckSettings(), heard, processes, timeout_s)
    return heard, summary


def test_sound_shards_pass_with_exit_code_zero(tiny, capsys):
    words = ["check", f"{tiny.folder}/*.tar", "--json", "--processes", "2", "--tokenizer", f"{tiny.folder}/tokenizer"]
    assert main(words) == 0
    (line,) = capsys.readouterr().out.splitlines()
    summary = json.loads(line)
    assert (summary["shards"], summary["samples"], summary["bad_samples"], summary["findings"]) == (5, 35, 0, {})


def test_every_bad_sample_is_named_with_its_reason_and_the_good_ones_pass(tmp_path, capsys):
    half = picture(kind="JPEG")
    box = {"phrase": "dog", "box": [10, 10, 90, 20]}
    shard = write_tar(
        tmp_path / "web-00000.tar",
        [
            ("good.json", caption()), ("good.0.png", picture()),
            ("cut.json", caption()), ("cut.0.jpg", half[: len(half) // 2]),
            ("html.json", caption()), ("html.0.jpg", b"<html>404</html>"),
            ("empty.json", caption()), ("empty.0.jpg", b""),
            ("words.json", b'{"caption": '), ("words.0.png", picture()),
            ("lonely.0.png", picture()),
            ("size.json", caption(media={"0.png": {"width": 41, "height": 30}})), ("size.0.png", picture()),
            ("box.json", caption(boxes=[box])), ("box.0.png", picture()),
            ("strip.json", caption()), ("strip.0.png", picture(402, 2)),
            ("clip.json", caption()), ("clip.0.mp4", b"<html>404</html>"),
        ],
    )  # fmt: skip
    assert main(["check", shard, "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["key"]: line["reason"] for line in lines[:-1]} == {
        "cut": "corrupt_image",
        "html": "not_an_image",
        "empty": "empty_media",
        "words": "bad_json",
        "lonely": "no_record",
        "size": "size_mismatch",
        "box": "bad_box",
        "strip": "bad_size",
        "clip": "not_a_clip",
    }
    assert all(line["shard"] == shard and line["lost"] for line in lines[:-1])
    assert (lines[-1]["type"], lines[-1]["samples"], lines[-1]["bad_samples"]) == ("summary", 10, 9)


def test_two_bad_pictures_of_one_sample_are_two_findings(tmp_path):
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "image", "image": "1.png"}]},
        {"role": "assistant", "content": "none"},
    ]
    members = [("a.json", json.dumps({"messages": turns}).encode()), ("a.0.png", b""), ("a.1.png", b"GIF89a")]
    heard, summary = run([write_tar(tmp_path / "x.tar", members)])
    assert [finding.reason for finding in heard.findings] == ["empty_media", "not_an_image"]
    assert summary.bad_samples == 1


def test_the_shard_itself_is_checked(tmp_path):
    good = [("a.json", caption()), ("a.0.png", picture()), ("b.json", caption()), ("b.0.png", picture())]
    scattered = write_tar(tmp_path / "scattered.tar", [good[0], good[2], good[1], good[3]])
    repeated = write_tar(tmp_path / "repeated.tar", [*good, *good[:2]])
    whole = Path(write_tar(tmp_path / "whole.tar", good)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    heard, summary = run([scattered, repeated, tmp_path / "whole.tar", tmp_path / "cut.tar", tmp_path / "empty.tar"])
    assert heard.by_key == {
        ("scattered.tar", "a"): "scattered_key",
        ("scattered.tar", "b"): "scattered_key",
        ("repeated.tar", "a"): "duplicate_key",
        ("cut.tar", ""): "cut_shard",
        ("empty.tar", ""): "no_samples",
    }
    assert {finding.reason: finding.lost for finding in heard.findings} == {
        "scattered_key": False,
        "duplicate_key": True,
        "cut_shard": True,
        "no_samples": True,
    }
    assert summary.bad_samples == 0


def test_a_byte_that_changed_since_the_import_is_found_by_the_manifest(tmp_path):
    """A flipped bit in a picture often still decodes: only the checksum tells."""
    path = Path(write_tar(tmp_path / "a.tar", [("a.json", caption()), ("a.0.png", picture())]))
    entry = {"path": "a.tar", "records": 1, "bytes": path.stat().st_size, "sha256": "0" * 64}
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [entry]}))
    heard, _ = run([path])
    (finding,) = heard.findings
    assert finding.reason == "not_as_in_manifest"
    assert "sha256" in finding.message


def test_with_a_tokenizer_samples_that_fit_no_pack_are_found(tiny, tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("a.json", caption("a dog " * 600)), ("a.0.png", picture())])
    settings = CheckSettings(tokenizer=tiny.tokenizer.path)
    assert not run([shard], settings)[0].findings
    tight = CheckSettings(tokenizer=tiny.tokenizer.path, plan=check_shard.PlanConfig(max_tokens=64))
    assert [finding.reason for finding in run([shard], tight)[0].findings] == ["too_long"]


def test_a_sample_that_ends_or_stalls_its_process_is_a_finding_and_the_others_are_read(tiny, monkeypatch):
    check = PartChecker.check

    def hostile(self, number):
        if self.keys[number] == "p02":
            os._exit(7)
        if self.keys[number] == "p04":
            time.sleep(60)
        return check(self, number)

    monkeypatch.setattr(PartChecker, "check", hostile)
    heard, summary = run(sorted(tiny.folder.glob("pictures-*.tar")), processes=2, timeout_s=2.0)
    assert heard.by_key == {("pictures-00000.tar", "p02"): "decoder_crashed", ("pictures-00000.tar", "p04"): "deadline"}
    assert (summary.samples, summary.bad_samples) == (20, 2)


def test_a_shard_that_ends_its_process_while_it_is_scanned_is_given_up(tiny, monkeypatch):
    monkeypatch.setattr(check_workers, "PartChecker", lambda part, settings: os._exit(7))
    heard, _ = run([tiny.folder / "pictures-00000.tar"])
    # once as a whole, once where its samples would begin: never again, since every try would end alike
    assert [(finding.key, finding.reason) for finding in heard.findings] == [("", "decoder_crashed")] * 2


def test_reading_a_whole_shard_may_take_longer_than_a_sample(tiny, monkeypatch):
    read = LocalFile.read

    def slow(self, offset, size):
        time.sleep(0.1 if size == 4096 else 0)
        return read(self, offset, size)

    shard = tiny.folder / "pictures-00000.tar"
    monkeypatch.setattr(check_shard, "_BLOCK", 4096)
    monkeypatch.setattr(LocalFile, "read", slow)
    assert shard.stat().st_size > 40 * 4096  # so four seconds at least
    heard, summary = run([shard], timeout_s=3.0)
    assert (heard.findings, summary.samples) == ([], 8)


def test_parts_of_a_large_shard_cover_it_once(tiny, monkeypatch):
    monkeypatch.setattr(check_shard, "PART_BYTES", 20_000)
    shard = tiny.folder / "pictures-00000.tar"
    parts = ShardPart.all_of(str(shard), shard.stat().st_size)
    assert len(parts) > 2
    keys = [key for part in parts for key in PartChecker(part, CheckSettings()).keys]
    assert sorted(keys) == [f"p{number:02d}" for number in range(8)]
    _, summary = run([shard], processes=2)
    assert summary.samples == 8


def test_an_unexpected_error_of_a_decoder_is_a_finding(tiny, monkeypatch):
    def broken(*_):
        raise RuntimeError("what no decoder should raise")

    monkeypatch.setattr(check_shard, "decode_image", broken)
    heard, _ = run([tiny.folder / "pictures-00002.tar"])
    assert {finding.reason for finding in heard.findings} == {"unexpected_error"}
    assert "RuntimeError: what no decoder should raise" in heard.findings[0].message


def test_people_get_the_first_of_each_reason_and_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    members = [pair for n in range(25) for pair in ((f"{n:02d}.json", caption()), (f"{n:02d}.0.jpg", b"nothing"))]
    assert main(["check", write_tar(tmp_path / "bad.tar", members)]) == 1
    shown = capsys.readouterr().out
    assert shown.count("not_an_image  ") == 20
    assert "1 shard of 0.1 MB read: 0 of 25 samples are sound, 25 losses, 0 notes" in shown
    assert "leaves them out" in shown


def test_a_harmless_note_is_told_and_ends_in_exit_code_zero(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    members = [("a.json", caption()), ("b.json", caption()), ("a.0.png", picture()), ("b.0.png", picture())]
    assert main(["check", write_tar(tmp_path / "x.tar", members)]) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 samples are sound, 0 losses, 2 notes" in shown
    assert "is not harmed" in shown


def test_a_pattern_that_names_nothing_is_told_once(tmp_path, capsys):
    assert main(["check", f"{tmp_path}/x*.tar"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("qwen2vl-data check: shards: no shard matches ")
    assert told.count("check") == 1 + str(tmp_path).count("check")


# What the manifest of bad/ allows to be left out says "skip", "refuse" or "drop"; everything else must load.
MAY_BE_LEFT_OUT = ("skip", "refuse", "drop", "clip", "size swaps", "truncate", "error", "no division")


@pytest.mark.real_data
@pytest.mark.parametrize("kind", ["image", "video", "json"])
def test_all_bad_items_end_as_the_manifest_expects(shared_data, tmp_path, kind):
    items = json.loads((shared_data / "bad" / "manifest.json").read_text())["items"]
    media = (shared_data / "bad" / "image" / "exif_1.jpg").read_bytes()
    members, expected = [], {}
    for number, item in enumerate(item for item in items if item["file"].startswith(f"{kind}/")):
        path = shared_data / "bad" / item["file"]
        if path.is_dir() or path.suffix == ".jsonl":
            continue
        key = f"{number:03d}"
        expected[key] = (item["file"], item["expected"])
        if kind == "json":
            data = path.read_bytes().replace(b"../image/exif_1.jpg", b"0.jpg")
            members += [(f"{key}.json", data)]
            members += [(f"{key}.0.jpg", media)] if b"0.jpg" in data.replace(b"\0", b"") or b"image" in data else []
        else:
            members += [
                (f"{key}.json", caption()),
                (f"{key}.0.{'jpg' if kind == 'image' else 'mp4'}", path.read_bytes()),
            ]
    heard, summary = run([write_tar(tmp_path / "bad.tar", members)], processes=2)
    assert summary.samples == len(expected)
    left_out = {finding.key: finding.reason for finding in heard.findings}
    assert "unexpected_error" not in left_out.values()
    for key, (name, expectation) in expected.items():
        if expectation.startswith(("skip", "refuse")) and " or " not in expectation.replace("crash or hang", ""):
            assert key in left_out, f"{name} passed; expected: {expectation}"
        elif key in left_out:
            assert any(word in expectation for word in MAY_BE_LEFT_OUT), (name, left_out[key], expectation)


def test_json_lines_with_media_beside_them_are_checked_too(tmp_path):
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "cut.png").write_bytes(picture()[:200])
    lines = [
        {"image": "good.png", "caption": "a dog"},
        {"image": "cut.png", "caption": "a dog"},
        {"image": "missing.png", "caption": "a dog"},
        {"text": "one small cat"},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"text": \n')
    heard, summary = run([path])
    assert sorted(finding.reason for finding in heard.findings) == ["bad_json", "corrupt_image", "missing_media"]
    assert summary.samples - summary.bad_samples == 2


def test_a_shard_without_samples_and_lost_members_fail(tmp_path, capsys, monkeypatch):
    """`tar -P` of relative paths that lead upwards, symbolic links instead of pictures: nothing would be trained."""
    monkeypatch.setenv("COLUMNS", "150")
    outside = write_tar(tmp_path / "outside.tar", [("../a.json", caption()), ("../a.0.png", picture())])
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for name in ("a.json", "a.0.png"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"../{name}"
            tar.addfile(link)
    junk = write_tar(tmp_path / "junk.tar", [("README", b"no sample"), ("._a.json", b"of macOS")])
    for shard, reason in ((outside, "unsafe_name"), (str(tmp_path / "links.tar"), "not_a_file"), (junk, "no_samples")):
        assert main(["check", shard]) == 1
        assert reason in capsys.readouterr().out
        assert main(["index", shard, "--strict"]) == 1
        assert reason in capsys.readouterr().out
    absolute = write_tar(tmp_path / "absolute.tar", [("/a.json", caption()), ("/a.0.png", picture())])
    assert main(["check", absolute]) == 0
    assert "1 of 1 sample is sound, 0 losses" in capsys.readouterr().out
    assert main(["index", absolute, "--strict"]) == 0
