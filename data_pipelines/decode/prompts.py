"""The questions that go with each task, in Qwen-VL's words (its appendix lists one template per task).

They end without a space: the "plain" template puts what separates a prompt from its answer. Chinese captions get the
same sentence with the language named, as in Qwen-VL.
"""

from __future__ import annotations

OCR = "OCR with grounding:"
OBJECTS = "List the objects in the picture with grounding:"
THIS = "This"
VIDEO_CAPTION = "Describe the video:"


def caption(text: str, grounding: bool = False) -> str:
    """The prompt whose answer is the caption `text`; its language is named from the text's own letters."""
    return f"Generate the caption in {language(text)}{' with grounding' if grounding else ''}:"


def vqa(question: str) -> str:
    """The prompt of a short-answer question."""
    return f"{question} Answer:"


def language(text: str) -> str:
    """Chinese where at least a fifth of the letters are Chinese characters, else English."""
    letters = sum(character.isalpha() for character in text)
    chinese = sum("\u4e00" <= character <= "\u9fff" for character in text)
    return "Chinese" if chinese and 5 * chinese >= letters else "English"
