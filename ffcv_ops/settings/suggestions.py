"""Suggestions for a name that does not exist."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return ``"; did you mean training.epochs?"`` with the most similar names, otherwise a pointer to ``--help``.

    Names are compared as a whole and by their last part, so that a key in the wrong section is found too.
    """

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], other.rpartition(".")[2]).ratio()
        return max(whole, 0.95 * last)

    scores = sorted(((likeness(other), other) for other in names), key=lambda score: (-score[0], score[1]))
    near = [f"{prefix}{other}" for score, other in scores[:3] if score >= max(0.6, scores[0][0] - 0.1)]
    return f"; did you mean {' or '.join(near)}?" if near else "; --help lists every setting"
