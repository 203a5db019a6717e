"""The judges: part B's labeller, and the conjunction that is gold.

N texts   C features
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgpt.models.encoder import Classifier, masked_mean
from jaxgpt.posttrain.rollout import Rollout, Rules, in_batches, log_probs
from jaxgpt.rlhf_reviews.data import LABELS, as_rollout
from jaxgpt.run import Run, require_task, text_tokenizer
from jaxgpt.text.labelled import encode_texts

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


def pooled(labeller: Run, texts: Sequence[str]) -> np.ndarray:
    """What the head of a classifier reads of each text, f32 [N, C]."""
    T = labeller.config.model.block_size
    sequences = encode_texts(texts, text_tokenizer(labeller), T, None)
    N = len(texts)
    arrays = sequences.padded(np.arange(N), T), sequences.lengths.astype(np.int32)
    none_N = np.zeros(N, np.int32)
    rows = Rollout(*map(jnp.asarray, (*arrays, none_N, none_N == 0)))

    def features(model: Classifier, tokens_BT: Any, lengths_B: Any) -> Any:
        return masked_mean(model.encoder(tokens_BT, lengths_B), lengths_B)

    def predict(params: Any, rows: Rollout) -> Any:
        inputs = rows.tokens_BT, rows.prompts_B
        found_BC = labeller.model.apply({"params": params}, *inputs, method=features)
        return jnp.asarray(found_BC)

    return in_batches(predict, labeller, rows)


def positive_logits(labeller: Run, pooled_NC: np.ndarray) -> np.ndarray:
    """Logits of a positive text against a negative one, f32 [N]."""
    labels = require_task(labeller.config, "classification").labels
    head = labeller.params["classifier"]
    kernel_C2 = np.asarray(head["kernel"]).reshape(pooled_NC.shape[1], 2)
    sign_2 = [1 if label == LABELS[1] else -1 for label in labels]
    logits_N: np.ndarray = pooled_NC @ (kernel_C2 @ sign_2)
    return logits_N + np.asarray(head.get("bias", np.zeros(2))) @ sign_2


class GoldClassifier(NamedTuple):
    """Part C's classifier: TF-IDF of words and word pairs, and logistic regression.

    Attributes:
      pipeline: of scikit-learn.
      accuracy: on pieces of part C that it was not trained on.
    """

    pipeline: Any
    accuracy: float

    def is_positive(self, texts: Sequence[str]) -> np.ndarray:
        """Whether each text is positive, bool [N]."""
        return np.asarray(self.pipeline.predict(texts) == LABELS[1])


def train_classifier(
    train: Sequence[dict[str, str]], test: Sequence[dict[str, str]]
) -> GoldClassifier:
    """Trains part C's classifier on texts with a label."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    pipeline = make_pipeline(words, LogisticRegression(C=4, max_iter=1000))
    pipeline.fit([r["text"] for r in train], [r["label"] for r in train])
    truth = [row["label"] for row in test]
    accuracy = pipeline.score([row["text"] for row in test], truth)
    return GoldClassifier(pipeline, float(accuracy))


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
    rules = Rules(int(rolled.counts_B.max(initial=1)), 0, (), 1.0)
    return log_probs(model, rolled, rules).sum(1) / np.maximum(rolled.counts_B, 1)


def human_band(log_probs_N: np.ndarray) -> tuple[float, float]:
    """The likelihoods between which most human continuations are."""
    low, high = np.percentile(log_probs_N, _BAND)
    return float(low), float(high)


class Gold(NamedTuple):
    """What judges continuations.

    Attributes:
      classifier: says whether a text is positive.
      model: part C's language model.
      band: mean log-probability of a token, from and to.
    """

    classifier: GoldClassifier
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
        "positive": gold.classifier.is_positive(whole),
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
