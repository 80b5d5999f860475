"""The picture is valid, self-contained, and darker where the value is larger."""

import re
from xml.etree import ElementTree

from svdconvert.reports.heatmap import heatmap

SVG = "{http://www.w3.org/2000/svg}"


def cells(picture: str) -> dict[str, str]:
    """Label -> colour."""
    found = {}
    for rect in ElementTree.fromstring(picture).iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            found[str(title.text)] = rect.attrib["fill"]
    return found


def test_larger_values_are_darker() -> None:
    values = {(layer, "attn.q"): 10.0**layer for layer in range(5)}
    colours = [
        int(colour[1:3], 16) for colour in cells(heatmap("x", ["attn.q"], [*range(5)], values)).values()
    ]
    assert colours == sorted(colours, reverse=True) and colours[0] > colours[-1]


def test_a_zero_is_white_and_a_missing_cell_is_left_out() -> None:
    picture = heatmap("x", ["a", "b"], [0, 1], {(0, "a"): 0.0, (1, "b"): 2.0})
    assert cells(picture) == {"a, layer 0: 0.000e+00": "#ffffff", "b, layer 1: 2.000e+00": "#08306b"}


def test_nothing_is_loaded_and_names_are_escaped() -> None:
    picture = heatmap("<b>&\"'", ["<script>"], [0], {(0, "<script>"): 1.0})
    assert "<script>" not in picture and "<b>" not in picture
    assert re.findall(r"https?://[^\"]+", picture) == ["http://www.w3.org/2000/svg"]
    ElementTree.fromstring(picture)


def test_control_characters_of_a_name_are_escapes_in_well_formed_xml() -> None:
    picture = heatmap("a\x1b[31m\x00\u202e<b>", ["q\x07&"], [0], {(0, "q\x07&"): 1.0})
    title = ElementTree.fromstring(picture).find(f"{SVG}title")
    assert title is not None and title.text == "a\\x1b[31m\\x00\\u202e<b>"
    assert "q\\x07&amp;" in picture
