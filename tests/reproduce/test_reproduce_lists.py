"""Published lists: given as text or parquet, or fetched from a hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import serve_hub

from neuclip_scale.config import ConfigError
from neuclip_scale.reproduce import listing
from neuclip_scale.reproduce.errors import ReproduceError
from neuclip_scale.reproduce.experiment import load_experiment
from neuclip_scale.reproduce.listing import list_path, list_stage
from neuclip_scale.reproduce.request import Request

ROWS = [("a cat", "http://a.org/1.jpg"), ('say "no"', "http://b.org/2.jpg"), ("ünïcode", "http://c.org/3.jpg")]


def do(request: Request) -> dict[str, object]:
    stage = list_stage(request)
    if stage.do:
        stage.do(request.places.log("list"))
    return stage.read()


def request_for(name: str, output: Path, given: object = "") -> Request:
    return Request(experiment=load_experiment(name), output=output, list=str(given))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["cc3m", "cc12m"])
def test_a_text_list_gets_uids_of_its_urls(
    order: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_ROWS_OF_A_FILE", 2)
    text = "".join("\t".join(row[place] for place in order) + "\n" for row in ROWS)
    (tmp_path / "list.tsv").write_text(text, encoding="utf-8")
    request = request_for("cc3m", tmp_path / "out", tmp_path / "list.tsv")
    assert do(request) == {"listed": 3}
    assert len(list(list_path(request).glob("*.parquet"))) == 2, "files of two rows"
    table = pq.read_table(list_path(request)).to_pylist()
    assert [(row["text"], row["url"]) for row in table] == ROWS
    assert [row["uid"] for row in table] == [hashlib.md5(url.encode()).hexdigest() for _, url in ROWS]


def test_a_parquet_keeps_its_columns_and_gets_the_names_that_stages_use(tmp_path: Path) -> None:
    columns = {"TEXT": [row[0] for row in ROWS], "URL": [row[1] for row in ROWS], "score": [0.1, 0.2, None]}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    request = request_for("dfn14m", tmp_path / "out", tmp_path / "list.parquet")
    assert do(request) == {"listed": 3}
    assert pq.read_table(list_path(request)).column_names == ["text", "url", "score", "uid"]
    ready = tmp_path / "ready.parquet"
    pq.write_table(pa.table({"uid": ["0" * 32], "url": ["u"], "text": ["t"]}), ready)
    given = request_for("dfn14m", tmp_path / "out2", ready)
    assert list_path(given) == ready
    assert do(given) == {"listed": 1}
    assert not (tmp_path / "out2").exists(), "a list that is ready is not copied"


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"PAR1 cut off", "no whole parquet"), ("url\n", "needs columns url and text")],
)
def test_a_list_that_is_none_is_told(content: object, said: str, tmp_path: Path) -> None:
    given = tmp_path / ("list.tsv" if isinstance(content, str) else "list.parquet")
    if isinstance(content, bytes):
        given.write_bytes(content)
    elif isinstance(content, str):
        given.write_text(content + "http://a.org/1.jpg\n")
    with pytest.raises(ReproduceError, match=f"--list.*{said}"):
        do(request_for("cc3m", tmp_path / "out", given))


def test_datacomps_pool_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub/mlfoundations/datacomp_pools"
    for scale, rows in (("small", 5), ("medium", 50)):
        (folder / scale).mkdir(parents=True)
        for number in range(2):
            uids = [f"{scale[0]}{number}{row}" for row in range(rows)]
            table = pa.table({"uid": uids, "url": uids, "text": uids})
            pq.write_table(table, folder / scale / f"{number}.parquet")
    request = request_for("small", tmp_path / "out")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "2")
    with pytest.raises(ReproduceError, match="mlfoundations/datacomp_pools could not be fetched"):
        do(request)
    with serve_hub(tmp_path / "hub") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        assert do(request) == {"listed": 10}
    # img2dataset looks into no folder of the folder.
    assert sorted(path.name for path in list_path(request).iterdir()) == ["small-0.parquet", "small-1.parquet"]
    assert pq.read_table(list_path(request)).num_rows == 10


def test_a_list_that_is_not_there_or_has_changed_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--list = .*none.tsv.*cannot be read"):
        list_stage(request_for("cc3m", tmp_path, tmp_path / "none.tsv"))
    given = tmp_path / "list.tsv"
    given.write_text("http://a.org/1.jpg\ta\n")
    before = list_stage(request_for("cc3m", tmp_path, given)).settings
    (tmp_path / "moved").mkdir()
    given.rename(tmp_path / "moved/list.tsv")
    assert list_stage(request_for("cc3m", tmp_path, tmp_path / "moved/list.tsv")).settings == before
    given.write_text("http://a.org/1.jpg\tb\nhttp://a.org/2.jpg\tc\n")
    assert list_stage(request_for("cc3m", tmp_path, given)).settings != before
