"""Cleaning rules: each on hand-written cases, their counts, their configuration, and duplicates."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.samples import Media
from data_pipelines.sources.clean_boxes import MinBoxSide, NestedBoxes
from data_pipelines.sources.cleaning import RULES, clean, make_rule, new_counts, read_rules
from data_pipelines.sources.duplicates import _HashIndex, picture_hash
from data_pipelines.sources.item import Annotations, Grounded, Item, Labelled, MediaSource
from data_pipelines.sources.sample import Sample
from tests.data.sources.conftest import picture_bytes

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "cleaning"


def rule(name, **settings):
    return make_rule("test", {"rule": name, **settings})[1]


def kept(name, *captions, **settings):
    """The captions that a rule leaves."""
    return rule(name, **settings).apply(Sample("k", Annotations(captions=captions))).annotations.captions


def sized(width, height, score=None):
    return Sample("k", Annotations(captions=("x",)), (Media("0.jpg", "image", width, height),), score)


def test_pictures_are_judged_by_shape_and_size():
    assert rule("aspect_ratio", max=3).apply(sized(300, 100)) is not None
    assert rule("aspect_ratio", max=3).apply(sized(100, 301)) is None
    assert rule("picture_size", min_side=64).apply(sized(64, 64)) is not None
    assert rule("picture_size", min_side=64).apply(sized(63, 640)) is None
    assert rule("picture_size", min_side=1, min_pixels=10_000).apply(sized(100, 99)) is None


def test_similarity_counts_only_where_the_source_has_it():
    assert rule("similarity", min=0.3).apply(sized(9, 9, 0.29)) is None
    assert rule("similarity", min=0.3).apply(sized(9, 9, 0.3)) is not None
    assert rule("similarity", min=0.3).apply(sized(9, 9)) is not None
    assert rule("similarity", min=0.3, required=True).apply(sized(9, 9)) is None


def test_languages_look_at_letters_only():
    captions = ("A café, 5 € & 10% – ok!", "一只狗 dog", "Это собака", "犬です", "αβγ", "…")
    assert kept("languages", *captions) == ("A café, 5 € & 10% – ok!", "一只狗 dog", "…")
    assert kept("languages", *captions, allowed=["english"]) == ("A café, 5 € & 10% – ok!", "…")
    assert kept("languages", "café", "cafe", accents=False) == ("cafe",)


def test_emoji_are_found_and_ordinary_symbols_are_not():
    assert kept("emoji", "nice 👍", "flag 🇩🇪", "sun ☀️", "1 + 1 = 2 → ok ©", "中文") == ("1 + 1 = 2 → ok ©", "中文")


def test_text_length_counts_characters_and_words():
    captions = ("abc", "four words are here", "x" * 30, "一只小狗")
    assert kept("text_length", *captions, min_chars=4, max_chars=25) == ("four words are here", "一只小狗")
    assert kept("text_length", *captions, min_chars=1, min_words=4) == ("four words are here", "一只小狗")


def test_html_is_taken_out():
    captions = ("<b>Red</b>&nbsp;&amp; blue<br/>car", "a < b and c > d", "<!-- x --><script>f()</script>", "2 &lt; 3")
    assert kept("html_remains", *captions) == ("Red & blue car", "a < b and c > d", "2 < 3")


def test_odd_patterns_are_taken_out():
    told = "Photo of a cat IMG_1234.jpg see https://x.y/z?a=1 #cats !!!! now\u200b"
    assert kept("odd_patterns", told, "DSC00012", "at 10.5% (fine)...") == (
        "Photo of a cat see ! now",
        "at 10.5% (fine).",
    )
    assert kept("odd_patterns", "a [stock] b", extra=[r"\[stock\]"]) == ("a b",)


def test_special_tags_drop_the_caption():
    captions = ("<PERSON> on a bike", "a <b>bold</b> one", "<|im_end|> x", "an [UNK] word", "a [b]")
    assert kept("special_tags", *captions) == ("a <b>bold</b> one", "a [b]")


def test_the_longest_caption_stays():
    assert kept("longest_caption", "one", "three", "seven") == ("three",)


def test_grounded_captions_are_dropped_where_they_would_change():
    spans = ((0, 1, ((0.0, 0.0, 9.0, 9.0),)),)
    told = Annotations(grounded=(Grounded("<b>x</b>", spans), Grounded("x", spans)))
    assert rule("html_remains").apply(Sample("k", told)).annotations.grounded == (Grounded("x", spans),)


def test_nested_boxes_go_so_that_most_stay():
    around, a, b, apart = (0, 0, 100, 100), (10, 10, 20, 20), (30, 30, 40, 40), (200, 0, 210, 10)
    half = (95, 0, 105, 100)
    assert NestedBoxes().choose(sorted([around, a, b, apart, half])) == {a, b, apart, half}
    assert NestedBoxes().choose([around, a]) == {a}  # of equals the larger goes
    assert NestedBoxes(inside=0.5).choose([around, half]) == {half}
    chain = [(0, 0, 90, 90), (0, 0, 60, 60), (0, 0, 30, 30)]  # each inside the ones before: one can stay
    assert NestedBoxes().choose(chain) == {(0, 0, 30, 30)}


def test_boxes_leave_with_their_phrases():
    small, big = (0.0, 0.0, 1.0, 9.0), (0.0, 0.0, 9.0, 9.0)
    told = Annotations(
        objects=(Labelled("a", (small, big)), Labelled("b", (small,))),
        referring=(Labelled("c", (small, big)), Labelled("d", (big,))),
        grounded=(Grounded("e f", ((0, 1, (small,)), (2, 3, (big,)))), Grounded("g", ((0, 1, (small,)),))),
    )
    assert MinBoxSide(2.0).apply(Sample("k", told)).annotations == Annotations(
        captions=("g",),  # no box of it is left: a caption like any other
        objects=(Labelled("a", (big,)),),
        referring=(Labelled("d", (big,)),),
        grounded=(Grounded("e f", ((2, 3, (big,)),)),),
    )


def test_rules_are_counted_before_and_after_and_name_themselves():
    rules = [make_rule("r", {"rule": "html_remains"}), make_rule("r", {"rule": "text_length", "min_chars": 3})]
    counts = new_counts(rules)
    assert clean(Sample("a", Annotations(captions=("<b>dog</b>", "x"))), rules, counts).annotations.captions == ("dog",)
    assert clean(Sample("b", Annotations(captions=("x",))), rules, counts) == "text_length"
    html, length = counts
    assert (html.samples_before, html.samples_after, html.captions_before, html.captions_after) == (2, 2, 3, 3)
    assert (html.changed, length.changed) == (1, 0)
    assert (length.samples_before, length.samples_after, length.captions_before, length.captions_after) == (2, 1, 3, 1)
    assert length.settings == {"min_chars": 3, "max_chars": 1000, "min_words": 0}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rules: [{rule: aspect_rato}]", "known: aspect_ratio"),
        ("rules: [{rule: aspect_ratio, maximum: 3}]", "it has max"),
        ("rules: [{rule: aspect_ratio, max: wide}]", "'wide': needs float"),
        ("rules: [{rule: aspect_ratio, max: 0.5}]", "at least 1"),
        ("rules: [{rule: text_length, min_chars: true}]", "needs int"),
        ("rules: [{rule: languages, allowed: [french]}]", "english, chinese"),
        ("rules: [{rule: odd_patterns, extra: ['(']}]", "no regular expression"),
        ("rules: 5", "needs `rules:`"),
        ("rules: [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_rules_file_says_what_is_known(tmp_path, content, words):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"yaml|known|least|english|regular") as caught:
        read_rules(tmp_path / "r.yaml")
    assert words in str(caught.value)


def test_the_given_rules_files_can_be_read():
    named = {name for path in CONFIGS.glob("*.yaml") for name, _ in read_rules(path)}
    assert named == set(RULES)


def noisy(seed, path, size=(160, 120), quality=90):
    """A picture of smooth random blobs."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, quality=quality)
    return path


