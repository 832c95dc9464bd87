"""Objects of JSON files beside a media folder → records: media named by path, in our own form or that of chats.

    {"image": "a.jpg", "caption": "a dog", "boxes": [{"phrase": "a dog", "box": [x1, y1, x2, y2]}], "quads": [...]}
    {"messages": [{"role": "user", "content": "<image>What?"}, ...], "images": ["a.jpg"], "videos": [...]}
    {"text": "..."}

and whatever `chat_forms` reads. Boxes are corners in pixels of the picture as displayed. An object with a wrong box is
refused as a whole: who writes this form for training means every box. "width" and "height", where given, must be the
picture's. Here names stay names: who opens the files resolves them. Costs about 50 us an object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipelines.decode.chat_forms import read_chat
from data_pipelines.decode.fields import shown, text
from data_pipelines.decode.members import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, extension, media_kind
from data_pipelines.decode.record import record_of
from data_pipelines.decode.short_form import FORMS, expand_short_form, no_content
from data_pipelines.errors import MediaError
from data_pipelines.samples import Media, MediaKind, Record

GRID = 1000
_WITHIN = {  # by the count of numbers: a box, and a quad clockwise from its top left
    4: (0.25, 0.25, 0.75, 0.75),
    8: (0.25, 0.25, 0.75, 0.25, 0.75, 0.75, 0.25, 0.75),
}


@dataclass(frozen=True, slots=True)
class WrittenRecord:
    """One object before its media are opened: `messages` in record form, whose media parts name `media` by number.

    `media` are (kind, name as written); `size` is (width, height) as the object declares them for its only medium.
    """

    key: str
    task: str
    messages: tuple[dict[str, Any], ...]
    media: tuple[tuple[MediaKind, str], ...]
    size: tuple[int, int] | None

    @property
    def members(self) -> dict[str, str]:
        """Member names ("0.jpg", as a tar would hold them) → names as written, in the order of their numbers."""
        return {f"{number}.{_suffix(*medium)}": medium[1] for number, medium in enumerate(self.media)}

    @property
    def has_pixels(self) -> bool:
        """Whether a region counts pixels, so that the size and the turn of its picture matter."""
        parts = (part for m in self.messages if isinstance(m["content"], list) for part in m["content"])
        return any((part.get("boxes") or part.get("quads")) and not part.get("grid") for part in parts)


def read_written(key: str, data: dict[str, Any]) -> WrittenRecord:
    """The record that an object describes.

    Raises:
        RecordError: no known form, or a field of it is missing or wrong.
    """
    if "messages" in data or "conversations" in data or "instruction" in data:
        messages, media = read_chat(key, data)
        task = str(data.get("task") or "chat")
        return WrittenRecord(key, task, tuple(messages), tuple(media), declared_size(data) if len(media) == 1 else None)
    if data.keys().isdisjoint(FORMS):
        no_content(key, data)
    named = next((data[field] for field in ("image", "video") if data.get(field) is not None), None)
    if "caption" not in data and named is None:
        message = {"role": "assistant", "content": text(key, "text", data.get("text"))}
        return WrittenRecord(key, "text", (message,), (), None)
    if named is None:
        raise MediaError(key, "missing_media", "a caption of nothing: name its picture or clip as 'image' or 'video'")
    if not isinstance(named, str) or not named:
        raise MediaError(key, "missing_media", f"image or video = {shown(named)}: needs a relative path")
    kind: MediaKind = "video" if data.get("video") is not None else (media_kind(named) or "image")
    expanded, form_task = expand_short_form(key, {**data, "image": None, "video": None}, [f"0.{_suffix(kind, named)}"])
    for part in expanded[0]["content"]:
        if part["type"] == kind:
            part[kind] = "0"
    task = str(data.get("task") or form_task)
    return WrittenRecord(key, task, tuple(expanded), ((kind, named),), declared_size(data))


def finish_record(written: WrittenRecord, facts: Mapping[str, Media]) -> Record:
    """The validated record; `facts` are those of all its media by member name.

    Raises:
        RecordError: as `parse_record`. MediaError: reason "size_mismatch", where the object declares another size.
    """
    names = list(written.members)
    if written.size is not None and written.has_pixels:
        media = facts[names[0]]
        if written.size != (media.width, media.height):
            message = (
                f"annotated for {written.size}, the picture is {(media.width, media.height)}: boxes cannot be placed"
            )
            raise MediaError(written.key, "size_mismatch", message)
    messages = [_with_members(written.key, message, names, facts) for message in written.messages]
    record = {"task": written.task, "messages": messages}
    return record_of(written.key, record, dict.fromkeys(names), facts)


def grid_to_pixels(points: list[float], size: tuple[int, int]) -> list[float]:
    """Corners x, y, x, y, ... on the 0..1000 grid of a box or quad → pixels at their cells' middles; `size` is (w, h).

    1000 is read as the last cell. Corners that share a cell along an axis, as (999,5),(1000,9) do, are set a quarter
    cell to either side of its middle: the place keeps an area and is written back to the same cells.
    """
    cells = [min(value, GRID - 1) for value in points]
    within = [_WITHIN[len(cells)] if len(set(cells[axis::2])) == 1 else (0.5,) * len(cells) for axis in (0, 1)]
    return [(cell + within[i % 2][i]) / GRID * size[i % 2] for i, cell in enumerate(cells)]


def declared_size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) of an annotation entry, None where it does not say (or says nonsense, such as 0)."""
    width, height = entry.get("width"), entry.get("height")
    sizes = [value for value in (width, height) if isinstance(value, int) and not isinstance(value, bool) and value > 0]
    return (sizes[0], sizes[1]) if len(sizes) == 2 else None


def _suffix(kind: MediaKind, name: str) -> str:
    """An extension that says the kind, whatever the file is called: content decides how it is decoded."""
    known = IMAGE_EXTENSIONS if kind == "image" else IMAGE_EXTENSIONS | VIDEO_EXTENSIONS
    return extension(name) if extension(name) in known else "jpg" if kind == "image" else "mp4"


def _with_members(key: str, message: dict[str, Any], names: list[str], facts: Mapping[str, Media]) -> dict[str, Any]:
    """The message with member names for numbers, and regions on the grid in pixels."""
    content = message["content"]
    if not isinstance(content, list):
        return message
    return {**message, "content": [_with_member(part, names, facts) for part in content]}


def _with_member(part: dict[str, Any], names: list[str], facts: Mapping[str, Media]) -> dict[str, Any]:
    named = {kind: names[int(part[kind])] for kind in ("image", "video") if kind in part}
    placed: dict[str, Any] = {}
    if part.get("grid"):
        media = facts[named.get("image", names[0])]
        for field in ("boxes", "quads"):
            if field in part:
                placed[field] = [grid_to_pixels(points, (media.width, media.height)) for points in part[field]]
    return {name: value for name, value in part.items() if name != "grid"} | named | placed
