import numpy as np
import pytest

from jaxgpt.rlhf_reviews.statistics import at_kl, interval, resample


def test_the_first_resample_is_the_data_and_means_count_what_is_drawn():
    values_SN = np.arange(12.0).reshape(3, 4) ** 2
    draws = resample(3, 4, count=50)
    means_R = draws.means(values_SN)
    assert means_R[0] == pytest.approx(values_SN.mean())
    assert draws.seeds_RS.sum(axis=1) == pytest.approx(3)
    for r in range(50):
        columns = np.repeat(np.arange(4), draws.beginnings_RN[r].astype(int))
        assert len(columns) == 4
        by_seed_S = values_SN[:, columns].mean(axis=1)
        expected = np.average(by_seed_S, weights=draws.seeds_RS[r])
        assert means_R[r] == pytest.approx(expected)
    assert len(set(means_R)) > 20


def test_the_error_of_few_seeds_is_not_underestimated():
    values_S = np.array([0.1, 0.5, 0.3])
    means_R = resample(3, 10).means(np.repeat(values_S[:, None], 10, axis=1))
    assert means_R[1:].std() == pytest.approx(values_S.std(ddof=1) / 3**0.5, rel=0.05)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(size=(1, 1000))
    found = interval(resample(1, 1000).means(values))
    width = 1.96 * values.std() / 1000**0.5
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - width, abs=0.1 * width)
    assert found.high == pytest.approx(values.mean() + width, abs=0.1 * width)


def test_paired_differences_have_no_variance_of_what_is_shared():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(3, 500))
    draws = resample(3, 500)
    found = interval(draws.means(shared + 0.5) - draws.means(shared))
    assert found == pytest.approx((0.5, 0.5, 0.5))


def test_a_curve_is_linear_in_the_root_of_the_divergence():
    points = [(np.array([4.0, 4.0]), np.array([0.5, 1.0]))]
    points += [(np.zeros(2), np.array([0.1, 0.0])), (np.full(2, 9.0), np.ones(2))]
    assert at_kl(np.array([1.0, 1.0]), points) == pytest.approx([0.3, 0.5])
    assert at_kl(np.array([6.25, 16.0]), points) == pytest.approx([0.75, 1.0])
    assert at_kl(np.array([-0.01, 4.0]), points) == pytest.approx([0.1, 1.0])
