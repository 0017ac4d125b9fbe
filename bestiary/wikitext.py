"""Plain paragraphs from the markup of a Wikipedia article.

Only running prose is kept: tables, infoboxes, lists, headings, footnotes, galleries and the closing sections
(references, links) go. A formula or an unknown template inside a line becomes `DROPPED`, so that a caller can leave
out the sentence that it tore a hole into.
"""

import html
import re
from collections.abc import Callable


DROPPED = "\ue000"

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_FOOTNOTE = re.compile(r"<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref\s*>", re.DOTALL | re.IGNORECASE)
_BLOCK_TAG = re.compile(
    r"<(gallery|timeline|imagemap|source|syntaxhighlight|pre|score|poem|ol|ul|table|div)\b[^<>]*>.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_FORMULA_TAG = re.compile(r"<(math|code|chem|sup|nowiki|tt)\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_LINE_TAG = re.compile(r"</?(?:br|p|hr|li|blockquote|center)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]*\s*([^\]]*)\]")
_LINK = re.compile(r"\[\[((?:[^\[\]]|\[[^\[\]]*\](?!\]))*)\]\]")
_NOT_PROSE_LINK = re.compile(r"(?:file|image|media|category|wikt|wiktionary|[a-z]{2,3}(?:-[a-z]+)?):", re.IGNORECASE)
_QUOTE_MARKS = re.compile(r"'{2,}")
_HEADING = re.compile(r"={2,}\s*(.*?)\s*={2,}\s*$")
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_TORN_BRACKETS = re.compile(rf"\s*\([^()]*{DROPPED}[^()]*\)")
_EMPTY_BRACKETS = re.compile(r"\s*\([\s,;:/–-]*\)")
_OPENING_REST = re.compile(r"\((?:[\s,;:]+|or\s+(?=\)))")
_CLOSING_REST = re.compile(r"[\s,;:]+\)")
_SPACE_BEFORE_MARK = re.compile(r"\s+([,.;:?!])(?=\s|$)")

_CLOSING_SECTIONS = frozenset(
    "references|external links|see also|further reading|notes|bibliography|footnotes|sources|works cited|citations|"
    "notes and references|references and notes|selected works|works|filmography|list of works|gallery|"
    "selected bibliography|primary sources|publications|discography|general references|literature".split("|")
)
# Templates that leave nothing in the text: citations, pronunciations, editors' notes.
_SILENT = re.compile(
    r"(?:cite|vcite|sfn|refn|efn|rp$|r$|harv|citation|cn$|fact$|clarif|when$|who$|which$|where$|by whom|according to|"
    r"page needed|better source|failed ver|verify|dubious|disputed|vague|weasel|unreliable|update|full$|full cit|ipa|"
    r"respell|pron|audio|coord|#tag:ref|relevance|qualify|original research|or$|nb$|inflation-fn|bibleref|anchor|"
    r"vanchor|clear|legend|sic$|page |in lang|en icon|fr icon|gr icon|small\b|-$|note)"
)
_FIRST_ARGUMENT = frozenset(
    "nowrap nobr sc smaller big nq vr linktext angbr nihongo ill keypress noitalic pow".split()
)
_LITERAL = {
    "ndash": "–", "spaced ndash": " – ", "snd": " – ", "snds": " – ", "mdash": "—", "mdashb": "—", "nbsp": " ",
    "spaces": " ", "thinsp": " ", "'s": "'s", "'": "'", "' \"": "' \"", "=": "=", "!": "|", "·": "·",
}  # fmt: skip


def plain_paragraphs(wikitext: str) -> list[str]:
    """The paragraphs of running prose of an article, in order.

    Args:
        wikitext: MediaWiki markup as it stands in a dump (after XML unescaping).

    Returns:
        Paragraphs of plain text on one line each; `DROPPED` stands where something inside a line could not be shown.
    """
    text = _COMMENT.sub("", wikitext)
    text = _FOOTNOTE.sub("", text)
    text = _BLOCK_TAG.sub("\n", text)
    text = _FORMULA_TAG.sub(DROPPED, text)
    text = _until_stable(text, lambda part: _TABLE.sub("\n", _TEMPLATE.sub(_template, part)))
    text = _EXTERNAL_LINK.sub(r"\1", text)
    text = _until_stable(text, lambda part: _LINK.sub(_link, part))
    text = _LINE_TAG.sub("\n", text)
    text = html.unescape(_TAG.sub("", text))
    text = _MAGIC_WORD.sub("", _QUOTE_MARKS.sub("", text))

    paragraphs = []
    lines: list[str] = []  # of the current paragraph: line breaks inside one mean nothing in this markup
    closing = False
    for line in [*text.split("\n"), ""]:
        line = " ".join(line.split())
        if line.strip(DROPPED + " ") and line[0] not in "*#:;|!{}=":
            lines.append(line)
            continue
        if lines and not closing:
            paragraphs.append(_tidy(" ".join(lines)))
        lines = []
        heading = _HEADING.match(line)
        if heading is not None and not line.startswith("==="):
            closing = heading.group(1).lower() in _CLOSING_SECTIONS
    return [paragraph for paragraph in paragraphs if paragraph]


def _until_stable(text: str, step: Callable[[str], str]) -> str:
    """Apply `step`, which resolves the innermost brackets, until nothing changes."""
    while (changed := step(text)) != text:
        text = changed
    return text


def _template(match: re.Match[str]) -> str:
    """The text that stands for one template without inner templates."""
    body = match.group(1)
    if "\n" in body:
        return "\n"
    name, *arguments = (part.strip() for part in body.split("|"))
    name = name.lower().replace("_", " ")
    positional = [argument for argument in arguments if "=" not in argument]
    if name in _LITERAL:
        return _LITERAL[name]
    if _SILENT.match(name):
        return ""
    if name in ("convert", "cvt") and len(positional) >= 2:
        ranged = positional[1] in ("to", "-", "–", "and", "by", "x", "or") and len(positional) >= 4
        if ranged and positional[1] in ("-", "–"):
            return f"{positional[0]}–{positional[2]} {positional[3]}"
        return " ".join(positional[: 4 if ranged else 2])
    if name == "as of" and positional:
        return ("as of " if any(a.startswith("lc=") for a in arguments) else "As of ") + positional[0]
    if name in ("circa", "c."):
        return "c. " + "".join(positional[:1])
    if name in ("uss", "hms") and positional:
        return f"{name.upper()} {positional[0]}"
    if name in ("lang", "transl") and positional:
        return positional[-1]
    if (name.startswith("lang-") or name in _FIRST_ARGUMENT) and positional:
        return positional[0]
    return DROPPED


def _link(match: re.Match[str]) -> str:
    """The label of an inner link; nothing for files, categories and other languages."""
    target, *labels = match.group(1).split("|")
    if _NOT_PROSE_LINK.match(target.strip()):
        return ""
    return labels[-1] if labels else target.lstrip(":")


def _tidy(line: str) -> str:
    """Remove what deleted templates leave behind in a line: empty brackets, spaces before marks."""
    line = _TORN_BRACKETS.sub("", line)
    line = _EMPTY_BRACKETS.sub("", line)
    line = _CLOSING_REST.sub(")", _OPENING_REST.sub("(", line))
    return _SPACE_BEFORE_MARK.sub(r"\1", line).strip()
