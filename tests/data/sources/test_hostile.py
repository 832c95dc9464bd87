"""The broken and hostile items of the optional data folder, through the importers: told, and nothing else lost."""

import json

import pytest

from data_pipelines.sources.item import Annotations, Item, MediaSource
from data_pipelines.sources.records import read_records
from data_pipelines.sources.webdataset_tars import read_tar

pytestmark = pytest.mark.real_data


@pytest.fixture(scope="module")
def bad(shared_data):
    return shared_data / "bad"


def test_json_lines_keep_their_good_samples(bad, load):
    for name, good, told in (("mixed", 2, 5), ("crlf", 2, 0), ("u2028", 2, 0), ("no_final_newline", 2, 0)):
        imported = load(read_records(bad / "json" / f"{name}.jsonl", bad, name))
        assert (len(imported.records), len(imported.ledger)) == (good, told), name


def test_every_json_item_is_a_sample_or_a_ledger_line(bad, load):
    files = sorted((bad / "json").glob("*.json"))
    entries = [entry for path in files for entry in read_records(path, bad, path.stem)]
    imported = load(entries)
    told = {key.split("/")[0].removesuffix(".json") for key in [*imported.records, *(k for k, _ in imported.reasons())]}
    assert told == {path.stem for path in files}
    for name in ("size_mismatch", "box_out_of_range", "path_url", "path_absolute", "path_traversal", "nul_in_path"):
        assert f"{name}/000000" not in imported.records
    for name in ("utf8_bom", "box_touches_edge", "boxes_empty", "caption_zero_width", "special_tokens_in_text"):
        assert f"{name}/000000" in imported.records


def test_pictures_are_told_from_their_headers_and_damage_on_request(bad, load):
    expected = {i["file"]: i["expected"] for i in json.loads((bad / "manifest.json").read_text())["items"]}
    paths = {f"p{i:03d}": path for i, path in enumerate(sorted((bad / "image").iterdir()))}
    items = [Item(key, Annotations(label="x"), (MediaSource(p.name, "image", p),)) for key, p in paths.items()]
    imported = load(items, verify=True)
    assert len(imported.records) + len(imported.ledger) == len(paths)
    for key, path in paths.items():
        wanted = expected.get(f"image/{path.name}", "skip")
        if wanted.startswith(("skip", "refuse")):
            assert key not in imported.records, path.name
        elif wanted.startswith("load normally"):
            assert key in imported.records, path.name


def test_clips_are_probed_and_the_broken_ones_told(bad, load):
    expected = {i["file"]: i["expected"] for i in json.loads((bad / "manifest.json").read_text())["items"]}
    paths = {f"v{i:03d}": path for i, path in enumerate(sorted((bad / "video").iterdir()))}
    items = [Item(key, Annotations(captions=("x",)), (MediaSource(p.name, "video", p),)) for key, p in paths.items()]
    imported = load(items)
    assert len(imported.records) + len(imported.ledger) == len(paths)
    for key, path in paths.items():
        if expected[f"video/{path.name}"].startswith("skip the sample"):
            assert key not in imported.records, path.name


def test_tars_keep_their_whole_samples_and_write_nothing_else(bad, load, tmp_path):
    for path in sorted((bad / "tar").glob("*.tar")):
        imported = load(read_tar(path, "t"))
        if path.stem in ("good", "macos_junk", "interleaved_keys"):
            assert imported.records, path.name
            assert not imported.ledger, path.name
        elif path.stem not in ("unicode_dots_names",):
            assert imported.ledger or not imported.records, path.name
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"out"}
