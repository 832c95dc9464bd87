import io
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import av
import numpy as np
import pytest
import webdataset
from PIL import Image
from transformers import AutoTokenizer

from data_pipelines.decode.record import parse_record
from data_pipelines.samples import MediaRef, Region
from data_pipelines.sources.demo import build_demo
from data_pipelines.sources.demo_clips import DIRECTIONS, MIN_TRAVEL, encode_clip, sample_clip
from data_pipelines.sources.demo_comparisons import sample_pair
from data_pipelines.sources.demo_documents import HELDOUT_TASKS, TRAIN_KINDS, demo_texts, make_document
from data_pipelines.sources.demo_drawing import draw_background, draw_scene, encode_picture
from data_pipelines.sources.demo_questions import join_phrases
from data_pipelines.sources.demo_scene import COLORS, SHAPES, WORDS, sample_scene
from data_pipelines.sources.demo_stencils import Stencils

COUNTS = {"num_pictures": 200, "num_clips": 12, "num_texts": 60, "num_heldout": 8}
FEW = {"num_pictures": 50, "num_clips": 4, "num_texts": 10, "num_heldout": 2}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "demo"
    build_demo(out, **COUNTS, processes=1)
    return out


def samples(*paths):
    for path in paths:
        yield from webdataset.WebDataset(str(path), shardshuffle=False)


def records(paths):
    for sample in samples(*paths):
        members = {name: value for name, value in sample.items() if not name.startswith("__")}
        media = {name: value for name, value in members.items() if name != "json"}
        yield (
            parse_record(sample["__key__"], {**dict.fromkeys(media), "json": members["json"]}),
            media,
            json.loads(members["json"]),
        )


def answer_of(record):
    return "".join(str(getattr(part, "text", getattr(part, "boxes", ""))) for part in record.messages[-1].parts)


def test_bytes_do_not_depend_on_the_number_of_processes(demo, tmp_path):
    build_demo(tmp_path / "demo", **COUNTS, processes=2)
    names = sorted(str(path.relative_to(demo)) for path in demo.rglob("*") if path.is_file())
    assert names == sorted(str(p.relative_to(tmp_path / "demo")) for p in (tmp_path / "demo").rglob("*") if p.is_file())
    assert len(names) == 1 + 6 + len(TRAIN_KINDS) + len(HELDOUT_TASKS)  # manifest, tokenizer files, shards
    for name in names:
        assert (demo / name).read_bytes() == (tmp_path / "demo" / name).read_bytes(), name


def test_another_seed_gives_other_pictures():
    stencils = Stencils()
    assert make_document(0, "train", "scenes", 5, stencils) != make_document(1, "train", "scenes", 5, stencils)


def test_a_document_does_not_depend_on_what_was_made_before():
    stencils = Stencils()
    for index in range(20):
        make_document(0, "train", "ocr", index, stencils)
    for kind in TRAIN_KINDS:
        assert make_document(0, "train", kind, 7, stencils) == make_document(0, "train", kind, 7, Stencils())


def test_counts_are_kept(demo):
    pictures = Counter()
    for kind in TRAIN_KINDS:
        for _, media, _ in records(demo.glob(f"train/{kind}-*.tar")):
            pictures[kind] += 1 if kind == "text" else len([name for name in media if not name.endswith("mp4")])
    assert pictures["text"] == 60
    # 200 pictures: 50 captions, 30 words, 20 ocr, 8 comparisons of two, 14 chats, the rest scenes
    counts = tuple(pictures[kind] for kind in ("captions", "words", "ocr", "compare", "scenes"))
    assert counts == (50, 30, 20, 16, 70)
    assert len(list(samples(demo / "train/chat-00000.tar"))) == 14
    assert len(list(samples(demo / "train/clips-00000.tar"))) == 12
    manifest = json.loads((demo / "manifest.json").read_text())
    assert manifest["records"]["train/scenes"] == 70
    assert manifest["records"]["heldout/ocr"] == 8
    assert sum(shard["records"] for shard in manifest["shards"]) == sum(manifest["records"].values())


def test_every_record_parses_and_its_media_are_what_it_says(demo):
    suffixes = Counter()
    for record, media, raw in records(demo.rglob("*.tar")):
        used = {part.name for message in record.messages for part in message.parts if isinstance(part, MediaRef)}
        assert used == set(media) == set(record.media)
        assert len(raw["messages"]) == 1 or len(raw["messages"]) % 2 == 0
        for name, data in media.items():
            facts = record.media[name]
            suffixes[name.partition(".")[2]] += 1
            if name.endswith("mp4"):
                with av.open(io.BytesIO(data)) as container:
                    stream = container.streams.video[0]
                    assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
                    assert (stream.width, stream.height) == (facts.width, facts.height)
                    assert stream.average_rate == facts.fps == 8
                    assert float(stream.duration * stream.time_base) == pytest.approx(facts.duration_s)
                    assert sum(1 for _ in container.decode(stream)) == facts.frames
            else:
                assert Image.open(io.BytesIO(data)).size == (facts.width, facts.height)
    assert set(suffixes) == {"jpg", "png", "mp4"}


