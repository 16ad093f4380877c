"""How images are decoded: depth, orientation, size, and what is said of them."""

import resource
import warnings

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms import Compose

from vitprune.backbones import preprocessing
from vitprune.data import Faults, batches, eval_transform, make_loader, open_image, to_rgb
from vitprune.data.images import ImageSet, Unreadable
from vitprune.errors import DataError

RAMP = np.tile(np.arange(256, dtype=np.float64), (64, 1))  # (H, W) in 0 to 255


def save(path, array, **how):
    Image.fromarray(array).save(path, **how)
    return path


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("16.png", (RAMP * 257).astype(np.uint16)),
        ("12.png", (RAMP * 16).astype(np.uint16)),
        ("16.tif", (RAMP * 257).astype(">u2")),
        ("8_in_32.tif", RAMP.astype(np.int32)),
        ("16_in_32.tif", (RAMP * 257).astype(np.int32)),
        ("32.tif", (RAMP * (2**31 - 1) / 255).astype(np.int32)),
        ("float.tif", (RAMP / 255).astype(np.float32)),
        ("float_255.tif", RAMP.astype(np.float32)),
        ("around_0.tif", (RAMP / 127.5 - 1).astype(np.float32)),
    ],
)
def test_more_than_8_bits_are_scaled_and_not_clipped_to_white(tmp_path, name, array):
    """Against the same image in 8 bits; Pillow's own conversion makes nearly all of them white."""
    pixels = np.asarray(open_image(save(tmp_path / name, array)), dtype=int)
    assert pixels.shape == (64, 256, 3)
    assert np.abs(pixels - RAMP[:, :, None]).max() <= 1
    assert np.array_equal(pixels, np.asarray(to_rgb(Image.open(tmp_path / name))))


def test_floats_that_are_no_numbers_are_unreadable(tmp_path):
    path = save(tmp_path / "a.tif", np.full((8, 8), np.nan, np.float32))
    sample = ImageSet([path], [0], open_image)[0]
    assert isinstance(sample, Unreadable)
    assert sample.reason == "some of its pixels are no numbers"


def test_what_was_done_is_counted(tmp_path, make_vit):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=turned)
    Image.new("RGB", (40, 20)).save(tmp_path / "b.jpg")
    save(tmp_path / "c.png", (RAMP * 257).astype(np.uint16))
    (tmp_path / "d.jpg").write_bytes(b"no image")
    images = ImageSet(sorted(tmp_path.iterdir()), [0] * 4, open_image, transform=eval_transform(make_vit()))
    faults = Faults(allowed_share=1.0)
    assert sum(len(batch) for batch, _ in batches(make_loader(images, 2, num_workers=1), faults)) == 3
    assert faults.remarks == [
        "1 image(s) with an EXIF orientation, not turned (--exif turns it)",
        "1 image(s) of more than 8 bits, scaled to 8",
    ]
    assert faults.rows == [3]
    assert Faults.merged([faults]).rows == [3]
    assert Faults.merged([faults, faults]).remarks[1].startswith("2 image(s)")
    assert Faults.merged([faults, faults]).rows == [], "of several processes it is not known which are meant"


def test_exif_orientation_is_applied_where_the_preprocessing_says_so(tmp_path, make_vit):
    model = make_vit()
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255  # white above black
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees to the right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    plain, upright = Image.fromarray(pixels), Image.fromarray(np.rot90(pixels, -1).copy())
    image = open_image(tmp_path / "a.png")
    assert torch.equal(eval_transform(model)(image), eval_transform(model)(plain)), "as timm evaluates"
    model.pretrained_cfg = {**model.pretrained_cfg, "exif": True}
    assert preprocessing(model)["exif"]
    assert torch.equal(eval_transform(model)(image), eval_transform(model)(upright))
    sample = ImageSet([tmp_path / "a.png"], [0], open_image, transform=eval_transform(model))[0]
    assert sample.note == "turned by its EXIF orientation"


def test_a_long_image_takes_no_memory_and_shows_its_centre(tmp_path, make_vit):
    """1 x 12,000 pixels, resized by the shorter side, were 224 x 2,688,000."""
    model = make_vit()
    transform = eval_transform(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((12_000, 1), (1, 12_000)):
        image = Image.new("RGB", size, (9, 9, 9))
        image.paste((200, 200, 200), (size[0] // 2 - 20, size[1] // 2 - 20, size[0] // 2 + 20, size[1] // 2 + 20))
        centre = transform(Image.new("RGB", (32, 32), (200, 200, 200)))
        assert torch.allclose(transform(image), centre, atol=1e-5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    wide = Image.fromarray(np.tile(RAMP.astype(np.uint8), (1, 3))).convert("RGB")  # 12 to 1: as timm does
    assert isinstance(transform.steps, Compose)
    assert torch.equal(transform(wide), transform.steps(wide))


def test_images_of_more_pixels_than_allowed_are_unreadable(tmp_path):
    Image.new("L", (100, 60)).save(tmp_path / "a.png")
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.png", max_pixels=6000).size == (100, 60)
        with pytest.raises(ValueError, match=r"more than 5,998 pixels"):
            open_image(tmp_path / "a.png", max_pixels=5998)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_odd_images_warn_of_nothing(tmp_path):
    palette = Image.new("P", (8, 8))
    palette.putpalette([5, 6, 7] * 256)
    palette.save(tmp_path / "a.png", transparency=bytes([0] * 256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (5, 6, 7)


@pytest.mark.parametrize("error", [RuntimeError("avif"), NotImplementedError("dds"), MemoryError(), KeyError("x")])
def test_any_exception_of_a_decoder_is_an_unreadable_image(error):
    def read(item):
        raise error

    images = ImageSet(["x"], [0], read)
    assert isinstance(images[0], Unreadable)
    with pytest.raises(DataError, match="cannot read image 'x'"):
        list(batches(make_loader(images, 1)))
