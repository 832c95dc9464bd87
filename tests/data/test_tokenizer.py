import json
import pickle
import random
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from data_pipelines.tokenizer import SpecialTokens, TextTokenizer


def test_special_ids_come_from_the_folder(tokenizer):
    for name in SpecialTokens.names():
        assert getattr(tokenizer.special, name[2:-2]) == tokenizer.hf.convert_tokens_to_ids(name)
    assert tokenizer.vocab_size == len(tokenizer.hf)


def test_special_token_strings_in_text_stay_text(tokenizer):
    special = {getattr(tokenizer.special, name[2:-2]) for name in SpecialTokens.names()}
    for name in SpecialTokens.names():
        for text in (name, f"a{name}b", f" {name}\n{name}", name[:-1] + name, f"{name[0]}{name}"):
            ids = tokenizer.encode(text)
            assert not special & set(ids)
            assert tokenizer.decode(ids) == text


def test_plain_text_gets_the_ids_that_transformers_gives(tokenizer):
    letters = [*"abc XYZ 019.,!?\n\t'é你好🙂\u00a0", "  ", "\r\n", "'s", "e\u0301", "<|", "|>"]
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choices(letters, k=generator.randrange(1, 30)))
        assert tokenizer.encode(text) == tokenizer.hf.encode(text, add_special_tokens=False), repr(text)


def test_decode_writes_special_tokens_unless_told_to_skip(tokenizer):
    ids = [tokenizer.special.im_start, *tokenizer.encode("user"), tokenizer.special.im_end]
    assert tokenizer.decode(ids) == "<|im_start|>user<|im_end|>"
    assert tokenizer.decode(ids, skip_special=True) == "user"


def test_a_pickled_copy_is_as_careful(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode("x<|im_end|>y") == tokenizer.encode("x<|im_end|>y")


def test_half_a_character_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="UTF-8"):
        tokenizer.encode("broken \ud83d")


def test_missing_folder_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        TextTokenizer(tmp_path / "nowhere")


def test_broken_file_is_reported(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="not a tokenizer file"):
        TextTokenizer(tmp_path)


def test_missing_special_token_is_named(tokenizer_path, tmp_path):
    content = json.loads((tokenizer_path / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|quad_end|>"]
    content["model"]["vocab"].pop("<|quad_end|>", None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"<\|quad_end\|> is missing"):
        TextTokenizer(tmp_path)


def test_special_token_that_text_could_make_is_refused(tokenizer_path, tmp_path):
    shutil.copytree(tokenizer_path, tmp_path, dirs_exist_ok=True)
    content = json.loads((tokenizer_path / "tokenizer.json").read_text())
    next(t for t in content["added_tokens"] if t["content"] == "<|im_end|>")["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the text <\|im_end\|> becomes a special token"):
        TextTokenizer(tmp_path)


def test_published_tokenizer(shared_data):
    published = TextTokenizer(shared_data / "tokenizer")
    assert published.special == SpecialTokens(
        endoftext=151643,
        im_start=151644,
        im_end=151645,
        vision_start=151652,
        vision_end=151653,
        image_pad=151655,
        video_pad=151656,
        object_ref_start=151646,
        object_ref_end=151647,
        box_start=151648,
        box_end=151649,
        quad_start=151650,
        quad_end=151651,
    )
    assert published.vocab_size == 151657
    text = "The quick brown fox, 你好 1234\n\n  'tis <b>é</b>"
    assert published.encode(text) == published.hf.encode(text)
    check_points(published)


def check_points(tokenizer):
    generator = random.Random(2)
    for count in (1, 2, 4):
        for _ in range(50):
            points = [(generator.randrange(1000), generator.randrange(1000)) for _ in range(count)]
            assert tokenizer.encode_points(points) == tokenizer.encode(",".join(f"({x},{y})" for x, y in points))


def test_points_get_the_ids_of_their_text(tokenizer):
    check_points(tokenizer)


def test_points_are_right_where_digits_merge(tmp_path):
    # A tokenizer without Qwen2's splitting: "),(1" and "12" can be single tokens.
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(["(123,456),(123,456),(12,12)"] * 9, trainer)
    backend.add_special_tokens([AddedToken(name, special=True) for name in SpecialTokens.names()])
    backend.save(str(tmp_path / "tokenizer.json"))
    merging = TextTokenizer(tmp_path)
    assert merging.encode_points([(123, 456), (12, 12)]) == merging.encode("(123,456),(12,12)")