def test_boxes_and_quads_lie_inside_their_picture(demo):
    seen = Counter()
    for record, _, _ in records(demo.rglob("*.tar")):
        for part in (part for message in record.messages for part in message.parts if isinstance(part, Region)):
            facts = record.media[part.name]
            for values in (*part.boxes, *part.quads):
                seen[len(values)] += 1
                assert min(values) >= 0
                assert max(values[0::2]) <= facts.width
                assert max(values[1::2]) <= facts.height
    assert seen[4] > 150
    assert seen[8] > 10


def test_heldout_records_ask_one_question_of_their_task_and_share_no_medium_with_training(demo):
    train = {data for _, media, _ in records(demo.glob("train/*.tar")) for data in media.values()}
    heldout = []
    for task in HELDOUT_TASKS:
        for record, media, _ in records([demo / f"heldout/{task}-00000.tar"]):
            assert record.task == task
            assert len(record.messages) == (4 if task == "chat" else 2)  # a greeting comes first
            heldout += media.values()
    assert not train & set(heldout)
    assert len(set(heldout)) == len(heldout)


def test_no_constant_answer_does_well_on_heldout_tasks():
    stencils = Stencils()
    limits = {"video_direction": 0.35, "vqa": 0.35}
    for task in ("caption", "referring", "ocr", "vqa", "video_direction", "video_order", "compare"):
        answers = []
        for index in range(200):
            draft = HELDOUT_TASKS[task](Random(f"{task}/{index}"), stencils)
            answers.append(json.dumps(draft.messages[-1]["content"]))
        assert Counter(answers).most_common(1)[0][1] / 200 <= limits.get(task, 0.15), task


def test_a_shape_fills_its_box_and_nothing_else():
    stencils = Stencils()
    for seed in range(60):
        scene = sample_scene(Random(seed), stencils)
        drawn = draw_scene(scene, stencils).astype(int)
        ground = draw_background(scene.background, scene.width, scene.height).astype(int)
        changed = np.abs(drawn - ground).max(axis=2) > 24
        for shape in scene.shapes:
            x1, y1, x2, y2 = shape.box
            rows, columns = np.nonzero(changed[y1:y2, x1:x2])
            # The tip of a triangle is thinner than a pixel, hence 2.
            assert (rows.min() <= 2, columns.min() <= 2) == (True, True)
            assert (rows.max() >= y2 - y1 - 3, columns.max() >= x2 - x1 - 3) == (True, True)
            changed[y1:y2, x1:x2] = False
        assert not changed.any()


def test_scenes_keep_their_rules():
    stencils = Stencils()
    counts = Counter()
    for seed in range(400):
        scene = sample_scene(Random(seed), stencils, word=seed % 2 == 0)
        counts[len(scene.shapes)] += 1
        assert {scene.width, scene.height} <= {80, 100, 120, 140, 160}
        assert (scene.word is not None) == (seed % 2 == 0)
        boxes = [shape.box for shape in scene.shapes] + ([scene.word.box] if scene.word else [])
        for number, (x1, y1, x2, y2) in enumerate(boxes):
            assert 0 <= x1 < x2 <= scene.width
            assert 0 <= y1 < y2 <= scene.height
            assert not any(x1 < b[2] and b[0] < x2 and y1 < b[3] and b[1] < y2 for b in boxes[:number])
        # 34 pixels rounded to whole cells; two patches at least
        assert all(min(shape.box[2] - shape.box[0], shape.box[3] - shape.box[1]) >= 28 for shape in scene.shapes)
        # on the grid: coordinates of 1000 are multiples of 50
        sizes = np.array([scene.width, scene.height] * 2)
        assert all(not (1000 * np.array(shape.box) % (50 * sizes)).any() for shape in scene.shapes)
        middles = [shape.center[0] for shape in scene.shapes]
        assert all(right - left >= 8 for left, right in itertools.pairwise(middles))
        assert len({shape.phrase for shape in scene.shapes}) == len(scene.shapes)
        if scene.word:
            assert scene.word.text in WORDS
            # Capitals at least 16 pixels high, where five letters meet a narrow picture: the left side of the quad.
            assert np.hypot(*np.subtract(scene.word.quad[6:8], scene.word.quad[0:2])) >= 16
    assert min(counts[1], counts[2]) > 100 > counts[3] > 0


def test_a_jpeg_keeps_the_colors_apart():
    stencils = Stencils()
    for seed in range(40):
        scene = sample_scene(Random(seed), stencils)
        picture = np.asarray(Image.open(io.BytesIO(encode_picture(draw_scene(scene, stencils), "jpg")))).astype(int)
        for shape in scene.shapes:
            x = int(shape.center[0])
            y = shape.box[1] + (shape.box[3] - shape.box[1]) // 7  # in the band of a ring, too
            distances = {color: np.abs(picture[y, x] - rgb).sum() for color, rgb in COLORS.items()}
            assert min(distances, key=distances.get) == shape.color


