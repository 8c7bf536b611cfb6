import io

import numpy as np
import pytest
from pictures import encoded, noise
from PIL import Image

from ensemble.images import decode, pixel_traces


def grey(photo: Image.Image, left: int = 0, top: int = 0) -> np.ndarray:
    return np.asarray(photo.convert("L"), dtype=np.float32)[top : top + 192, left : left + 192]


def jpeg(photo: Image.Image, quality: int) -> Image.Image:
    return decode.decode(encoded(photo, "JPEG", quality=quality, subsampling=0))


def traces(plane: np.ndarray) -> dict[str, float]:
    return dict(zip(pixel_traces.GRID_COLUMNS, pixel_traces.grid_traces(plane), strict=True))


@pytest.mark.parametrize("quality", [50, 75, 90])
def test_a_jpeg_below_lossless_pixels_leaves_a_comb(photos, quality):
    for photo in photos[:2]:
        before, after = (traces(grey(picture))["comb"] for picture in (_fresh(photo), jpeg(_fresh(photo), quality)))
        assert before < 0.25
        assert after > 0.6


def _fresh(photo: Image.Image) -> Image.Image:
    """Without the history that the photo itself may have."""
    return photo.resize((photo.width * 2 // 3, photo.height * 2 // 3), Image.Resampling.LANCZOS)


def test_a_shifted_grid_shows_at_its_own_phase(photos):
    stored = jpeg(_fresh(photos[0]), 40)
    at_corner = pixel_traces.grid_traces(grey(stored))[:8]
    shifted = pixel_traces.grid_traces(grey(stored, left=3, top=3))[:8]
    assert (at_corner.argmax() - shifted.argmax()) % 8 == 3
    assert traces(grey(stored, left=3, top=3))["comb"] < 0.3


def test_stronger_compression_has_the_larger_step(photos):
    steps = [traces(grey(jpeg(_fresh(photos[0]), quality)))["step"] for quality in (95, 80, 60)]
    assert steps == sorted(steps)
    assert steps[0] < steps[2]


def test_an_enlarged_image_has_a_period(photos):
    for photo in photos[:2]:
        small = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS)
        large = small.resize((int(small.width * 1.37), int(small.height * 1.37)), Image.Resampling.BILINEAR)
        assert pixel_traces.resampling_traces(grey(large))[0] > pixel_traces.resampling_traces(grey(small))[0] + 0.5


def test_the_spectrum_of_noise_is_flat_and_blurring_lowers_its_end():
    flat = pixel_traces.radial_spectrum(np.asarray(noise(0, 256, 256).convert("L"), dtype=np.float32))
    assert flat.shape == (pixel_traces.SPECTRUM_BINS,)
    assert np.ptp(flat[2:]) < 0.35
    soft = noise(0, 256, 256).resize((128, 128), Image.Resampling.BOX).resize((256, 256), Image.Resampling.BICUBIC)
    low = pixel_traces.radial_spectrum(np.asarray(soft.convert("L"), dtype=np.float32))
    assert low[-1] < flat[-1] - 1


def test_probe_files_keeps_order_and_leaves_the_unmeasurable_empty(tmp_path):
    noise(1, 64, 64).save(tmp_path / "a.png")
    noise(2, 20, 20).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(b"no")
    found = pixel_traces.measure_files([tmp_path / name for name in ("a.png", "small.png", "broken.png", "a.png")])
    assert list(found) == [*pixel_traces.SPECTRUM_COLUMNS, *pixel_traces.GRID_COLUMNS, *pixel_traces.RESAMPLING_COLUMNS]
    assert found.notna().all(axis=1).tolist() == [True, False, False, True]
    assert found.iloc[0].tolist() == found.iloc[3].tolist()


@pytest.mark.parametrize("size", [(32, 32), (33, 300), (300, 33), (1000, 40), (64, 65)])
def test_any_shape_is_measured(size):
    assert np.isfinite(pixel_traces.measure(noise(3, *size))).all()
    assert np.isfinite(pixel_traces.measure(Image.new("RGB", size, "white"))).all()


def test_a_large_image_is_seen_at_its_own_resolution():
    wide = noise(4, 900, 700)
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    left, top = (900 - 256) // 16 * 8, (700 - 256) // 16 * 8
    cut = wide.crop((left, top, left + 256, top + 256))
    assert pixel_traces.measure(decode.decode(buffer.getvalue())).tolist() == pixel_traces.measure(cut).tolist()
