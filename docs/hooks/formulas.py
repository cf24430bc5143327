"""Formulas as MathML, which browsers draw without a script.

This module rewrites the LaTeX that the converter does not know, and corrects the spaces that it leaves.
"""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
TAG = re.compile(r"\\tag\{(.+?)\}")
PREPARED = (
    (r"\\\\\[\d+pt\]", r"\\\\"),  # extra space between rows
    (r"\\[bB]ig([(\[])", r"{\\left\1"),  # a pair of delimiters is one base for what follows it
    (r"\\[bB]ig([)\]])", r"\\right\1}"),
    (r"(\\begin\{pmatrix\}.*?\\end\{pmatrix\})", r"{\1}"),
)
CORRECTED = (
    (r"<mo[^>]*>(?:&#x0007C;|\|)</mo>", '<mo stretchy="false" lspace="0" rspace="0">|</mo>'),
    (r"<mo>(?:&#x0002F;|/)</mo>", '<mo lspace="0" rspace="0">/</mo>'),
    (r"<mo(?: movablelimits=\"true\")?>([A-Za-z]{2,})</mo>", r"<mi>\1</mi>"),
    # operators such as ln stand off from what follows, except from a bracket
    (r"(<mi>(?:ln|log|det|Tr|Var|Cov|diag)</mi>)(?!<mo|<mrow><mrow><mo|</)", r'\1<mspace width="0.17em"/>'),
    # a sign after a relation or at the beginning belongs to its number
    (
        r"(<mo>(?:&#x0003D;|&#x02248;|&#x02192;|\()</mo>)<mo>&#x02212;</mo>",
        r'\1<mo form="prefix">&#x02212;</mo>',
    ),
)


def on_page_content(html: str, **_: Any) -> str:
    """Each formula of a page as MathML, with its number beside it."""
    return FORMULA.sub(_formula, html)


def _formula(found: re.Match[str]) -> str:
    latex = unescape(found[2]).strip()
    tag = TAG.search(latex)
    latex = TAG.sub("", latex)
    for pattern, replacement in PREPARED:
        latex = re.sub(pattern, replacement, latex, flags=re.DOTALL)
    drawn = convert(latex, display="block" if found[1] == "div" else "inline")
    for pattern, replacement in CORRECTED:
        drawn = re.sub(pattern, replacement, drawn)
    return drawn if tag is None else f'<div class="equation">{drawn}<span>({tag[1]})</span></div>'
