"""How well the probabilities of labels agree with the true labels.

N examples   K labels
"""

import math
from typing import Any

import numpy as np

_BINS = 15  # of confidence, in the calibration error


def label_metrics(log_probs_NK: np.ndarray, labels_N: np.ndarray) -> dict[str, Any]:
    """Measures a classifier on examples, of which there is at least one.

    Args:
      log_probs_NK: log-probabilities in nats; the likeliest label is the prediction.
      labels_N: ids of the true labels.

    Returns a dict of
      examples: N.
      loss: mean cross-entropy in nats per example.
      accuracy: fraction of the predictions that are right.
      accuracy_standard_error: of that fraction, sqrt(p (1 - p) / N).
      f1: of each label, 2 TP / (2 TP + FP + FN); 0 for one that is neither among the
        true labels nor among the predictions.
      macro_f1: the mean over all K labels, those that do not occur included.
      calibration_error: expected difference of accuracy and confidence, which is the
        probability of the prediction, in 15 bins of equal width. Source: Guo et al.
        2017, section 2.
      confusion: the number of examples of each true label (rows) that got each
        prediction (columns).
    """
    N, K = log_probs_NK.shape
    predicted_N = log_probs_NK.argmax(axis=1)
    confidence_N = np.exp(log_probs_NK.max(axis=1))
    right_N = predicted_N == labels_N
    confusion_KK = np.bincount(K * labels_N + predicted_N, minlength=K * K)
    confusion_KK = confusion_KK.reshape(K, K)
    true_or_predicted_K = confusion_KK.sum(axis=0) + confusion_KK.sum(axis=1)
    f1_K = 2 * confusion_KK.diagonal() / np.maximum(true_or_predicted_K, 1)
    bin_N = np.ceil(_BINS * confidence_N).astype(int) - 1  # the last includes 1
    gaps = np.bincount(bin_N.clip(0, _BINS - 1), right_N - confidence_N)
    accuracy = float(right_N.mean())
    return {
        "examples": N,
        "loss": -float(log_probs_NK[np.arange(N), labels_N].mean()),
        "accuracy": accuracy,
        "accuracy_standard_error": math.sqrt(accuracy * (1 - accuracy) / N),
        "macro_f1": float(f1_K.mean()),
        "f1": f1_K.tolist(),
        "calibration_error": float(np.abs(gaps).sum() / N),
        "confusion": confusion_KK.tolist(),
    }
