import io
import json
import struct
import warnings

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from data_pipelines.decode import image as module
from data_pipelines.decode.image import decode_image, image_orientation, probe_image
from data_pipelines.errors import MediaError

LIMIT = 10_000_000
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decoded(data):
    return decode_image(data, "key", LIMIT)


def reason(call, *args):
    with pytest.raises(MediaError, match=r"^key: ") as caught:
        call(*args)
    return caught.value.reason


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG"])
def test_every_format_gives_pillows_pixels(form):
    source = Image.fromarray(PIXELS)
    data = encoded(
        source.quantize(64) if form == "GIF" else source, form, **{"lossless": True} if form == "WEBP" else {}
    )
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    rgb = decoded(data)
    assert (rgb.dtype, rgb.flags.c_contiguous, rgb.flags.writeable) == (np.uint8, True, True)
    assert np.array_equal(rgb, expected)
    media = probe_image(data, "wrong name.mp3", "key")
    assert (media.kind, media.width, media.height, media.frames) == ("image", 30, 20, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_to_size_and_pixels(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PIXELS), form, exif=exif, **{"lossless": True} if form == "WEBP" else {})
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    media = probe_image(data, "0.jpg", "key")
    assert (media.height, media.width) == expected.shape[:2] == ((20, 30) if orientation < 5 else (30, 20))
    assert np.array_equal(decoded(data), expected)
    if form != "TIFF":  # Pillow turns TIFF itself
        assert image_orientation(data, "key") == orientation


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"II*\x00",
        b"garbage" * 30,
        struct.pack("<2sHIH", b"II", 42, 8, 9999),  # promises entries that are not there
        struct.pack("<2sHI", b"II", 42, 0xFFFFFFF0) + bytes(20),
        struct.pack("<2sHIHHHII", b"II", 42, 8, 1, 0x0112, 3, 1, 77),  # orientation 77
    ],
)
def test_garbage_in_exif_is_ignored(block):
    data = encoded(Image.fromarray(PIXELS), "JPEG", exif=b"Exif\x00\x00" + block)
    assert decoded(data).shape == (20, 30, 3)
    assert image_orientation(data, "key") == 1


def test_transparency_lies_on_white():
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[:2] = (255, 0, 0, 255)
    rgba[2:] = (0, 0, 255, 0)
    rgb = decoded(encoded(Image.fromarray(rgba), "PNG"))
    assert rgb[0, 0].tolist() == [255, 0, 0]
    assert rgb[3, 3].tolist() == [255, 255, 255]
    grey = np.full((4, 4, 2), (0, 128), dtype=np.uint8)  # black, half transparent
    assert abs(int(decoded(encoded(Image.fromarray(grey, "LA"), "PNG"))[0, 0, 0]) - 127) <= 1
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    rgb = decoded(encoded(palette, "PNG", transparency=bytes([255, 0])))
    assert rgb[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    rgb = decoded(encoded(Image.fromarray(grey), "PNG"))
    assert rgb[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (rgb[..., 0] == rgb[..., 2]).all()


@pytest.mark.parametrize(
    ("values", "expected"), [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 100.0, 255.0], [0, 100, 255])]
)
def test_float_pixels_are_scaled(values, expected):
    data = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    assert decoded(data)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 300.0], [float("nan"), 1.0]])
def test_float_pixels_without_a_range_are_refused(values):
    data = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    assert reason(decoded, data) == "unsupported_pixels"


def test_cmyk_is_converted_like_pillow():
    data = encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decoded(data) - expected).max() <= 2


def test_first_frame_and_first_page_count():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for form in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert decoded(data)[4, 4].tolist() == [255, 0, 0], form


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_cut_files_are_errors(form, kept):
    noise = Image.fromarray(RNG.integers(0, 256, (120, 160, 3), dtype=np.uint8))
    data = encoded(noise, form)
    assert reason(decoded, data[: int(len(data) * kept)]) in ("corrupt_image", "not_an_image")


def test_damaged_png_is_an_error_even_after_its_header_was_read():
    data = bytearray(encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "PNG"))
    data[len(data) // 2] ^= 255
    assert probe_image(bytes(data), "0.png", "key").width == 64
    assert reason(decoded, bytes(data)) == "corrupt_image"


def test_pixels_are_budgeted_before_decoding(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("decoded")

    jpeg, png = (encoded(Image.new("RGB", (400, 300)), form) for form in ("JPEG", "PNG"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", never)
    monkeypatch.setattr(module, "_to_rgb", never)
    for data in (jpeg, png):
        assert reason(decode_image, data, "key", 400 * 300 - 1) == "too_many_pixels"


@pytest.mark.parametrize(
    "data",
    [b"<html>404</html>", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\x00\x01", b"\xff\xd8\xff" + b"\xff" * 500, b"%!PS-Adobe"],
)
def test_other_content_is_no_image(data):
    assert reason(decoded, data) == reason(probe_image, data, "0.jpg", "key") == "not_an_image"


def test_empty_members_are_named():
    assert reason(decoded, b"") == reason(probe_image, b"", "0.jpg", "key") == "empty_media"


def test_bytes_after_the_end_do_no_harm():
    data = encoded(Image.fromarray(PIXELS), "JPEG")
    assert np.array_equal(decoded(data + b"tail" * 100), decoded(data))


def test_text_bomb_is_refused():
    text = PngInfo()
    text.add_text("Comment", "a" * 20_000_000, zip=True)
    assert reason(decoded, encoded(Image.fromarray(PIXELS), "PNG", pnginfo=text)) == "not_an_image"


def test_random_damage_never_escapes_as_another_error():
    rng = np.random.default_rng(3)
    outcomes = {"fine": 0, "error": 0}
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        source = bytearray(encoded(Image.fromarray(PIXELS), form))
        for _ in range(60):
            data = bytearray(source)
            for _ in range(int(rng.integers(1, 8))):
                data[rng.integers(len(data))] = rng.integers(256)
            for call in (lambda d: decode_image(d, "key", 1_000_000), lambda d: probe_image(d, "0.jpg", "key")):
                try:
                    call(bytes(data))
                    outcomes["fine"] += 1
                except MediaError:
                    outcomes["error"] += 1
    assert min(outcomes.values()) > 50


def test_bad_images_end_as_their_manifest_says(shared_data):
    manifest = json.loads((shared_data / "bad" / "manifest.json").read_text())
    seen = 0
    for item in manifest["items"]:
        path = shared_data / "bad" / item["file"]
        if not item["file"].startswith("image/") or not path.is_file() or "12000x9000" in item["file"]:
            continue
        seen += 1
        data = path.read_bytes()
        try:
            shape = decode_image(data, "key", 200_000_000).shape[:2]
            media = probe_image(data, path.name, "key")
            outcome = "load"
            assert shape == (media.height, media.width)
        except MediaError:
            outcome = "skip"
        expected = item["expected"]
        if expected.startswith(("skip the sample", "refuse")):
            assert outcome == "skip", item["file"]
        elif expected.startswith("load") and "skip" not in expected:
            assert outcome == "load", item["file"]
    assert seen >= 50
