"""`audit.html`: the document for people, plain words first. Nothing in it is computed; all comes from audit.json."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from neuclip_scale.audit import figures
from neuclip_scale.audit.findings import percent
from neuclip_scale.html import embedded, render
from neuclip_scale.untrusted_text import printable


class Cell(NamedTuple):
    """What a table shows, and the number by which it sorts; None for a text."""

    text: str
    value: float | int | None = None


@dataclass(frozen=True)
class Grid:
    """A table that sorts."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Grid] = field(default_factory=list)
    code: list[str] = field(default_factory=list)


def render_page(document: Mapping[str, Any]) -> str:
    """The page as one HTML text."""
    names = [part["name"] for part in document["downloads"]]
    verdict = "Discrepancies were found." if document["status"] else "No discrepancy above the limits that were given."
    order = sorted(document["findings"], key=lambda finding: not finding["is_discrepancy"])
    return render(
        "audit.html",
        sorts=True,
        title=printable(" and ".join(names)),
        against=bool(document["status"]),
        verdict=verdict,
        findings=[printable(f"{finding['subject']}: {finding['text']}") for finding in order],
        sections=[section for section in _sections(document) if section is not None],
    )


def _sections(document: Mapping[str, Any]) -> Iterator[Section | None]:
    yield _effect(document)
    yield _counts(document)
    yield _reasons(document)
    yield _pairs(document)
    yield _runs(document)
    for part in document["downloads"]:
        yield _places(part)
        yield _bias(part)
        yield _content(part)
    yield _lists(document)
    yield _inputs(document)


def _counts(document: Mapping[str, Any]) -> Section:
    parts = document["downloads"]
    rows = [
        [
            text(name.replace("_", " ")),
            *(count(part["counts"][name]) for part in parts),
            text(document["classes"].get(name, "")),
        ]
        for name in document["counts"]
    ]
    columns = ("uids", *(printable(part["name"]) for part in parts), "meaning")
    known = "uid" if document["identity"] == "uid" else "MD5 of the url"
    return Section(
        "What is there", [f"Samples are counted by their {known}, each once."], tables=[Grid("", columns, rows)]
    )


def _reasons(document: Mapping[str, Any]) -> Section | None:
    told = {part["name"]: part["reasons"] for part in document["downloads"] if part["reasons"]}
    if not told:
        return None
    picture = figures.draw_reasons({name: {n: r["count"] for n, r in found.items()} for name, found in told.items()})
    grids = []
    for part in document["downloads"]:
        missing = max(1, part["counts"]["missing"])
        rows = [
            [
                text(name.replace("_", " ")),
                text(reason["words"]),
                count(reason["count"]),
                share(reason["count"] / missing),
                text("yes" if reason["is_passing"] else "no"),
            ]
            for name, reason in part["reasons"].items()
        ]
        if rows:
            columns = ("reason", "meaning", "samples", "share of the missing", "worth another try")
            grids.append(Grid(printable(part["name"]), columns, rows))
        grids += _shard_grids(part)
    return Section("Why samples are missing", [], [("why samples are missing", embedded(picture))], grids)


def _shard_grids(part: Mapping[str, Any]) -> Iterator[Grid]:
    name = printable(part["name"])
    if part["outages"]:
        rows = [
            [
                text(row["shard"]),
                count(row["attempted"]),
                count(row["passing"]),
                text(row["main_reason"]),
                share(row["usual_share"]),
            ]
            for row in part["outages"]
        ]
        columns = ("shard", "attempted", "failed for a passing reason", "mostly", "share in a good shard")
        yield Grid(f"{name}: shards that failed as a whole", columns, rows)
    if part["damaged_shards"]:
        rows = [[text(row["shard"]), text(row["fault"])] for row in part["damaged_shards"]]
        yield Grid(f"{name}: damaged shards", ("shard", "fault"), rows)


