"""Split English prose into sentences with a few rules (no model, no download).

A boundary is a run of `.`, `!`, `?` or `…`, with closing quotes or brackets, before white space and something that can
open a sentence. A full stop is no boundary after a title or a reference word ("Mr.", "e.g."), after "No." and its like
before a number, and after an initial, an acronym or "Jr." unless a word follows that usually opens a sentence ("the",
"he", "in").
"""

import re


_BOUNDARY = re.compile(r"""([.!?…]+)["'”’)\]]*\s+(?=["'“‘(\[]*[A-ZÀ-Þ0-9$£€])""")
_WORD_BREAK = re.compile(r"""[\s"'“‘”’(\[—–]""")
_NEXT_WORD = re.compile(r"""["'“‘(\[]*([A-Za-z]+)""")
_INITIALS = re.compile(r"(?:[A-Z]|[A-Za-z](?:\.[A-Za-z])+)$")

# Never the end of a sentence.
_NEVER = frozenset(
    "mr mrs ms messrs mme dr prof st rev hon gen brig col lt capt cmdr adm maj sgt sen rep gov pres supt "
    "vs v cf viz eg e.g ie i.e ca c approx fig figs ed eds trans".split()
)
# Not the end of a sentence before a number: "No. 7", "pp. 10-12", "Jan. 5".
_BEFORE_NUMBER = frozenset(
    "no nos p pp vol vols ch sec sect art arts par chap jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
# The end of a sentence only before a word of `_OPENERS`.
_RARELY = frozenset("jr sr inc co corp ltd bros etc al ph.d a.m p.m a.d b.c dept univ mt ft".split())
_OPENERS = frozenset(
    "the a an this that these those it its he his she her they their we our you your i my there here in on at by for "
    "from with of to as if when while after before since during although though because however but and or so yet nor "
    "not no what who which how why where then thus therefore moreover furthermore nevertheless meanwhile both each "
    "every all some many most several few other another such under between among through until despite according "
    "also only even let may has have had is are was were do does did can could should would will".split()
)


def split_sentences(text: str) -> list[str]:
    """Split one paragraph into its sentences, in order.

    Args:
        text: prose; runs of white space (line breaks too) count as one space.

    Returns:
        The sentences without surrounding white space; joined by one space they give the paragraph again. Empty for a
        text of white space only.
    """
    text = " ".join(text.split())
    sentences = []
    start = 0
    for match in _BOUNDARY.finditer(text):
        if match.group(1) == "." and not _ends_sentence(text[start : match.start()], text[match.end() :]):
            continue
        sentences.append(text[start : match.end()].rstrip())
        start = match.end()
    if start < len(text):
        sentences.append(text[start:])
    return sentences


def _ends_sentence(before: str, after: str) -> bool:
    """Whether the single full stop between `before` and `after` ends a sentence."""
    word = _WORD_BREAK.split(before)[-1]
    lowered = word.lower()
    if lowered in _NEVER and not (len(word) == 1 and word.isupper()):
        return False
    if lowered in _BEFORE_NUMBER and after[:1].isdigit():
        return False
    if lowered in _RARELY or _INITIALS.match(word):
        following = _NEXT_WORD.match(after)
        return following is not None and following.group(1).lower() in _OPENERS
    return True
