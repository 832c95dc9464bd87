"""Texts → a small Qwen2-VL tokenizer: byte-level BPE with every special token and the published chat template.

In:   an iterable of texts.
Out:  a folder that `transformers.AutoTokenizer.from_pretrained` loads: tokenizer.json, tokenizer_config.json,
      special_tokens_map.json, vocab.json, merges.txt, chat_template.json.
Cost: about a second for 20,000 short texts.

What differs from the published tokenizer is the merges alone. Normalisation (NFC), the splitting pattern (every digit
is a piece of its own), the byte alphabet, the special tokens and their order, padding side and template are
Qwen2-VL's. The special tokens take the last ids; nothing may rely on 151643.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from data_pipelines.errors import UserError

# In the order of the published ids 151643 to 151656.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Qwen2's pattern: \p{N} without a count makes each digit a piece, so coordinates are spelled digit by digit.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MAX_LENGTH = 32_768  # positions of the published models
ALPHABET_SIZE = 256


def train_bpe(texts: Iterable[str], out: Path, vocab_size: int = 2048) -> None:
    """Train a byte-level BPE on `texts` and write it to the folder `out` as a Qwen2-VL tokenizer.

    `vocab_size` bounds all entries, special tokens included; there are fewer where the texts have no more to merge.
    The same texts give the same files.

    Raises:
        UserError: `vocab_size` does not hold the 256 bytes and the special tokens: some text could not be encoded.
    """
    smallest = ALPHABET_SIZE + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"vocab_size={vocab_size}: at least {smallest} (256 bytes and {len(SPECIAL_TOKENS)} specials)")
    tokenizer = _untrained()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Added after training, so they follow the merges as 151643… follow Qwen2's.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    write_published_settings(tokenizer, out)


def write_published_settings(tokenizer: Tokenizer, out: Path) -> None:
    """Write what Qwen2-VL's folders hold beside tokenizer.json, in their form, which transformers 4.45 to 5.x read.

    That is vocab.json, merges.txt, the special tokens' roles, and the chat template where tokenizers (in
    tokenizer_config.json) and processors (chat_template.json) look for it. transformers 5.x itself saves a form whose
    `extra_special_tokens` no 4.x reads.
    """
    tokenizer.model.save(str(out))  # vocab.json, merges.txt
    roles = _token_roles(tokenizer)
    _write_json(out / "special_tokens_map.json", roles)
    _write_json(out / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _write_json(out / "tokenizer_config.json", _config(tokenizer, roles))


def _untrained() -> Tokenizer:
    """Qwen2's processing around an empty BPE."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _token_roles(tokenizer: Tokenizer) -> dict[str, Any]:
    special = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special]
    return {
        "additional_special_tokens": [token for token in special if token != "<|endoftext|>"],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }


def _config(tokenizer: Tokenizer, roles: dict[str, Any]) -> dict[str, Any]:
    """The published tokenizer_config.json with this tokenizer's ids."""
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(number): {flag: getattr(token, flag) for flag in flags}
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        **roles,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": MAX_LENGTH,
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
