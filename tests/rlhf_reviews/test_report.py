import numpy as np
import pytest

from jaxgpt.rlhf_reviews import report
from jaxgpt.rlhf_reviews.arms import FULL, PRETRAINED, SCALES, TRAINED
from jaxgpt.rlhf_reviews.statistics import resample


def column(means, kl):
    """Figures of one seed and 100 beginnings, with these shares of gold and proxy."""
    gold, proxy = means
    ones = np.ones((1, 100))
    found = {name: np.arange(100)[None] < 100 * gold for name in report._JUDGED}
    return found | {"proxy": proxy * ones, "kl": kl * ones}


COLUMNS = {
    PRETRAINED: column((0.2, 0.0), 0.0),
    "best-of-16": column((0.35, 1.5), 1.0),
    "ppo-low": column((0.4, 1.0), 4.0),
    "ppo": column((0.6, 2.0), 9.0),
    "dpo": column((0.5, 1.2), 12.25),
    "beta-0": column((0.3, 4.0), 36.0),
}


def test_comparisons_are_differences_also_at_equal_divergence():
    found = report._comparisons(COLUMNS, resample(1, 100), FULL)
    above = found["minus_pre_trained"]
    assert above["ppo"]["gold"].value == pytest.approx(0.4)
    assert above["ppo"]["gold"].low < 0.4 < above["ppo"]["gold"].high
    at_best_of = found["ppo_at_equal_kl"]["best-of-16"]
    assert at_best_of["gold"].value == pytest.approx(0.2 + 0.2 / 2 - 0.35)
    assert at_best_of["proxy"].value == pytest.approx(0.5 - 1.5)
    assert at_best_of["inside"]
    at_dpo = found["ppo_at_equal_kl"]["dpo"]  # beyond the curve: its end
    assert at_dpo["gold"].value == pytest.approx(0.6 - 0.5)
    assert not at_dpo["inside"]


@pytest.mark.parametrize(
    ("beta_0", "verdict"),
    [
        (((0.3, 4.0), 36.0), "the reward was hacked"),
        (((0.9, 4.0), 36.0), "the reward was not hacked"),
        (((0.6, 4.0), 36.0), "do not show that the reward was hacked"),
        (((0.3, 1.0), 36.0), "do not show that the reward was hacked"),
        (((0.3, 4.0), 16.0), "not the 30 that were aimed at"),
    ],
)
def test_whether_the_reward_was_hacked_follows_from_the_numbers(beta_0, verdict):
    columns, draws = COLUMNS | {"beta-0": column(*beta_0)}, resample(1, 100)
    content = {
        "results": {"beta-0": report._summary(columns["beta-0"], draws)},
        "comparisons": report._comparisons(columns, draws, FULL),
    }
    text = report._hacking_text(content)
    assert verdict in text
    assert f"reached a KL of {beta_0[1]:.1f} nats" in text


def test_best_of_n_has_the_divergence_of_the_formula():
    assert FULL.best_of_kl == pytest.approx(1.835, abs=1e-3)


def test_every_scale_has_every_arm():
    assert all(set(settings.arms) == set(TRAINED) for settings in SCALES.values())
