import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klbox_jax.ops.sampling import subsample_labels

jitted_subsample = jax.jit(subsample_labels, static_argnames=("num_samples", "positive_fraction"))


def labels_of(*, positives, negatives, ignored, seed=0):
    labels = np.concatenate([np.ones(positives), np.zeros(negatives), -np.ones(ignored)]).astype(np.int32)
    return np.random.default_rng(seed).permutation(labels)


@pytest.mark.parametrize(
    ("positives", "negatives", "expected_positives", "expected_negatives"),
    [
        (50, 200, 8, 24),  # a quarter of 32
        (3, 200, 3, 29),  # negatives fill the share of missing positives
        (50, 10, 8, 10),  # positives do not fill the share of missing negatives
        (0, 200, 0, 32),
        (50, 0, 8, 0),
        (0, 0, 0, 0),
    ],
)
def test_counts(positives, negatives, expected_positives, expected_negatives):
    labels = labels_of(positives=positives, negatives=negatives, ignored=40)
    samples = jitted_subsample(jax.random.key(0), labels, num_samples=32, positive_fraction=0.25)
    indices, is_positive, valid = (np.asarray(part) for part in jax.tree.leaves(samples))
    assert len(indices) == len(is_positive) == len(valid) == 32
    total = expected_positives + expected_negatives
    np.testing.assert_array_equal(valid, np.arange(32) < total)
    np.testing.assert_array_equal(is_positive, np.arange(32) < expected_positives)
    np.testing.assert_array_equal(labels[indices[is_positive]], np.ones(expected_positives))
    np.testing.assert_array_equal(labels[indices[valid & ~is_positive]], np.zeros(expected_negatives))
    assert len(set(indices[valid])) == total
    np.testing.assert_array_equal(indices[~valid], 0)


def test_fewer_boxes_than_samples():
    labels = jnp.array([0, 1, -1, 1, 0], jnp.int32)
    samples = jitted_subsample(jax.random.key(1), labels, num_samples=12, positive_fraction=0.5)
    assert set(np.asarray(samples.indices)[np.asarray(samples.valid)]) == {0, 1, 3, 4}
    np.testing.assert_array_equal(samples.is_positive, [True] * 2 + [False] * 10)
    np.testing.assert_array_equal(samples.valid, [True] * 4 + [False] * 8)


def test_no_boxes():
    for draw in (subsample_labels, jitted_subsample):
        samples = draw(jax.random.key(0), jnp.zeros(0, jnp.int32), num_samples=4, positive_fraction=0.5)
        np.testing.assert_array_equal(samples.indices, [0] * 4)
        assert not samples.is_positive.any()
        assert not samples.valid.any()


def test_the_share_of_positives_is_rounded_down():
    labels = labels_of(positives=20, negatives=20, ignored=0)
    samples = jitted_subsample(jax.random.key(0), labels, num_samples=10, positive_fraction=0.39)
    assert samples.is_positive.sum() == 3


def test_every_row_is_drawn_equally_often():
    labels = labels_of(positives=20, negatives=60, ignored=20)
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = functools.partial(subsample_labels, num_samples=20, positive_fraction=0.25)
    samples = jax.jit(jax.vmap(draw, in_axes=(0, None)))(keys, labels)
    drawn = np.bincount(np.asarray(samples.indices).ravel(), minlength=100) / 4000
    expected = np.select([labels == 1, labels == 0], [5 / 20, 15 / 60], 0.0)
    # Standard deviation sqrt(0.25 * 0.75 / 4000) = 0.0068; five of them for a hundred rows.
    np.testing.assert_allclose(drawn, expected, atol=0.034)
    assert drawn[labels == -1].sum() == 0


def test_depends_on_the_key_and_nothing_else():
    labels = labels_of(positives=30, negatives=300, ignored=30)
    draw = functools.partial(subsample_labels, num_samples=32, positive_fraction=0.5)
    eager = draw(jax.random.key(3), jnp.asarray(labels))
    jitted = jax.jit(draw)(jax.random.key(3), labels)
    other = jax.jit(draw)(jax.random.key(4), labels)
    np.testing.assert_array_equal(eager.indices, jitted.indices)
    assert (np.asarray(eager.indices) != np.asarray(other.indices)).any()


def test_one_trace_for_any_labels():
    traces = []

    @jax.jit
    def counted(key, labels):
        traces.append(labels.shape)
        return subsample_labels(key, labels, num_samples=16, positive_fraction=0.5)

    for positives in (0, 5, 50):
        counted(jax.random.key(0), labels_of(positives=positives, negatives=100 - positives, ignored=0))
    assert len(traces) == 1