def _places(part: Mapping[str, Any]) -> Section | None:
    if not part["places"]:
        return None
    grids, pictures = [], []
    for places in part["places"]:
        rows = [
            [
                text(row["name"]),
                count(row["total"]),
                count(row["lost"]),
                share(row["share"]),
                share(row["low"]),
                share(row["high"]),
            ]
            for row in places["rows"]
        ]
        columns = (
            places["what"],
            "wanted" if places["what"] not in ("shard", "day") else "attempted",
            "lost",
            "share",
            "low",
            "high",
        )
        rest = places["num_groups"] - len(rows)
        more = f"; {rest:,} more lack {places['lost_elsewhere']:,}" if rest else ""
        grids.append(Grid(f"by {places['what']}, those that lack most{more}", columns, rows))
        if places["what"] == "domain of the url" and rows:
            pictures.append(("share lost by domain", embedded(figures.draw_places(places))))
    words = ["Shares come with their 95 % interval (Wilson): a host with three pictures proves little."]
    return Section(f"Where samples of {printable(part['name'])} are missing", words, pictures, grids)


def _bias(part: Mapping[str, Any]) -> Section | None:
    bias = part.get("bias")
    if not bias:
        return None
    numbers = [
        [text(row["column"]), count(row["kept"]["mean"]), count(row["missing"]["mean"]), count(row["mean_difference"]),
         text(row["size"]), count(row["distance"]), count(row["q"])]
        for row in bias["numbers"]
    ]  # fmt: skip
    categories = [
        [text(row["column"]), count(row["balanced_v"]), text(row["size"]), count(row["q"])]
        for row in bias["categories"]
    ]
    grids = []
    if numbers:
        columns = ("column", "mean, there", "mean, missing", "standardised difference", "size", "KS distance", "q")
        grids.append(Grid("numbers", columns, numbers))
    if categories:
        grids.append(Grid("categories", ("column", "Cramer's V at equal sizes", "size", "q"), categories))
    if bias["left_out"]:
        rows = [[text(row["column"]), text(row["reason"])] for row in bias["left_out"]]
        grids.append(Grid("not compared", ("column", "why"), rows))
    pictures = []
    if bias["numbers"]:
        pictures.append(("distributions of numeric columns", embedded(figures.draw_numbers(bias["numbers"]))))
    if bias["categories"]:
        pictures.append(("shares of categories", embedded(figures.draw_categories(bias["categories"]))))
    words = [printable(sentence) for sentence in bias["sentences"]]
    words.append(
        "With many samples every difference is significant: go by its size. q is the p-value after Benjamini-Hochberg."
    )
    return Section(f"How what {printable(part['name'])} lost differs", words, pictures, grids)


def _content(part: Mapping[str, Any]) -> Section | None:
    content = part.get("content")
    if not content:
        return None
    grids = []
    if content["tiers"]:
        rows = [[text(tier), count(number)] for tier, number in content["tiers"].items()]
        grids.append(Grid("how much shows of what changed", ("look", "samples"), rows))
    changed = content["mass_changes"]["listed"]
    if changed:
        rows = [
            [
                text(host["host"]),
                count(host["num_checked"]),
                count(host["num_changed"]),
                share(host["low"]),
                count(host["num_different"]),
            ]
            for host in changed
        ]
        columns = ("host", "checked", "changed", "at least (99.9 %)", "look otherwise")
        grids.append(Grid("hosts that changed far more than the others", columns, rows))
    listed = content["placeholders"]["listed"]
    if listed:
        rows = [
            [
                text(each["content"][:16]),
                *(count(each[name]) for name in ("num_samples", "num_urls", "num_captions")),
                text(", ".join(f"{host} ({number})" for host, number in each["hosts"])),
            ]
            for each in listed
        ]
        grids.append(Grid("placeholder pictures", ("sha256", "samples", "urls", "captions", "hosts"), rows))
    words = [printable(sentence) for sentence in content["sentences"]]
    return Section(f"Content of {printable(part['name'])}", words, tables=grids)


def _pairs(document: Mapping[str, Any]) -> Section | None:
    pairs = document["pairs"]
    if not pairs:
        return None
    shown = ("common", "only_first", "only_second", "jaccard", "epochs_first", "epochs_second")
    rows = [[text(f"{pair['first']} / {pair['second']}"), *(count(pair[name]) for name in shown)] for pair in pairs]
    columns = (
        "downloads",
        "common",
        "only in the first",
        "only in the second",
        "Jaccard",
        "passes over the first",
        "over the second",
    )
    words = [
        "Samples that can be used. Passes are those of a run over as many samples seen as were given; unknown without."
    ]
    return Section("Downloads against each other", words, tables=[Grid("", columns, rows)])


