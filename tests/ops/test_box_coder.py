import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.box_coder import CenterBoxCoder, CornerBoxCoder
from tests.references.boxes import clustered_boxes

CODERS = [
    CornerBoxCoder(),
    CornerBoxCoder(weights=(1.0, 2.0, 3.0, 4.0)),
    CenterBoxCoder(),
    CenterBoxCoder(weights=(1.0, 1.0, 1.0, 1.0)),
]
encode = jax.jit(lambda coder, boxes, references: coder.encode(boxes, references), static_argnums=0)
decode = jax.jit(lambda coder, deltas, references: coder.decode(deltas, references), static_argnums=0)
REFERENCE = jnp.array([[10.0, 20.0, 30.0, 60.0]])  # 20 wide, 40 high, centre (20, 40)


def test_corner_coder_by_hand():
    box = jnp.array([[12.0, 16.0, 29.0, 70.0]])
    # (+2 / 20, -4 / 40, -1 / 20, +10 / 40) times 10
    np.testing.assert_allclose(encode(CornerBoxCoder(), box, REFERENCE), [[1.0, -1.0, -0.5, 2.5]], rtol=1e-6)
    # The same offsets times 1, 2, 3, 4
    coder = CornerBoxCoder(weights=(1.0, 2.0, 3.0, 4.0))
    np.testing.assert_allclose(encode(coder, box, REFERENCE), [[0.1, -0.2, -0.15, 1.0]], rtol=1e-6)


def test_center_coder_by_hand():
    box = jnp.array([[12.0, 20.0, 52.0, 40.0]])  # 40 wide, 20 high, centre (32, 30)
    # 10 * 12 / 20, 10 * -10 / 40, 5 * log 2, 5 * log 0.5
    expected = [[6.0, -2.5, 5 * np.log(2), -5 * np.log(2)]]
    np.testing.assert_allclose(encode(CenterBoxCoder(), box, REFERENCE), expected, rtol=1e-6)


@pytest.mark.parametrize("coder", CODERS)
def test_zero_deltas_are_the_reference(coder):
    np.testing.assert_allclose(decode(coder, jnp.zeros((1, 4)), REFERENCE), REFERENCE, rtol=1e-6)


