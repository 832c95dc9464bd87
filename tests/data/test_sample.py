import io
import pickle

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.config import MediaConfig
from data_pipelines.encode.chat import TokenizedText
from data_pipelines.encode.patches import image_to_patches, resize_image
from data_pipelines.encode.sample import SampleEncoder, expand
from data_pipelines.errors import BudgetError, MediaError, PlanMismatch, RecordError
from data_pipelines.samples import IGNORE_INDEX, Media, MediaPlan, MediaRef, Message, Record, Region, Text

RNG = np.random.default_rng(0)


def picture(width, height, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, form)
    return file.getvalue()


def clip(count=20, width=64, height=48):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(count):
            pixels = np.full((height, width, 3), 10 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


MEMBERS = {"0.png": picture(224, 224), "1.jpg": picture(300, 100, "JPEG"), "0.mp4": clip()}
MEDIAS = {
    "0.png": Media("0.png", "image", 224, 224),
    "1.jpg": Media("1.jpg", "image", 300, 100),
    "0.mp4": Media("0.mp4", "video", 64, 48, 20, 10.0, 2.0),
}
CONFIG = MediaConfig(video_min_pixels=4 * 784, video_max_pixels=16 * 784)


def record(*turns, medias=MEDIAS):
    messages = tuple(
        Message(role, tuple(Text(part) if isinstance(part, str) else part for part in parts)) for role, *parts in turns
    )
    return Record("shard/7", "chat", messages, dict(medias))


CAPTION = record(("user", MediaRef("0.png"), "what?"), ("assistant", "a red dog"))
MIXED = record(
    ("user", MediaRef("1.jpg"), MediaRef("0.mp4"), "compare ", Region("1.jpg", "the cat", ((0, 0, 30, 50),))),
    ("assistant", "no"),
    ("user", MediaRef("0.png"), MediaRef("1.jpg", max_pixels=4 * 784)),
    ("assistant", Region("0.png", None, ((10, 20, 30, 40),))),
)


@pytest.fixture
def encoder(tokenizer):
    encoder = SampleEncoder(tokenizer, "chatml", CONFIG, max_tokens=2048)
    yield encoder
    encoder.close()


def read(name):
    return MEMBERS[name]


def test_an_image_of_224_pixels_takes_66_tokens_with_its_tags(encoder):
    document, events = encoder.encode(CAPTION, read, dataset=3)
    special = encoder.tokenizer.special
    ids = document.input_ids.tolist()
    start = ids.index(special.vision_start)
    assert ids[start : start + 66] == [special.vision_start, *[special.image_pad] * 64, special.vision_end]
    assert ids.count(special.image_pad) == 64
    assert document.media == (MediaPlan("image", (1, 16, 16), 1),)
    assert [tuple(patches.shape) for patches in document.patches] == [(256, 588)]
    assert (document.key, document.dataset, events) == ("shard/7", 3, [])


def test_patches_are_the_images_own_bytes(encoder):
    document, _ = encoder.encode(CAPTION, read)
    rgb = np.array(Image.open(io.BytesIO(MEMBERS["0.png"])))
    assert torch.equal(document.patches[0], image_to_patches(resize_image(rgb, 224, 224)))
    assert document.patches[0].dtype == torch.uint8
    assert document.patches[0].is_contiguous()


def test_labels_are_the_answer_and_its_end(encoder):
    document, _ = encoder.encode(CAPTION, read)
    learnt = document.labels != IGNORE_INDEX
    assert torch.equal(document.labels[learnt], document.input_ids[learnt])
    assert encoder.tokenizer.decode(document.labels[learnt].tolist()) == "a red dog<|im_end|>"


@pytest.mark.parametrize("template", ["plain", "chatml"])
@pytest.mark.parametrize("max_tokens", [2048, 150, 120])
def test_encoding_keeps_what_counting_promised(tokenizer, template, max_tokens):
    encoder = SampleEncoder(tokenizer, template, CONFIG, max_tokens)
    for rec in (CAPTION, MIXED, record(("assistant", "long text " * 400))):
        counts = encoder.count(rec)
        document, events = encoder.encode(rec, read)
        assert document.input_ids.shape == document.labels.shape == (counts.num_tokens,)
        assert counts.num_tokens <= max_tokens
        assert document.media == counts.plans
        assert counts.num_patches == sum(plan.num_patches for plan in counts.plans)
        assert counts.num_tokens == counts.text_tokens + counts.num_patches // 4
        for plan, patches in zip(counts.plans, document.patches, strict=True):
            assert tuple(patches.shape) == (plan.num_patches // (2 if plan.kind == "video" else 1), 588) or (
                plan.kind == "video" and tuple(patches.shape) == (plan.num_patches, 1176)
            )
        assert bool(events) == (any(plan.shrunk for plan in counts.plans) or not counts.plans)
    encoder.close()


def test_media_shrinks_to_fit_and_is_reported(tokenizer):
    encoder = SampleEncoder(tokenizer, "plain", CONFIG, 50)
    document, events = encoder.encode(CAPTION, read)
    assert document.input_ids.shape[0] <= 50
    assert [(event.key, event.reason, event.dataset) for event in events] == [("shard/7", "shrunk", "")]
    assert "0.png: 1 frames of" in events[0].message


def test_long_text_is_shortened_at_its_end_and_reported(tokenizer):
    encoder = SampleEncoder(tokenizer, "plain", CONFIG, 16)
    text = "a red dog and a cat " * 20
    document, events = encoder.encode(record(("assistant", text)), read)
    assert document.input_ids.tolist() == tokenizer.encode(text)[:16]
    assert (document.labels[1:] == document.input_ids[1:]).all()
    assert document.labels[0] == IGNORE_INDEX
    assert [event.reason for event in events] == ["truncated"]


def test_text_is_never_cut_where_it_answers(tokenizer):
    encoder = SampleEncoder(tokenizer, "plain", CONFIG, 16)
    rec = record(("user", "a"), ("assistant", "a red dog " * 20))
    for call in (lambda: encoder.encode(rec, read), lambda: encoder.count(rec)):
        with pytest.raises(BudgetError, match=r"^shard/7: "):
            call()


def test_clip_frames_become_pairs(encoder):
    rec = record(("user", MediaRef("0.mp4")), ("assistant", "x"))
    document, _ = encoder.encode(rec, read)
    assert document.media == (MediaPlan("video", (2, 4, 4), 4),)  # 2 s at 2 fps: 4 frames
    patches = document.patches[0].reshape(2, 16, 3, 2, 196).float().mean((1, 2, 4))
    # Frames 0, 6, 13, 19 of grey 0, 60, 130, 190.
    assert patches.flatten().tolist() == pytest.approx([0, 60, 130, 190], abs=3)


def test_a_picture_of_another_size_than_planned_is_an_error(encoder):
    lying = {**MEDIAS, "0.png": Media("0.png", "image", 448, 224)}
    with pytest.raises(MediaError, match=r"shard/7: 0.png decodes to 224 x 224 .* 448 x 224.*\[size_mismatch\]"):
        encoder.encode(record(("user", MediaRef("0.png")), ("assistant", "x"), medias=lying), read)
    with pytest.raises(MediaError, match="size_mismatch"):
        encoder.encode(CAPTION, read, medias=lying)


def test_facts_given_replace_those_of_the_record(encoder):
    lying = record(*(), medias={}).media
    rec = Record("k", "caption", CAPTION.messages, lying)
    assert encoder.encode(rec, read, medias=MEDIAS)[0].media == (MediaPlan("image", (1, 16, 16), 1),)


def test_missing_facts_are_probed(encoder):
    rec = record(("user", MediaRef("1.jpg"), MediaRef("0.mp4")), ("assistant", "x"), medias={})
    document, _ = encoder.encode(rec, read)
    assert [plan.kind for plan in document.media] == ["image", "video"]
    with pytest.raises(RecordError, match="unknown_media"):
        encoder.count(rec)


def test_a_gif_is_a_clip_where_the_part_says_so(encoder):
    file = io.BytesIO()
    frames = [Image.new("L", (56, 56), 25 * number) for number in range(8)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=500)
    for kind, expected in (("image", (1, 4, 4)), ("video", (4, 4, 4))):
        rec = record(("user", MediaRef("0.gif", kind=kind)), ("assistant", "x"), medias={})
        document, _ = encoder.encode(rec, lambda name: file.getvalue())
        assert document.media[0].grid_thw == expected


def test_too_many_bytes_are_refused_before_decoding(tokenizer):
    encoder = SampleEncoder(tokenizer, "plain", MediaConfig(max_source_bytes=100), 2048)
    with pytest.raises(MediaError, match=r"0.png has \d+ bytes, over max_source_bytes=100"):
        encoder.encode(CAPTION, read)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_too_many_pixels_are_refused_before_decoding(tokenizer, kind):
    encoder = SampleEncoder(tokenizer, "plain", MediaConfig(max_source_pixels=1000), 2048)
    name = {"image": "0.png", "video": "0.mp4"}[kind]
    with pytest.raises(MediaError, match="too_many_pixels"):
        encoder.encode(record(("user", MediaRef(name)), ("assistant", "x")), read)


def test_broken_media_is_an_error_with_the_key(encoder):
    for name in ("0.png", "0.mp4"):
        with pytest.raises(MediaError, match=r"^shard/7: "):
            encoder.encode(record(("user", MediaRef(name)), ("assistant", "x")), lambda name: MEMBERS[name][:200])


def test_prompt_is_the_beginning_of_the_document(encoder):
    for rec in (CAPTION, MIXED):
        document, _ = encoder.encode(rec, read)
        prompt = encoder.encode_prompt(rec, read)
        assert document.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()
        assert (prompt.labels == IGNORE_INDEX).all()
        assert encoder.tokenizer.decode(prompt.input_ids.tolist()).endswith("<|im_start|>assistant\n")
        assert all(torch.equal(a, b) for a, b in zip(prompt.patches, document.patches, strict=True))


def test_prompt_leaves_room_for_the_answer(tokenizer):
    encoder = SampleEncoder(tokenizer, "plain", CONFIG, 100)
    assert encoder.encode_prompt(CAPTION, read).input_ids.shape[0] <= 100
    assert encoder.encode_prompt(CAPTION, read, reserve_tokens=60).input_ids.shape[0] <= 40


def test_encoder_travels_to_workers_without_its_decoder(encoder):
    encoder.encode(MIXED, read)
    copy = pickle.loads(pickle.dumps(encoder))
    first, second = encoder.encode(MIXED, read)[0], copy.encode(MIXED, read)[0]
    assert torch.equal(first.input_ids, second.input_ids)
    assert all(torch.equal(a, b) for a, b in zip(first.patches, second.patches, strict=True))
    copy.close()


def test_pads_are_repeated_in_place(tokenizer):
    special = tokenizer.special
    text = TokenizedText(
        [special.vision_start, special.image_pad, special.vision_end, 5, special.video_pad, 6],
        [False, False, False, True, False, True],
        (MediaRef("a"), MediaRef("b")),
    )
    plans = (MediaPlan("image", (1, 2, 4), 1), MediaPlan("video", (3, 2, 2), 6))
    ids, labels = expand(text, plans, special)
    i, v = special.image_pad, special.video_pad
    assert ids.tolist() == [special.vision_start, i, i, special.vision_end, 5, v, v, v, 6]
    assert labels.tolist() == [-100, -100, -100, -100, 5, -100, -100, -100, 6]
    with pytest.raises(PlanMismatch):
        expand(text, plans[:1], special)