def test_pictures_that_look_alike_have_near_hashes(tmp_path):
    def of(*arguments, **options):
        return picture_hash(noisy(*arguments, **options).read_bytes(), "k")

    first = of(0, tmp_path / "a.jpg")
    same = of(0, tmp_path / "b.jpg", size=(320, 240), quality=40)
    other = of(1, tmp_path / "c.jpg")
    assert (first ^ same).bit_count() <= 3
    assert (first ^ other).bit_count() >= 15
    Image.new("RGB", (50, 50), "red").save(tmp_path / "d.png")
    assert picture_hash((tmp_path / "d.png").read_bytes(), "k") is None


def test_the_hash_index_finds_exactly_what_lies_within_the_distance():
    rng = np.random.default_rng(3)
    values = [int(value) >> 1 for value in rng.integers(0, 1 << 63, 200)]
    values += [
        value ^ (1 << int(a)) ^ (1 << int(b))
        for value, a, b in zip(values, *rng.integers(0, 60, (2, 200)), strict=False)
    ]
    index = _HashIndex(2)
    for number, value in enumerate(values):
        expected = [i for i in range(number) if (values[i] ^ value).bit_count() <= 2]
        assert index.find(value, b"") == (str(expected[0]) if expected else None)
        index.add(value, str(number), b"")