@pytest.mark.parametrize("coder", CODERS)
def test_round_trip(coder):
    rng = np.random.default_rng(0)
    boxes, references = jnp.asarray(clustered_boxes(rng, 50)), jnp.asarray(clustered_boxes(rng, 50))
    deltas = encode(coder, boxes, references)
    decoded = decode(coder, deltas, references)
    np.testing.assert_allclose(decoded, boxes, atol=1e-3)
    np.testing.assert_allclose(coder.encode(boxes, references), deltas, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(coder.decode(deltas, references), decoded, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("coder", CODERS)
def test_boxes_of_several_classes_share_a_reference(coder):
    deltas = jax.random.normal(jax.random.key(0), (5, 3, 4))
    references = jnp.asarray(clustered_boxes(np.random.default_rng(0), 5))
    decoded = decode(coder, deltas, references[:, None])
    for k in range(3):
        np.testing.assert_allclose(decoded[:, k], decode(coder, deltas[:, k], references), rtol=1e-6)


def test_corner_decoding_is_bounded_and_unordered():
    # An edge moves by 62.5 sides at most: 62.5 * 20 = 1250 and 62.5 * 40 = 2500 pixels.
    decoded = decode(CornerBoxCoder(), jnp.array([[1e6, -1e6, -1e6, 1e6]]), REFERENCE)
    np.testing.assert_allclose(decoded, [[1260.0, -2480.0, -1220.0, 2560.0]])


def test_center_decoding_is_bounded():
    decoded = decode(CenterBoxCoder(), jnp.array([[0.0, 0.0, 1e6, -1e6]]), REFERENCE)
    # 62.5 * 20 = 1250 wide around x = 20, no height left at y = 40
    np.testing.assert_allclose(decoded, [[-605.0, 40.0, 645.0, 40.0]], rtol=1e-5)


@pytest.mark.parametrize("coder", CODERS)
def test_gradients_are_finite_where_a_box_has_no_size(coder):
    boxes = jnp.array(
        [[0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 9.0], [9.0, 9.0, 5.0, 5.0], [1.0, 2.0, 9.0, 8.0]]
    )

    def encoded_and_decoded(boxes, references):
        deltas = coder.encode(boxes, references)
        return jnp.sum(deltas) + jnp.sum(coder.decode(deltas, references))

    value_and_gradients = jax.jit(jax.value_and_grad(encoded_and_decoded, argnums=(0, 1)))
    for references in (boxes, boxes[::-1]):
        value, gradients = value_and_gradients(boxes, references)
        assert np.isfinite(value)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_stds_are_those_of_coded_samples():
    rng = np.random.default_rng(0)
    coder = CornerBoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    box, stds = np.array([12.0, 16.0, 29.0, 70.0]), np.array([0.5, 1.0, 2.0, 4.0])
    samples = (box + stds * rng.standard_normal((20000, 4))).astype(np.float32)
    coded = encode(coder, jnp.asarray(samples), REFERENCE)
    # The standard error of a standard deviation from 20000 samples is half a per cent of it.
    expected = coder.encode_stds(jnp.asarray(stds, jnp.float32)[None], REFERENCE)
    np.testing.assert_allclose(np.std(coded, axis=0), expected[0], rtol=0.025)
    # 0.5 / 20 * 10, 1 / 40 * 10, 2 / 20 * 5, 4 / 40 * 5
    np.testing.assert_allclose(expected, [[0.25, 0.25, 0.5, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(coder.decode_stds(expected, REFERENCE), stds[None], rtol=1e-6)


def test_decoded_stds_are_the_slopes_of_decode():
    coder = CornerBoxCoder()
    slopes = jax.jit(jax.jacobian(lambda deltas: coder.decode(deltas, REFERENCE[0])))(
        jnp.array([1.0, -2.0, 0.5, 3.0])
    )
    coded_stds = jnp.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(
        coder.decode_stds(coded_stds, REFERENCE[0]), jnp.abs(slopes) @ coded_stds, rtol=1e-6
    )


def test_coders_are_static_values():
    assert CornerBoxCoder() == CornerBoxCoder()
    assert hash(CenterBoxCoder()) == hash(CenterBoxCoder())
    assert CornerBoxCoder() != CornerBoxCoder(weights=(1.0, 1.0, 1.0, 1.0))


def whole_pixels_decoded(deltas, box, weights):
    """Detectron's coders in its own terms: boxes from the first to the last pixel, a side one longer than that."""
    x1, y1, x2, y2 = box
    wide, high = x2 - x1 + 1, y2 - y1 + 1
    a, b, c, d = np.array(deltas) / weights
    if len(set(weights)) == 1:  # edges
        return [x1 + a * wide, y1 + b * high, x2 + c * wide, y2 + d * high]
    x, y = x1 + wide / 2 + a * wide, y1 + high / 2 + b * high
    wide, high = wide * np.exp(c), high * np.exp(d)
    return [x - wide / 2, y - high / 2, x + wide / 2 - 1, y + high / 2 - 1]


@pytest.mark.parametrize("coder", [CornerBoxCoder(), CenterBoxCoder()])
def test_whole_pixels_are_coded_alike_once_the_box_ends_where_its_last_pixel_does(coder):
    rng = np.random.default_rng(3)
    pixels, deltas = clustered_boxes(rng, 40), rng.normal(0, 1, (40, 4)).astype(np.float32)
    expected = [
        whole_pixels_decoded(row, box, coder.weights) for row, box in zip(deltas, pixels, strict=True)
    ]
    end = np.array([[0, 0, 1, 1]], np.float32)
    found = decode(coder, jnp.asarray(deltas), jnp.asarray(pixels + end))
    np.testing.assert_allclose(np.asarray(found) - end, expected, atol=1e-3)
