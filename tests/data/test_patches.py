import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.encode.budget import smart_resize
from data_pipelines.encode.patches import clip_to_patches, image_to_patches, resize_image

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def numbered(rows, columns):
    """An image whose patches are filled with their number, counted row by row; the channels differ by 100."""
    numbers = np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns)
    plane = np.repeat(np.repeat(numbers, 14, axis=0), 14, axis=1)
    return torch.from_numpy(np.stack([plane, plane + 100, plane + 200]))


def test_patches_of_one_token_lie_together():
    patches = image_to_patches(numbered(4, 4))
    assert patches.shape == (16, 588)
    assert patches.dtype == torch.uint8
    assert patches[:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_a_row_holds_channels_then_rows_then_columns():
    patches = image_to_patches(numbered(2, 4))
    assert patches[:, 196].tolist() == [100, 101, 104, 105, 102, 103, 106, 107]
    assert patches[:, 392].tolist() == [200, 201, 204, 205, 202, 203, 206, 207]
    image = torch.arange(28 * 28).remainder(251).to(torch.uint8).reshape(1, 28, 28).repeat(3, 1, 1)
    assert torch.equal(image_to_patches(image)[3].reshape(3, 14, 14), image[:, 14:, 14:])


def test_clip_patches_hold_two_frames_per_channel():
    still = numbered(2, 2)
    frames = torch.stack([still, still + 10, still + 20, still + 30])
    patches = clip_to_patches(frames)
    assert patches.shape == (8, 1176)
    assert patches[:, 0].tolist() == [0, 1, 2, 3, 20, 21, 22, 23]  # pair by pair
    assert patches[0].reshape(3, 2, 196)[:, :, 0].tolist() == [[0, 10], [100, 110], [200, 210]]


def test_a_clip_of_a_still_is_the_image_twice():
    image = torch.randint(0, 256, (3, 56, 84), dtype=torch.uint8)
    doubled = image_to_patches(image).reshape(-1, 3, 1, 196).expand(-1, 3, 2, 196).reshape(-1, 1176)
    assert torch.equal(clip_to_patches(torch.stack([image, image])), doubled)


def test_memory_layout_of_frames_does_not_matter():
    frames = torch.randint(0, 256, (2, 28, 56, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    assert torch.equal(clip_to_patches(frames), clip_to_patches(frames.contiguous()))
    assert torch.equal(image_to_patches(frames[0]), image_to_patches(frames[0].contiguous()))


def test_resizing_to_the_same_size_changes_nothing():
    rgb = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    assert np.array_equal(resize_image(rgb, 56, 84).permute(1, 2, 0).numpy(), rgb)


def picture(width, height):
    """A picture with edges and gradients, so that resizing filters show their differences."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 / width, y * 255 / height, 127 + 120 * np.sin(x / 5) * np.cos(y / 7)], axis=2)
    rgb[height // 4 : height // 2, width // 4 : width // 2] = (250, 20, 20)
    return rgb.astype(np.uint8)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (100, 75), (1000, 700), (333, 1024), (28, 28), (224, 224)])
def test_pixels_are_those_of_transformers_processor(width, height):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=1280 * 784)
    rgb = picture(width, height)
    reference = processor(images=[Image.fromarray(rgb)], return_tensors="np")
    size = smart_resize(height, width, 56 * 56, 1280 * 784)
    patches = image_to_patches(resize_image(rgb, *size))
    assert reference["image_grid_thw"].tolist() == [[1, size[0] // 14, size[1] // 14]]
    # Undo the normalisation and the doubling in time of the reference.
    levels = reference["pixel_values"].reshape(-1, 3, 2, 196) * STD[:, None, None] + MEAN[:, None, None]
    levels = np.rint(levels[:, :, 0] * 255).reshape(-1, 588)
    difference = np.abs(levels - patches.numpy().astype(np.float32))
    # Pillow and torch round bicubic weights differently: by one level here and there (the published fast processor,
    # built on torch's kernel, is off by the same).
    assert difference.max() <= 2
    assert difference.mean() < 0.1


def test_pixels_equal_the_float_filter_but_for_rounding():
    rgb = picture(500, 300)
    ours = resize_image(rgb, 308, 504).float()
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(rgb).permute(2, 0, 1)[None].float(), size=(308, 504), mode="bicubic", antialias=True
    )[0].clamp(0, 255)
    # Rounded to bytes after each of the two passes: half a level of the first, weighted up to 1.2 by the second, and
    # half a level of the second.
    assert (ours - exact).abs().max() <= 1.2
    assert (ours - exact).abs().mean() < 0.3