def _runs(document: Mapping[str, Any]) -> Section | None:
    if not document["runs"]:
        return None
    shown = ("samples_seen", "trained", "untrained", "most_often")
    rows = [
        [text(run["name"]), text(run["download"]), *(count(run[name]) for name in shown)] for run in document["runs"]
    ]
    columns = ("run", "download", "samples seen", "different samples", "usable but never seen", "most often seen")
    return Section("What training saw", tables=[Grid("", columns, rows)])


def _effect(document: Mapping[str, Any]) -> Section | None:
    effect, empirical = document["effect"], document["empirical"]
    if not effect and not empirical:
        return None
    words = [printable(sentence) for sentence in effect["sentences"]] if effect else []
    grids = []
    if empirical:
        words.append(printable(empirical["sentence"]))
        rows = [
            [text(arm["name"]), count(arm["num_pairs"]), count(arm["estimate"]["mean"]),
             text(", ".join(f"{score:.2f}" for score in arm["scores"]))]
            for arm in empirical["arms"]
        ]  # fmt: skip
        grids.append(Grid("trained at small scale", ("arm", "pairs", "mean score", "by seed"), rows))
    return Section("Does it matter?", words, tables=grids)


def _lists(document: Mapping[str, Any]) -> Section:
    rows = [[text(f"lists/{name}.parquet"), count(rows)] for name, rows in document["lists"].items()]
    words = ["Each list is a parquet with a column uid and, beside it, an .npy in DataComp's form."]
    code = []
    for name in (name for name in document["lists"] if name.rpartition("/")[2] == "retry" and document["lists"][name]):
        caption = " --caption_col text" if "text" in document["columns"] or document["has_text"] else ""
        saved = " --save_additional_columns '[\"uid\"]'" if document["has_uids"] else ""
        code.append(
            f"img2dataset --url_list lists/{name}.parquet --input_format parquet --url_col url{caption}{saved} "
            f"\\\n    --output_format webdataset --output_folder again/{name}"
        )
    if code:
        words.append(
            "retry has the url and the list's other columns of what is worth another try: img2dataset never tries a "
            "finished shard again. Give the new folder beside the old one to `neuclip data index`, joined by ::."
        )
    for part in document["downloads"]:
        name = "common" if document["identity"] == "uid" else f"common_in_{part['name']}"
        if name in document["lists"] and part["tars"]:
            pool = shlex.quote(part["path"])
            code.append(f"neuclip reshard -i {pool} -o fair-{part['name']} -s lists/{name}.parquet")
    if "common" in document["lists"]:
        words.append("common is the subset on which the downloads can be compared fairly.")
    return Section(
        "Lists",
        words,
        tables=[Grid("", ("file", "uids"), rows)],
        code=["\n".join(map(printable, line.split("\n"))) for line in code],
    )


def _inputs(document: Mapping[str, Any]) -> Section:
    given = document["inputs"]
    rows = [[text("list"), text(given["manifest"])]]
    rows += [[text(f"download {name}"), text(path)] for name, path in given["downloads"].items()]
    rows += [[text(f"run {name}"), text(path)] for name, path in given["runs"].items()]
    rows += [[text("subset"), text(given["subset_file"])]] if given["subset_file"] else []
    rows += [[text(name.replace("_", " ")), count(limit)] for name, limit in document["thresholds"].items()]
    rows.append([text("digest"), text(document["digest"])])
    rows.append(
        [text("made"), text(f"{document['created']}, neuclip-scale {document['neuclip_scale']}, {document['engine']}")]
    )
    return Section(
        "What this is about", [printable(note) for note in document["notes"]], tables=[Grid("", ("", ""), rows)]
    )


def text(value: Any) -> Cell:
    """A cell of words; nothing in it is trusted."""
    return Cell(printable(str(value))[:300])


def count(value: float | int | None) -> Cell:
    """A cell with a number, `unknown` for None."""
    if value is None:
        return Cell("unknown", -1)
    if isinstance(value, str):  # a number that JSON has not
        return Cell(value, None)
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.4g}", value)


def share(value: float) -> Cell:
    """A cell with a share."""
    return Cell(percent(value), value)
