import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from sklearn.calibration import calibration_curve

from jaxgpt.training.label_metrics import label_metrics


@settings(max_examples=20)
@given(st.integers(2, 5), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_the_metrics_are_those_of_scikit_learn(K, N, seed):
    rng = np.random.default_rng(seed)
    probs_NK = rng.dirichlet(np.full(K, 0.3), N).clip(1e-6)
    probs_NK /= probs_NK.sum(axis=1, keepdims=True)
    labels_N = rng.integers(rng.integers(1, K + 1), size=N)  # some may not occur
    found = label_metrics(np.log(probs_NK), labels_N)

    each, predicted_N = range(K), probs_NK.argmax(axis=1)
    true = labels_N, predicted_N
    options = {"labels": each, "zero_division": 0}
    assert found["loss"] == pytest.approx(
        metrics.log_loss(labels_N, probs_NK, labels=each)
    )
    assert found["accuracy"] == metrics.accuracy_score(*true)
    f1_K = metrics.f1_score(*true, average=None, **options)
    assert found["f1"] == pytest.approx(f1_K.tolist())
    macro_f1 = metrics.f1_score(*true, average="macro", **options)
    assert found["macro_f1"] == pytest.approx(macro_f1)
    confusion_KK = metrics.confusion_matrix(*true, labels=each)
    assert found["confusion"] == confusion_KK.tolist()

    right_N, confidence_N = labels_N == predicted_N, probs_NK.max(axis=1)
    accuracies, confidences = calibration_curve(right_N, confidence_N, n_bins=15)
    counts = np.histogram(confidence_N, bins=15, range=(0, 1))[0]
    gaps = np.abs(accuracies - confidences) * counts[counts > 0]
    assert found["calibration_error"] == pytest.approx(gaps.sum() / N)


def test_bins_of_confidence_include_their_upper_edge():
    # 0.4 and 1.0 are upper edges of the bins 6 and 15; 0.41 is in bin 7.
    probs_N3 = np.array([[0.4, 0.3, 0.3], [0.41, 0.3, 0.29], [1.0, 1e-9, 1e-9]])
    found = label_metrics(np.log(probs_N3), np.array([0, 1, 0]))
    assert found["calibration_error"] == pytest.approx((0.6 + 0.41 + 0) / 3)


def test_the_accuracy_has_a_binomial_standard_error():
    log_probs_N2 = np.log(np.tile([0.9, 0.1], (100, 1)))
    found = label_metrics(log_probs_N2, np.repeat([0, 1], [80, 20]))
    assert found["accuracy"] == 0.8
    assert found["accuracy_standard_error"] == pytest.approx(0.04)
