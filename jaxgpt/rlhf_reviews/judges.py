"""The judges: part B's labeller, and the conjunction that is gold.

N texts   C features
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.classification import classify
from jaxgpt.posttrain.rollout import Rules, log_probs
from jaxgpt.rlhf_reviews.data import LABELS, as_rollout
from jaxgpt.run import Run, require_task

_PACKAGES = {"sklearn": "scikit-learn", "vaderSentiment": "vaderSentiment"}
_BAND = (5, 95)  # percentiles of human continuations
PARTS = ("positive", "no_repeat", "ended", "likely")  # gold is all of them


def check_installed() -> None:
    """Raises ImportError that names the first missing package of the judges."""
    for module, package in _PACKAGES.items():
        if not find_spec(module):
            raise ImportError(
                f"rlhf-reviews needs {package}; install what it needs with `pip "
                "install -r requirements-rlhf.txt`"
            )


class Labeller(NamedTuple):
    """Part B's classifier: TF-IDF of words, and logistic regression.

    Attributes:
      words: maps texts to features, sparse f64 [N, C].
      classifier: of scikit-learn.
    """

    words: Any
    classifier: Any

    def positive_logits(self, texts: Sequence[str]) -> np.ndarray:
        """Logits of a positive text against a negative one, f64 [N]."""
        return np.asarray(self.classifier.decision_function(self.words(texts)))


def train_labeller(reviews: Sequence[dict[str, str]]) -> Labeller:
    """Trains part B's classifier on whole reviews, which takes a few seconds."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    rare = min(30, len(reviews) // 200)
    vectorizer = TfidfVectorizer(min_df=max(1, rare), sublinear_tf=True)
    features = vectorizer.fit_transform([row["text"] for row in reviews])
    is_positive = [row["label"] == LABELS[1] for row in reviews]
    classifier = LogisticRegression(max_iter=1000).fit(features, is_positive)
    return Labeller(vectorizer.transform, classifier)


def is_positive(classifier: Run, texts: Sequence[str]) -> np.ndarray:
    """Whether part C's classifier finds each text positive, bool [N]."""
    labels = require_task(classifier.config, "classification").labels
    return classify(classifier, texts).argmax(axis=1) == labels.index(LABELS[1])


def has_repeated_trigram(text: str) -> bool:
    """Whether three words follow each other twice; case does not matter."""
    words = re.findall(r"\w+(?:'\w+)*", text.lower())
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) < len(trigrams)


def mean_log_probs(
    model: Run, prompts: Sequence[str], texts: Sequence[str]
) -> np.ndarray:
    """Mean log-probability of the tokens of each continuation in nats, f32 [N].

    The tokens are the model's own, so the text alone counts.
    """
    rolled = as_rollout(model, prompts, texts)
    rules = Rules(int(rolled.counts_B.max(initial=1)))
    return log_probs(model, rolled, rules).sum(1) / np.maximum(rolled.counts_B, 1)


def human_band(log_probs_N: np.ndarray) -> tuple[float, float]:
    """The likelihoods between which most human continuations are."""
    low, high = np.percentile(log_probs_N, _BAND)
    return float(low), float(high)


class Gold(NamedTuple):
    """What judges continuations.

    Attributes:
      classifier: part C's, which says whether a text is positive.
      model: part C's language model.
      band: mean log-probability of a token, from and to.
    """

    classifier: Run
    model: Run
    band: tuple[float, float]


def judge(gold: Gold, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Judges continuations {"prompt", "text", "ended"}; returns bool [N] by name.

    The sentiment is of the beginning with its continuation; a repetition is one within
    the continuation. Besides the parts: `gold`, `not_counting_ended`, and `vader`.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    prompts, texts = ([row[name] for row in rows] for name in ("prompt", "text"))
    whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    low, high = gold.band
    log_probs_N = mean_log_probs(gold.model, prompts, texts)
    found = {
        "positive": is_positive(gold.classifier, whole),
        "no_repeat": np.array([not has_repeated_trigram(text) for text in texts]),
        "ended": np.array([row["ended"] for row in rows], bool),
        "likely": (low <= log_probs_N) & (log_probs_N <= high),
    }
    others = [found[part] for part in PARTS if part != "ended"]
    found["gold"] = np.all([found[part] for part in PARTS], axis=0)
    found["not_counting_ended"] = np.all(others, axis=0)
    vader = SentimentIntensityAnalyzer()
    compound = [vader.polarity_scores(text)["compound"] for text in whole]
    found["vader"] = np.array(compound) >= 0.05
    return found
