import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from klbox_jax.data.image import check_image, decode_image, upright_size
from klbox_jax.data.source import DataError

HEIGHT, WIDTH = 24, 40


def _photograph(height=HEIGHT, width=WIDTH, seed=0):
    # Smooth, so that JPEG keeps it nearly; no two quadrants alike, so that a wrong turn shows.
    y, x = np.mgrid[:height, :width]
    red = 255 * y / height
    green = 255 * x / width
    blue = 255 * ((y < height / 2) & (x < width / 2))
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def _decode(path, height=HEIGHT, width=WIDTH):
    return decode_image(path, height=height, width=width)


def test_png_is_returned_exactly_from_path_and_from_bytes(tmp_path):
    pixels = _photograph()
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    np.testing.assert_array_equal(_decode(path), pixels)
    np.testing.assert_array_equal(_decode(str(path)), pixels)
    np.testing.assert_array_equal(_decode(path.read_bytes()), pixels)
    assert _decode(path).flags.writeable


def test_grey_and_black_and_white_are_expanded(tmp_path):
    grey = _photograph()[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(_decode(tmp_path / "grey.png"), np.repeat(grey[:, :, None], 3, axis=2))
    Image.fromarray(grey > 100).save(tmp_path / "bw.png")
    np.testing.assert_array_equal(_decode(tmp_path / "bw.png")[:, :, 1], 255 * (grey > 100))


def test_palette_is_expanded(tmp_path):
    index = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 3).astype(np.uint8)
    palette = np.array([[10, 20, 30], [200, 0, 5], [0, 250, 60]], np.uint8)
    image = Image.fromarray(index)
    image.putpalette(palette.ravel().tolist())
    assert image.mode == "P"
    image.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(_decode(tmp_path / "palette.png"), palette[index])


def test_transparency_is_composed_over_black(tmp_path):
    rgba = np.full((HEIGHT, WIDTH, 4), 200, np.uint8)
    rgba[:, :10, 3] = 0
    rgba[:, 10:20, 3] = 255
    rgba[:, 20:, 3] = 128  # 200 * 128 / 255 = 100.4
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    decoded = _decode(tmp_path / "rgba.png").astype(int)
    assert (decoded[:, :10] == 0).all()
    assert (decoded[:, 10:20] == 200).all()
    assert (abs(decoded[:, 20:] - 100) <= 1).all()


def test_transparent_colour_of_a_palette_and_of_rgb_is_black(tmp_path):
    index = np.zeros((HEIGHT, WIDTH), np.uint8)
    index[:, 20:] = 1
    palette = Image.fromarray(index)
    palette.putpalette([90, 90, 90, 7, 8, 9])
    palette.save(tmp_path / "p.png", transparency=0)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 50, np.uint8)).save(
        tmp_path / "rgb.png", transparency=(50, 50, 50)
    )
    decoded = _decode(tmp_path / "p.png")
    assert (decoded[:, :20] == 0).all()
    assert (decoded[:, 20:] == [7, 8, 9]).all()
    assert (_decode(tmp_path / "rgb.png") == 0).all()


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    pixels = _photograph()
    path = tmp_path / "cmyk.jpg"
    Image.fromarray(pixels).convert("CMYK").save(path, quality=100)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    assert np.abs(_decode(path).astype(int) - pixels).mean() < 4


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name):
    deep = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    Image.fromarray(deep).save(tmp_path / name)
    decoded = _decode(tmp_path / name)
    np.testing.assert_allclose(decoded[:, :, 2], deep / 65535 * 255, atol=1)
    assert decoded[0, 0, 0] == 0
    assert decoded[-1, -1, 0] == 255


def test_samples_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif has 32-bit samples.*Convert"):
        _decode(tmp_path / "float.tif")


# How a camera that was held so would have stored the upright photograph: each inverts the turn that
# the EXIF standard prescribes for showing it.
STORED = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", sorted(STORED))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation_is_applied_where_the_annotation_is_upright(tmp_path, orientation, suffix):
    upright = _photograph()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    stored = np.ascontiguousarray(STORED[orientation](upright))
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(stored).save(path, exif=exif, **options)
    check_image(path, height=HEIGHT, width=WIDTH)
    assert np.abs(_decode(path).astype(int) - upright).max() <= (0 if suffix == "png" else 40)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_exif_orientation_is_left_where_the_annotation_has_the_stored_size(tmp_path, orientation):
    stored = _photograph()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(stored).save(path, exif=exif)
    check_image(path, height=HEIGHT, width=WIDTH)
    np.testing.assert_array_equal(_decode(path), stored)