def test_captions_read_from_left_to_right():
    assert join_phrases(["red cross"]) == "a red cross"
    assert join_phrases(["red cross", "blue circle"]) == "a red cross and a blue circle"
    assert join_phrases(["red cross", "blue circle", "cyan square"]) == "a red cross, a blue circle and a cyan square"


def test_a_pair_differs_in_one_shape():
    stencils = Stencils()
    for seed in range(50):
        pair = sample_pair(Random(seed), stencils, differ=seed % 2 == 0)
        first, second = ({shape.phrase for shape in scene.shapes} for scene in pair.scenes)
        if seed % 2:
            assert first == second
        else:
            assert (first - second, second - first) == ({pair.before.phrase}, {pair.after.phrase})


@pytest.mark.parametrize("seed", range(12))
def test_clips_show_what_their_answers_say(seed):
    """The drawn shape is found by its colour in decoded frames half a second apart."""
    clip = sample_clip(Random(seed), "move" if seed % 3 else "appear")
    with av.open(io.BytesIO(encode_clip(clip, Stencils()))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][::4]
    assert len(frames) >= 4
    for actor in clip.actors:
        places = [find_color(frame, actor, clip) for frame in frames]
        visible = [place for place in places if place is not None]
        if actor.direction is None:
            assert len(visible) >= 2
            assert len(visible) == sum(4 * number >= actor.first_frame for number in range(len(frames)))
            continue
        assert len(visible) == len(frames)
        step = np.subtract(visible[-1], visible[0])
        axis = 0 if actor.direction in ("left", "right") else 1
        assert np.sign(step[axis]) == DIRECTIONS[actor.direction][axis]
        # Sampled frames show 3/4 of the way at least: the last one is 4 frames before the end at worst.
        assert abs(step[axis]) >= 0.7 * MIN_TRAVEL * ((clip.width, clip.height)[axis] - actor.side)
        assert abs(step[1 - axis]) <= 3


def find_color(frame, actor, clip):
    """The middle of the pixels of the actor's colour, in its own lane of the clip; None where there are few."""
    near = np.abs(frame.astype(int) - np.add(COLORS[actor.color], actor.ink).clip(0, 255)).max(axis=2) < 40
    for other in clip.actors:
        if other is not actor and other.color == actor.color:
            pytest.skip("two shapes of one colour")
    rows, columns = np.nonzero(near)
    return (columns.mean(), rows.mean()) if len(rows) > 60 else None


def test_the_tokenizer_has_a_token_for_every_word(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer")
    assert len(tokenizer) <= 2048
    for word in (*WORDS, "yes", "no", "left", "right", "up", "down", "two"):
        assert len(tokenizer(word)["input_ids"]) == 1, word
    for word in (*COLORS, *SHAPES, "moves", "appears", "image"):
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word


def test_tokenizer_texts_are_a_function_of_the_seed():
    assert list(demo_texts(3, 5)) == list(demo_texts(3, 5))
    assert list(demo_texts(3, 5)) != list(demo_texts(4, 5))


def test_a_second_build_returns_at_once(demo):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    started = time.monotonic()
    build_demo(demo, **COUNTS, processes=2)
    assert time.monotonic() - started < 1
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_other_settings_replace_the_data(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "demo")
    build_demo(tmp_path / "demo", **{**FEW, "num_clips": 3}, processes=1)
    assert len(list(samples(tmp_path / "demo/train/clips-00000.tar"))) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".demo.lock", "demo"]


def test_a_folder_with_other_data_is_never_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/dear.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="other than demo data"):
        build_demo(tmp_path / "photos", **COUNTS)
    assert (tmp_path / "photos/dear.jpg").read_bytes() == b"x"


def test_an_empty_count_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_clips=0"):
        build_demo(tmp_path / "demo", **{**COUNTS, "num_clips": 0})


def test_progress_counts_pictures_and_clips(tmp_path):
    seen = []
    build_demo(tmp_path / "demo", **FEW, processes=1, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 50 + 4


def test_a_killed_build_is_made_anew(demo, tmp_path):
    """The process is killed when the first shard is there; nothing half made can be taken for the data."""
    script = (
        "import os, pathlib, sys\n"
        "from data_pipelines.sources.demo import build_demo\n"
        "stop = lambda done: os.kill(os.getpid(), 9)\n"
        f"build_demo(pathlib.Path(sys.argv[1]), **{COUNTS!r}, processes=1, progress=stop)\n"
    )
    out = tmp_path / "demo"
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run([sys.executable, "-c", script, str(out)], cwd=root, check=False)
    assert killed.returncode == -9
    assert not out.exists()
    assert (tmp_path / ".demo.building/train/clips-00000.tar").exists()
    build_demo(out, **COUNTS, processes=1)
    for path in demo.rglob("*.tar"):
        assert path.read_bytes() == (out / path.relative_to(demo)).read_bytes()
    assert not (tmp_path / ".demo.building").exists()
