"""The report in a real browser, with everything hostile that a list and a download can hold."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from audit_worlds import Shard, uid_of, write_download
from browser import in_browser

from neuclip_scale.commands.audit import main

EVIL = '"><script>document.title="owned";window.owned=1</script><img src=x onerror="window.owned=1">'


def hostile_audit(folder: Path) -> Path:
    """An audit whose every text wants to be a script."""
    numbers = range(60)
    table = {
        "uid": [uid_of(n) for n in numbers],
        "url": [f"http://evil{n % 3}<script>alert(1)</script>.example/{n}" for n in numbers],
        "text": [f"{EVIL} {n}" for n in numbers],
        f"language {EVIL}": [EVIL if n % 2 else "en" for n in numbers],
        "score": [n % 13 / 10 for n in numbers],
    }
    pq.write_table(pa.table(table), folder / "list.parquet")
    errors = [None, "timed out", f"{EVIL}\x1b[31m\n"]
    shard = Shard([(n, errors[n % 3]) for n in numbers], [(n, None) for n in numbers if n % 3 == 0])
    write_download(folder / "download", [shard])
    arguments = [
        "--manifest",
        f"{folder}/list.parquet",
        "--download",
        f"{folder}/download",
        "--output",
        f"{folder}/out",
    ]
    assert main([*arguments, "-j", "1"]) == 1
    return folder / "out"


def test_the_page_is_rendered_sorts_and_runs_nothing_else(tmp_path: Path) -> None:
    output = hostile_audit(tmp_path)
    heading = "[...document.querySelectorAll('th')].find(h => h.textContent == 'download')"
    column = f"[...{heading}.closest('table').tBodies[0].rows].map(row => Number(row.cells[1].dataset.value))"
    values, said = in_browser(
        output / "audit.html",
        [
            "[document.title, window.owned ?? 0, document.images.length, document.querySelectorAll('script').length]",
            "[...document.images].every(image => image.complete && image.naturalWidth > 100)",
            f"{heading}.click(), {column}",
            f"{heading}.click(), {column}",
        ],
        tmp_path / "profile",
    )
    assert said == []
    assert values[0] == ["Audit of download", 0, 4, 1]
    assert values[1] is True
    assert values[2] == sorted(values[2], reverse=True)
    assert values[3] == sorted(values[3]) != values[2]


def test_the_document_counts_what_is_listed(tmp_path: Path) -> None:
    output = hostile_audit(tmp_path)
    document = json.loads((output / "audit.json").read_bytes())
    for name, rows in document["lists"].items():
        assert pq.read_metadata(output / "lists" / f"{name}.parquet").num_rows == rows


def test_commands_to_copy_hold_for_any_path(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uid": [uid_of(1)]}), tmp_path / "list.parquet")
    for name in ("a b", "c"):
        write_download(tmp_path / name, [Shard([(1, None)], [(1, None)])])
    downloads = [part for name in ("a b", "c") for part in ("--download", f"{tmp_path}/{name}")]
    main(["--manifest", f"{tmp_path}/list.parquet", *downloads, "--output", f"{tmp_path}/out", "-j", "1"])
    page = html.unescape((tmp_path / "out/audit.html").read_text())
    assert f"neuclip reshard -i '{tmp_path}/a b' -o fair-a-b -s lists/common.parquet" in page
    assert f"neuclip reshard -i {tmp_path}/c -o fair-c" in page