@pytest.mark.parametrize("orientation", [None, 1, 3, 99])
def test_swapped_sizes_without_a_quarter_turn_are_refused(tmp_path, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(_photograph()).save(path, exif=exif)
    for read in (decode_image, check_image):
        with pytest.raises(DataError, match=r"a\.jpg is 24 pixels high and 40 wide.*40 high and 24 wide"):
            read(path, height=WIDTH, width=HEIGHT)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_the_upright_size_is_that_of_a_viewer(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / f"turned{suffix}", exif=exif)
    assert upright_size(tmp_path / f"turned{suffix}") == ((20, 30) if orientation < 5 else (30, 20))


def test_a_size_is_asked_of_photographs_of_sound_size_alone(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20)).save(tmp_path / "drawing.png", format="EPS")
    with pytest.raises(DataError, match="is not an image of a known format"):
        upright_size(tmp_path / "drawing.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(DataError, match="absurdly large"):
        upright_size(tmp_path / "large.png")


def test_missing_file_folder_and_text_are_refused(tmp_path):
    (tmp_path / "text.jpg").write_text("no image at all")
    (tmp_path / "empty.png").write_bytes(b"")
    for read in (decode_image, check_image):
        with pytest.raises(DataError, match=r"gone\.jpg is missing.*Check its path, or restore"):
            read(tmp_path / "gone.jpg", height=4, width=4)
        with pytest.raises(DataError, match="is missing or is not a file"):
            read(tmp_path, height=4, width=4)
        for name in ("text.jpg", "empty.png"):
            with pytest.raises(DataError, match=rf"{name} is not an image of a known format"):
                read(tmp_path / name, height=4, width=4)
    with pytest.raises(DataError, match=r"^record 7 is not an image"):
        decode_image(b"nonsense", height=4, width=4, name="record 7")


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "gif", "tif"])
@pytest.mark.parametrize("share", [0.6, 0.97])
def test_truncation_is_seen_by_the_check_and_by_decoding(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    check_image(path, height=64, width=64)
    check_image(path, height=64, width=64, full=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    for read in (decode_image, check_image):
        with pytest.raises(DataError, match=rf"a\.{suffix} .*(Restore|convert)"):
            read(path, height=64, width=64)


def test_healthy_jpeg_with_bytes_behind_its_end_passes(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(_photograph()).save(path)
    path.write_bytes(path.read_bytes() + b"camera maker's notes" * 1000)
    check_image(path, height=HEIGHT, width=WIDTH)


def _jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def _pillow(encoded):
    return np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))


@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 60, "progressive": True}])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (37, 53), (1, 9)])
def test_photographs_have_the_bits_of_pillow(tmp_path, options, subsampling, height, width):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    encoded = _jpeg(noise, subsampling=subsampling, **options)
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded)
    for image in (encoded, path):
        decoded = decode_image(image, height=height, width=width)
        np.testing.assert_array_equal(decoded, _pillow(encoded))
        assert decoded.flags.writeable


def test_jpegs_that_only_pillow_reads_are_read_by_it():
    encoded = _jpeg(_photograph(64, 64), quality=95)
    # Pillow skips what libjpeg warns of: bytes of no meaning before a marker.
    table = encoded.index(b"\xff\xc4")
    warned = encoded[:table] + b"\x00" * 7 + encoded[table:]
    # Behind the end, more bytes than any photograph has.
    for odd in (warned, encoded + bytes(2**23), _jpeg(_photograph(64, 64)[:, :, 0])):
        np.testing.assert_array_equal(decode_image(odd, height=64, width=64), _pillow(odd))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.999])
def test_truncated_photographs_are_refused_wherever_they_end(share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for progressive in (False, True):
        whole = _jpeg(noise, progressive=progressive)
        with pytest.raises(DataError, match=r"image bytes .*(truncated|damaged)"):
            decode_image(whole[: int(len(whole) * share)], height=64, width=64)


def test_two_headers_of_two_sizes_get_the_memory_of_the_checked_one():
    # Pillow takes the size from the last frame header, a decoder of the file from the first or from none.
    encoded = _jpeg(_photograph(), quality=95)
    frame = encoded.index(b"\xff\xc0")
    huge = bytearray(encoded[frame : frame + 19])
    huge[5:9] = b"\xff\xdc\xff\xdc"
    doctored = encoded[:frame] + bytes(huge) + encoded[frame:]
    with pytest.raises(DataError, match=r"cannot be decoded|absurdly large|pixels high"):
        _decode(doctored)


def test_damaged_png_middle_is_seen_by_the_full_check(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="truncated or damaged"):
        check_image(path, height=64, width=64, full=True)


@pytest.mark.parametrize("limit", [HEIGHT * WIDTH - 1, 100])
def test_absurd_sizes_are_refused_before_decoding(tmp_path, monkeypatch, limit):
    path = tmp_path / "bomb.png"
    Image.fromarray(_photograph()).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for read in (decode_image, check_image):
        with pytest.raises(DataError, match=r"bomb\.png is absurdly large"):
            read(path, height=HEIGHT, width=WIDTH)


def test_threads_decode_as_one(tmp_path):
    paths = []
    for seed in range(6):
        path = tmp_path / f"{seed}.png"
        noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(noise).save(path)
        paths.append(path)
    alone = [_decode(path) for path in paths]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for expected, decoded in zip(alone, pool.map(_decode, paths), strict=True):
                np.testing.assert_array_equal(decoded, expected)
    assert threading.active_count() < 20
