"""Random text of a wanted number of tokens."""

from __future__ import annotations

import numpy as np

from vlmrt.tools.bench.recounted import Tokenizer

# with a space before it each is one token of the usual vocabularies
WORDS = """
about after again air all along also always and animal another answer any around ask away back because been
before began being below between big book both boy brought but call came car change city close come could
country cut day different does done door down each earth eat end enough even ever every eye face family far
father feet few find first follow food form found four from gave girl give good great group grow had hand hard
has have head hear help here high home horse house how idea into just keep kind know land large last late
learn leave left letter life light like line list little live long look made make man many may mean men might
mile miss more most mother mountain move much music must name near need never new next night often old once
only open other our out over own page paper part people picture place plant play point put question quick read
real right river road rock room run said same saw say school sea second see seem sentence set should show side
since small some song soon sound spell stand start state stop story study such sun take talk tell than that
their them then there these they thing think this those thought three time together told too took town tree
try turn two under until use very voice walk want war watch water way week well went were what wheel when
where which while white who whole why will wind with without wood word work world would write year young
""".split()
SPARE_WORDS = 8


def random_text(num_tokens: int, rng: np.random.Generator, tokenizer: Tokenizer | None = None) -> str:
    """Words in a row: exactly that many tokens with a tokenizer, about that many without one."""
    if num_tokens < 1:
        return ""
    if tokenizer is None:
        return _words(num_tokens, rng)
    text = _words(num_tokens + SPARE_WORDS, rng)
    return text[: tokenizer.ends(text)[num_tokens - 1]]


def _words(count: int, rng: np.random.Generator) -> str:
    return " ".join(WORDS[index] for index in rng.integers(len(WORDS), size=count))


def around(middle: int, range_ratio: float, rng: np.random.Generator) -> int:
    """A whole number, evenly drawn from middle * (1 - range_ratio) to middle * (1 + range_ratio)."""
    low, high = round(middle * (1 - range_ratio)), round(middle * (1 + range_ratio))
    return max(1, int(rng.integers(low, high + 1)))