def test_duplicates_leave_the_first_and_are_told(tmp_path, make_picture, load):
    paths = [noisy(0, tmp_path / "a.jpg"), noisy(0, tmp_path / "b.jpg", quality=50), noisy(1, tmp_path / "c.jpg")]
    told = [("a", 0, "x"), ("a2", 0, "x"), ("b", 1, "x"), ("b2", 1, "y"), ("c", 2, "x")]

    def items():
        for key, number, caption in told:
            media = (MediaSource(key, "image", paths[number]),)
            yield Item(key, Annotations(captions=(caption,)), media)

    def imported(**settings):
        return load(items(), rules=(make_rule("r", settings),))

    exact = imported(rule="exact_duplicates")
    assert exact.reasons() == [("a2", "exact_duplicates")]
    assert list(exact.records) == ["a", "b", "b2", "c"]
    near = imported(rule="near_duplicates", max_distance=3)
    assert list(near.records) == ["a", "c"]
    assert near.manifest["cleaning"][0]["samples_before"] == 5
    assert near.manifest["cleaning"][0]["samples_after"] == 2
    assert list(imported(rule="near_duplicates", same_text=True).records) == ["a", "b2", "c"]


def test_an_import_with_rules_counts_and_tells_what_they_dropped(tmp_path, make_picture, load):
    (tmp_path / "a.jpg").write_bytes(picture_bytes(80, 20))
    (tmp_path / "b.jpg").write_bytes(picture_bytes(40, 20))
    items = [
        Item(
            name,
            Annotations(captions=("short", "a longer one")),
            (MediaSource(name, "image", tmp_path / f"{name}.jpg"),),
        )
        for name in ("a", "b")
    ]
    rules = (make_rule("r", {"rule": "aspect_ratio", "max": 3}), make_rule("r", "longest_caption"))
    for processes in (1, 2):
        imported = load(items, rules=rules, max_records=1, processes=processes)
        assert imported.reasons() == [("a", "aspect_ratio")]
        assert [m.parts[-1].text for m in imported.only().messages] == [
            "Generate the caption in English:",
            "a longer one",
        ]
        shape, longest = imported.manifest["cleaning"]
        assert (shape["rule"], shape["samples_before"], shape["samples_after"]) == ("aspect_ratio", 2, 1)
        assert (longest["captions_before"], longest["captions_after"]) == (2, 1)


def test_a_caption_that_a_rule_leaves_without_boxes_counts_as_kept_not_as_rewritten():
    told = Annotations(captions=("x",), grounded=(Grounded("g", ((0, 1, ((0.0, 0.0, 1.0, 9.0),)),)),))
    rules = [make_rule("r", {"rule": "min_box_side"})]
    (count,) = counts = new_counts(rules)
    assert clean(Sample("k", told), rules, counts).annotations == Annotations(captions=("x", "g"))
    assert (count.captions_before, count.captions_after, count.changed) == (2, 2, 0)
