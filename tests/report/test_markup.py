from html import unescape

from hypothesis import given
from hypothesis import strategies as st

from compress.report.markup import element, join, number


@given(text=st.text())
def test_text_is_escaped_as_child_and_as_attribute(text: str) -> None:
    for html in (element("p", text), element("p", element("b", text), title=text)):
        inside = html.removeprefix("<p>").removesuffix("</p>")
        assert unescape(html).count(text) >= 1
        assert "<script" not in inside
    assert not set(element("p", text)[3:-4]) & set('<>"')


def test_attributes() -> None:
    html = element("a", class_="x", data_series="1", viewBox="0", hidden=True, title=None, open=False, x=1.500)
    assert html == '<a class="x" data-series="1" viewBox="0" hidden x="1.5"></a>'


def test_none_is_left_out_and_separators_are_markup() -> None:
    assert join("a<", None, element("b"), separator="<wbr>") == "a&lt;<wbr><b></b>"


@given(value=st.floats(-1e4, 1e4))
def test_numbers_are_short_and_right(value: float) -> None:
    assert abs(float(number(value)) - value) <= 0.005001
    assert number(value) != "-0"
