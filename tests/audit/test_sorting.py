"""Tables that a click on a heading sorts."""

from __future__ import annotations

from pathlib import Path

from browser import in_browser

import neuclip_scale.html


def test_numbers_come_before_texts_and_empty_cells_last(tmp_path: Path) -> None:
    script = (Path(neuclip_scale.html.__file__).parent / "sorting.js").read_text("utf-8")
    rows = "".join(f"<tr><td>{text}</td></tr>" for text in ("b", "9", "", "10", "a", "2.5"))
    table = f'<table class="sortable"><thead><tr><th>x</th></tr></thead><tbody>{rows}</tbody></table>'
    page = tmp_path / "page.html"
    page.write_text(f"<!DOCTYPE html>{table}<script>{script}</script>")
    order = '[...document.querySelectorAll("td")].map(cell => cell.textContent).join()'
    click = f'document.querySelector("th").click(), {order}'
    orders, said = in_browser(page, [order, click, click], tmp_path / "profile")
    assert orders == ["b,9,,10,a,2.5", "b,a,10,9,2.5,", "2.5,9,10,a,b,"]
    assert said == []
