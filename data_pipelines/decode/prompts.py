"""The questions that go with each task, in Qwen-VL's words (its appendix lists one template per task).

They end without a space: the "plain" template puts what separates a prompt from its answer. Chinese captions get the
same sentence with the language named, as in Qwen-VL.
"""

from __future__ import annotations

from collections.abc import Sequence

OCR = "OCR with grounding:"
READ = "OCR:"
TEXT_PLACES = "Find the text in the picture:"
OBJECT_PLACES = "Find the objects in the picture:"
OBJECTS = "List the objects in the picture with grounding:"
THIS = "This"
IS = " is"
VIDEO_CAPTION = "Describe the video:"
VIDEO_CAPTION_ZH = "描述这个视频："
CLASS = "What is the main object in the picture? Answer:"


def caption(text: str, grounding: bool = False) -> str:
    """The prompt whose answer is the caption `text`; its language is named from the text's own letters."""
    return f"Generate the caption in {language(text)}{' with grounding' if grounding else ''}:"


def another_caption(text: str, grounding: bool = False) -> str:
    """The prompt of a picture's second and further captions, so that equal prompts never have different answers."""
    return f"Generate another caption in {language(text)}{' with grounding' if grounding else ''}:"


def video_caption(text: str) -> str:
    """The prompt whose answer is the clip's caption `text`."""
    return VIDEO_CAPTION_ZH if language(text) == "Chinese" else VIDEO_CAPTION


def fields(names: Sequence[str]) -> str:
    """The prompt that asks for named values of a document, answered as JSON."""
    return f"Extract {', '.join(names)} as JSON:"


def choose(question: str, choices: Sequence[str]) -> str:
    """The prompt of a multiple-choice question; the answer repeats the right choice."""
    return f"{question} Choose from: {'; '.join(choices)}. Answer:"


def vqa(question: str) -> str:
    """The prompt of a short-answer question."""
    return f"{question} Answer:"


def language(text: str) -> str:
    """Chinese where at least a fifth of the letters are Chinese characters, else English."""
    letters = sum(character.isalpha() for character in text)
    chinese = sum("\u4e00" <= character <= "\u9fff" for character in text)
    return "Chinese" if chinese and 5 * chinese >= letters else "English"
