import numpy as np

from pipelines.hashing import hash_words, uniform


def test_the_hash_is_the_same_for_ever() -> None:
    # Saved runs depend on these numbers: a change here is a new algorithm, not a fix.
    assert hash_words(1, 2, 3).tolist() == [15020427595393229491]
    assert hash_words(2**63 - 1, -1, np.arange(2)).tolist() == [
        1458263492361685116,
        4833742129696503757,
    ]


def test_word_order_and_every_word_matter() -> None:
    seen = {
        int(hash_words(*words)[0])
        for words in [(1, 2, 3), (3, 2, 1), (1, 2, 4), (1, 2), (0, 1, 2, 3)]
    }

    assert len(seen) == 5


def test_an_element_does_not_depend_on_the_others() -> None:
    together = hash_words(7, np.arange(1000))

    assert together[123] == hash_words(7, 123)[0]
    assert len(np.unique(together)) == 1000


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    drawn = uniform(3, np.arange(100_000))

    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.abs(counts - 5000).max() < 5 * np.sqrt(5000)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02
