"""The experiment's texts: parts of the reviews, beginnings, pieces and preferences.

N texts
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.files import replace_file
from jaxgpt.posttrain.rollout import Rollout, Rules
from jaxgpt.run import Run, text_tokenizer
from jaxgpt.text.preferences import encode_prompts
from jaxgpt.text.tables import read_jsonl
from jaxgpt.text.tokenizer import Tokenizer

PARTS = "ABCD"
LABELS = ("negative", "positive")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSONL atomically."""
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    replace_file(path, lambda tmp_path: tmp_path.write_text(text, encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads JSONL."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def part_of(text: str) -> str:
    """The part of the experiment, A to D, that a review belongs to."""
    return PARTS[hashlib.sha256(text.encode()).digest()[8] % len(PARTS)]


def split_reviews(reviews: Path) -> dict[str, list[dict[str, str]]]:
    """The reviews of IMDb of each part, with a label in words.

    Raises ValueError with file and line if one has no text, label 0 or 1, and source.
    """
    parts: dict[str, list[dict[str, str]]] = {part: [] for part in PARTS}
    for place, row in read_jsonl(reviews, ("text", "label", "source")):
        if row["label"] not in ("0", "1"):
            raise ValueError(f"{place}: label={row['label']} must be 0 or 1")
        if row["source"] == "imdb":
            review = {"text": row["text"], "label": LABELS[int(row["label"])]}
            parts[part_of(row["text"])].append(review)
    return parts


def pieces(reviews: Iterable[dict[str, str]], words: int) -> list[dict[str, str]]:
    """Pieces of so many words of the reviews, or at least half as many at the end.

    They are as long as what is judged, and have the label of their review.
    """
    found = []
    for review in reviews:
        each = re.findall(r"\S+\s*", review["text"])
        for start in range(0, len(each) - words // 2 + 1, words):
            text = "".join(each[start : start + words]).strip()
            found.append({"text": text, "label": review["label"]})
    return found


def beginnings(
    reviews: Sequence[dict[str, str]], tokenizer: Tokenizer, rules: Rules, count: int
) -> list[dict[str, Any]]:
    """The distinct beginnings of reviews, and how people continued them.

    A beginning is the text of the first `count` tokens. It is left out if that text
    alone has other tokens, or if nothing follows. The continuation is cut by the rules
    for the policy; it has ended also where the review has.

    Returns rows {"prompt", "text", "tokens", "ended"}, in the order of a hash.
    """
    texts = sorted(
        (review["text"] for review in reviews),
        key=lambda text: hashlib.sha256(text.encode()).digest(),
    )
    ids_N = tokenizer.encode_batch(texts)
    prompts = [tokenizer.decode(ids[:count].tolist()) for ids in ids_N]
    again_N = tokenizer.encode_batch(prompts)
    found: dict[str, dict[str, Any]] = {}
    for prompt, ids, again in zip(prompts, ids_N, again_N, strict=True):
        rest = ids[count:]
        if len(rest) and prompt not in found and np.array_equal(ids[:count], again):
            tokens, ended = cut(rest, rules)
            text = tokenizer.decode(rest[:tokens].tolist())
            row = {"prompt": prompt, "text": text, "tokens": tokens, "ended": ended}
            found[prompt] = row
    return list(found.values())


def cut(ids: np.ndarray, rules: Rules) -> tuple[int, bool]:
    """How many tokens of a text the rules keep, and whether they end it."""
    N, late_ends = rules.max_new_tokens, rules.late_ends
    is_end = np.isin(ids[:N], rules.end_tokens)
    is_late = np.arange(1, len(is_end) + 1) >= late_ends.first
    is_end |= is_late & np.isin(ids[:N], late_ends.tokens)
    if is_end.any():
        return int(is_end.argmax()) + 1, True
    return min(len(ids), N), len(ids) < N


def label_pairs(
    prompts: Sequence[str],
    texts_N2: Sequence[tuple[str, str]],
    logits_N2: np.ndarray,
    flipped: float,
    seed: int,
) -> list[dict[str, Any]]:
    """Preferences for the text of the higher logit, of which a share is flipped.

    Pairs of equal or blank texts are left out. `margin` is the chosen text's logit
    minus the rejected one's, so it is negative where the label is flipped.
    """
    kept = [
        n for n, (a, b) in enumerate(texts_N2) if a.strip() and b.strip() and a != b
    ]
    order = np.random.default_rng(seed).permutation(len(kept))
    wrong = set(order[: round(flipped * len(kept))].tolist())
    rows = []
    for index, n in enumerate(kept):
        chosen = int(logits_N2[n, 1] > logits_N2[n, 0]) ^ (index in wrong)
        rows.append(
            {
                "prompt": prompts[n],
                "chosen": texts_N2[n][chosen],
                "rejected": texts_N2[n][1 - chosen],
                "margin": float(logits_N2[n, chosen] - logits_N2[n, 1 - chosen]),
                "flipped": index in wrong,
            }
        )
    return rows


def continuations(rolled: Rollout, tokenizer: Tokenizer) -> list[str]:
    """The text of each response, without an end-of-text token at its end."""
    found = []
    rows = zip(
        *(rolled.tokens_BT.tolist(), rolled.prompts_B, rolled.counts_B), strict=True
    )
    for tokens, prompt, count in rows:
        ids = tokens[prompt : prompt + count]
        if ids and ids[-1] == tokenizer.end_of_text:
            ids.pop()
        found.append(tokenizer.decode(ids))
    return found


def as_rollout(run: Run, prompts: Sequence[str], texts: Sequence[str]) -> Rollout:
    """Prompts and their continuations as the tokens of a run.

    If both exceed block_size = T, the prompt loses its first tokens, but not its last;
    a continuation of T or more tokens loses all from token T on.
    """
    T, tokenizer = run.config.model.block_size, text_tokenizer(run)
    tokens_NT = np.zeros((len(texts), T), np.int32)
    shape_N2 = np.zeros((len(texts), 2), np.int32)
    encoded = zip(
        encode_prompts(tokenizer, run.config, prompts),
        tokenizer.encode_batch(texts),
        strict=True,
    )
    for n, (prompt, text) in enumerate(encoded):
        kept, text = prompt[-max(1, T - len(text)) :], text[: T - 1]
        tokens_NT[n, : len(kept) + len(text)] = np.concatenate([kept, text])
        shape_N2[n] = len(kept), len(text)
    ended_N = np.ones(len(texts), bool)
    return Rollout(*map(jnp.asarray, (tokens_NT, *shape_N2.T, ended_N)))
