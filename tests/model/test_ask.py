"""Asking a model folder: media in order, GIFs both ways, boxes drawn, and clear errors."""

import argparse
import io

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.config import MediaConfig
from data_pipelines.encode.boxes import to_pixels
from data_pipelines.samples import MediaKind
from data_pipelines.sources.bpe import train_bpe
from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train import ask
from qwen2vl_train.ask import MediaFile, add_arguments, draw_answer, read_limits
from qwen2vl_train.model.config import ModelConfig, TextConfig, VisionConfig
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise, model_tensors, save_hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model with a tokenizer, and pictures beside it."""
    folder = tmp_path_factory.mktemp("model")
    train_bpe(["a red dog sits on the green hill"] * 3, folder, vocab_size=300)
    tokenizer = TextTokenizer(folder)
    special = tokenizer.special
    config = ModelConfig(
        VisionConfig(1, 32, 2),
        TextConfig(tokenizer.vocab_size, 32, 64, 1, 2, 1, mrope_section=(2, 3, 3), max_position_embeddings=600),
    ).with_token_ids(special)
    model = Qwen2VL(config)
    initialise(model, 0, std=0.3)
    save_hf(model_tensors(model), folder, config, torch.float32)
    frames = [Image.fromarray(np.full((40, 60, 3), 60 * n, np.uint8)) for n in range(4)]
    frames[0].save(folder / "a.png")
    frames[0].save(folder / "b.gif", save_all=True, append_images=frames[1:], duration=250)
    return folder


def command(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers())
    return parser.parse_args(["generate", *words])


def prompts(monkeypatch) -> list:
    """What reaches generation, recorded."""
    seen = []
    original = ask.generate

    def recording(model, encoded, *arguments):
        seen.extend(encoded)
        return original(model, encoded, *arguments)

    monkeypatch.setattr(ask, "generate", recording)
    return seen


def test_media_come_in_the_order_they_are_named(folder, monkeypatch, capsys):
    seen = prompts(monkeypatch)
    options = command(
        "--model", str(folder), "--prompt", "what is it", "--max-new-tokens", "5",
        "--video", str(folder / "b.gif"), "--image", str(folder / "a.png"), "--image", str(folder / "b.gif"),
    )  # fmt: skip
    assert options.run(options) == 0
    assert [plan.kind for plan in seen[0].media] == ["video", "image", "image"]
    tokenizer = TextTokenizer(folder)
    text = tokenizer.decode(seen[0].input_ids.tolist())
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("what is it<|im_end|>\n<|im_start|>assistant\n")
    assert text.index("<|video_pad|>") < text.index("<|image_pad|>")
    assert capsys.readouterr().out.strip()


def test_media_are_numbered_where_the_model_learnt_them_so(folder, monkeypatch):
    seen = prompts(monkeypatch)
    media = ("--image", str(folder / "a.png"), "--image", str(folder / "a.png"))
    options = command("--model", str(folder), "--prompt", "what", "--max-new-tokens", "1", "--vision-ids", *media)
    assert options.run(options) == 0
    text = TextTokenizer(folder).decode(seen[0].input_ids.tolist())
    assert text.index("Picture 1: <|vision_start|>") < text.index("Picture 2: <|vision_start|>")


def test_a_gif_is_a_picture_or_a_clip(folder, monkeypatch):
    seen = prompts(monkeypatch)
    assistant = ask.Assistant(folder)
    kinds: tuple[MediaKind, MediaKind] = ("image", "video")
    for kind in kinds:
        assistant.answer("what", [MediaFile(folder / "b.gif", kind)], max_new_tokens=2)
    assistant.close()
    assert [(prompt.media[0].kind, prompt.media[0].num_frames) for prompt in seen] == [("image", 1), ("video", 4)]


def test_the_folders_own_limits_are_used(folder):
    assert read_limits(folder) == MediaConfig()
    (folder / "preprocessor_config.json").write_text('{"min_pixels": 784, "max_pixels": 1568}')
    (folder / "video_preprocessor_config.json").write_text('{"max_pixels": 3136, "fps": 1.0, "max_frames": 8}')
    limits = read_limits(folder)
    (folder / "preprocessor_config.json").unlink()
    (folder / "video_preprocessor_config.json").unlink()
    assert (limits.min_pixels, limits.max_pixels) == (784, 1568)
    assert (limits.video_max_pixels, limits.fps, limits.max_frames) == (3136, 1.0, 8)


def test_a_long_answers_room_is_kept_free_of_media(folder, monkeypatch):
    seen = prompts(monkeypatch)
    assistant = ask.Assistant(folder)
    big = io.BytesIO()
    Image.fromarray(np.zeros((900, 900, 3), np.uint8)).save(big, "PNG")
    (folder / "big.png").write_bytes(big.getvalue())
    assistant.answer("what", [MediaFile(folder / "big.png", "image")], max_new_tokens=300)
    assistant.close()
    assert len(seen[0].input_ids) + 300 <= 600


def test_boxes_and_quads_are_drawn_where_they_are():
    answer = (
        "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(100,200),(500,600)<|box_end|>"
        "<|box_start|>(0,0),(50,50)<|box_end|> and <|quad_start|>(700,700),(900,700),(900,900),(700,900)<|quad_end|>"
    )
    picture = Image.fromarray(np.full((200, 400, 3), 255, np.uint8))
    drawn, count = draw_answer(picture, answer)
    assert count == 3
    assert np.asarray(picture).min() == 255  # the original stays clean
    pixels = np.asarray(drawn)
    for x, y in ((300, 200), (500, 400), (0, 25), (900, 800)):  # on the edges, in thousandths
        row, column = round(to_pixels(y, 200)), round(to_pixels(x, 400))
        assert (pixels[row - 2 : row + 3, max(0, column - 2) : column + 3] != 255).any(), (x, y)
    assert (pixels[130:, :270] == 255).all()
    assert draw_answer(picture, "bare (1,2),(30,40) box")[1] == 1
    assert draw_answer(picture, "nothing here")[1] == 0


def test_the_drawing_is_written(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ask.Assistant, "answer", lambda *_: "<|box_start|>(10,20),(300,400)<|box_end|>")
    options = command("--model", str(folder), "--prompt", "where", "--image", str(folder / "a.png"),
                      "--draw", str(tmp_path / "out.png"))  # fmt: skip
    assert options.run(options) == 0
    assert Image.open(tmp_path / "out.png").size == (60, 40)
    assert "1 places drawn" in capsys.readouterr().out


def test_bad_requests_are_explained(folder, tmp_path):
    def run(*words: str) -> None:
        options = command("--prompt", "x", *words)
        options.run(options)

    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        run("--model", str(folder), "--image", str(tmp_path / "none.jpg"))
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        run("--model", str(tmp_path))
    with pytest.raises(ValueError, match="exactly one --image"):
        run("--model", str(folder), "--draw", "out.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="not_an_image"):
        run("--model", str(folder), "--image", str(tmp_path / "broken.png"))
