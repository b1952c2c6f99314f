"""Pages and figures with other people's names in them."""

import numpy as np
from matplotlib import image

from tli.reports.figures.style import new_figure, save_figure
from tli.reports.tables import Table, as_markdown, write_markdown


def test_names_are_text_on_a_page(tmp_path):
    name = "<script>alert(1)</script>\x1b[31m <b>"
    page = "\n\n".join(
        [f"# {name}", as_markdown(Table("", ["a|b", name], [[name, "p <.001, a < b"]])), '```json\n{"n": "<b>"}\n```', "x <i>"]
    )
    write_markdown(tmp_path / "page.md", page)
    written = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "<script" not in written
    assert "</script" not in written
    assert "\x1b" not in written
    assert "&lt;script>alert(1)&lt;/script>" in written
    assert "p <.001, a < b" in written
    # what is to be repeated stays what it is
    assert '{"n": "<b>"}' in written
    assert written.endswith("x &lt;i>")


def test_a_dollar_sign_in_a_name_is_no_formula(tmp_path):
    pages = []
    for name in ("$\\frac{broken$", "$x^2$"):
        figure, panels = new_figure((3, 2))
        panels[0, 0].set_title(name)
        panels[0, 0].plot([1, 2], label=name)
        panels[0, 0].legend()
        save_figure(tmp_path / "one.png", figure)
        pages.append(image.imread(tmp_path / "one.png"))
    assert all(np.ptp(page) > 0 for page in pages)
