"""Pictures by their clusters: blocks of an .npz against one matrix, and files that lie."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subset_helpers import Row, expected, row_of, select, uids, write_pool

from neuclip_scale.similarity.nearest import nearest_rows
from neuclip_scale.subset import ClipScoreFilter, ImageFilter, Subset, SubsetError, UsageError
from neuclip_scale.subset import embeddings as module
from neuclip_scale.subset.embeddings import open_embeddings
from neuclip_scale.subset.errors import DamagedFileError

WIDTH = 5


def whole_numbers(count: int, seed: int, width: int = WIDTH) -> np.ndarray:
    """Sums of their products are exact, so that ties are ties on any device."""
    return np.random.default_rng(seed).integers(-2, 3, (count, width)).astype(np.float16)


def nearest(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.argmax(features.astype(np.float64) @ centroids.astype(np.float64).T, axis=1)


@pytest.fixture
def pool(tmp_path: Path) -> tuple[Path, list[Row], np.ndarray]:
    found = [row_of(number) for number in range(90)]
    features = whole_numbers(90, 0)
    write_pool(tmp_path / "pool", [found[:50], found[50:]], row_group_size=20)
    np.savez(tmp_path / "pool" / "00000.npz", b32_img=whole_numbers(50, 9), l14_img=features[:50])
    np.savez_compressed(tmp_path / "pool" / "00001.npz", b32_img=whole_numbers(40, 9), l14_img=features[50:])
    np.save(tmp_path / "centroids.npy", whole_numbers(7, 1).astype(np.float32))
    np.save(tmp_path / "target.npy", whole_numbers(3, 2))
    return tmp_path, found, features


def test_clusters_are_those_of_one_matrix(
    pool: tuple[Path, list[Row], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found, features = pool
    monkeypatch.setattr(module, "_BLOCK_BYTES", 7 * WIDTH * 2)  # seven rows at a time
    centroids, target = np.load(folder / "centroids.npy"), np.load(folder / "target.npy")
    wanted = set(nearest(target, centroids).tolist())
    assert 0 < len(wanted) < 7
    cluster = dict(zip((row["uid"] for row in found), nearest(features, centroids).tolist()))
    each = ImageFilter(folder / "centroids.npy", folder / "target.npy", device="cpu")
    select(folder / "pool", folder / "image.npy", each)
    assert uids(folder / "image.npy") == expected(found, lambda row: cluster[row["uid"]] in wanted)

    # Rows that another filter left out are passed over in the array too.
    both = select(folder / "pool", folder / "both.npy", each, ClipScoreFilter("b32", 0.3))
    best = sorted(found, key=lambda row: -row["clip_b32_similarity_score"])[:27]
    assert uids(folder / "both.npy") == expected(best, lambda row: cluster[row["uid"]] in wanted)
    assert [(part.name, part.asked) for part in both.filters] == [("clip_score_b32", 90), ("image", 27)]

    (folder / "clusters.txt").write_text("\n".join(map(str, wanted)))
    by_number = ImageFilter(folder / "centroids.npy", clusters=folder / "clusters.txt", device="cpu")
    select(folder / "pool", folder / "number.npy", by_number)
    assert uids(folder / "number.npy") == uids(folder / "image.npy")


def test_other_embeddings_are_another_selection(pool: tuple[Path, list[Row], np.ndarray]) -> None:
    folder, found, features = pool
    (folder / "clusters.txt").write_text("2")
    each = ImageFilter(folder / "centroids.npy", clusters=folder / "clusters.txt", device="cpu")
    assert not select(folder / "pool", folder / "out.npy", each).was_there
    assert select(folder / "pool", folder / "out.npy", each).was_there
    cluster = nearest(features[::-1], np.load(folder / "centroids.npy"))
    np.savez(folder / "pool" / "00000.npz", l14_img=features[::-1][:50])
    np.savez(folder / "pool" / "00001.npz", l14_img=features[::-1][50:])
    assert not select(folder / "pool", folder / "out.npy", each).was_there
    assert uids(folder / "out.npy") == sorted(row["uid"] for row, own in zip(found, cluster) if own == 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(1, 20), st.integers(1, 7), st.integers(0, 99))
def test_nearest_rows_by_tiles(count: int, num_rows: int, tile_size: int, seed: int) -> None:
    features, rows = whole_numbers(count, seed), whole_numbers(num_rows, seed + 1)
    found = nearest_rows(torch.from_numpy(features).float(), torch.from_numpy(rows).float(), tile_size)
    assert found.tolist() == nearest(features, rows).tolist()


def test_a_row_that_is_not_finite_is_nearest_to_nothing() -> None:
    rows = torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [0.0, 1.0], [float("inf"), 1.0]])
    assert nearest_rows(torch.eye(2), rows).tolist() == [0, 2]
    assert nearest_rows(torch.eye(2), rows[1:2]).tolist() == [-1, -1]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 60),
    st.sets(st.integers(0, 59)),
    st.integers(1, 40),
    st.sampled_from([np.savez, np.savez_compressed]),
)
def test_rows_are_read_forward(count: int, wanted: set[int], batch: int, is_packed: bool) -> None:
    features = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    archive = io.BytesIO()
    (np.savez_compressed if is_packed else np.savez)(archive, l14_img=features)
    places = np.array(sorted(place for place in wanted if place < count), dtype=np.int64)
    with open_embeddings(archive, "l14_img", count) as rows:  # type: ignore[arg-type]
        for begin in range(0, len(places), batch):
            asked = places[begin : begin + batch]
            parts = list(rows.blocks(asked))
            assert np.concatenate([part for part, _ in parts]).tolist() == asked.tolist()
            assert np.array_equal(np.concatenate([block for _, block in parts]), features[asked])
        rows.finish()


def test_rows_that_are_not_finite_are_counted(pool: tuple[Path, list[Row], np.ndarray]) -> None:
    folder, found, features = pool
    features[3, 2], features[7, 0] = np.nan, np.inf
    np.savez(folder / "pool" / "00000.npz", l14_img=features[:50])
    (folder / "all.txt").write_text("\n".join(map(str, range(7))))
    made = select(
        folder / "pool", folder / "out.npy", ImageFilter(folder / "centroids.npy", clusters=folder / "all.txt")
    )
    assert uids(folder / "out.npy") == expected(found[:3] + found[4:7] + found[8:], lambda row: True)
    assert [row["row"] for row in made.unusable] == [3, 7]
    assert made.status == 1


def npz(**members: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return archive.getvalue()


def npy(array: np.ndarray, shape: str = "", cut: int = 0) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    whole = data.getvalue()
    if shape:  # of the same length
        whole = whole.replace(str(array.shape).encode(), shape.encode())
    return whole[: len(whole) - cut]


GOOD = whole_numbers(50, 0)
FLIPPED = bytearray(npz(l14_img=npy(GOOD)))
FLIPPED[300] ^= 1


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (None, "No such file"),
        (b"", "not a zip file"),
        (npz(l14_img=npy(GOOD))[:400], "not a zip file"),
        (bytes(FLIPPED), "CRC|mismatch"),
        (npz(l14_txt=npy(GOOD)), "has no array l14_img, but l14_txt"),
        (npz(l14_img=b"\x93NUMPY\x01\x00"), "EOF|expected"),
        (npz(l14_img=npy(np.array([[object()]], dtype=object))), "array of object"),
        (npz(l14_img=npy(GOOD[:49])), "has 49 rows, the parquet 50"),
        (npz(l14_img=npy(GOOD[0])), "shape \\(5,\\)"),
        (npz(l14_img=npy(GOOD.astype(np.int16))), "array of int16"),
        (npz(l14_img=npy(np.asfortranarray(GOOD))), "embeddings are floats, a row each"),
        (npz(l14_img=npy(GOOD[:, :4])), "rows of 4, and the centroids of 5"),
        (npz(l14_img=npy(GOOD, cut=10)), "ends in the middle"),
        (npz(l14_img=npy(GOOD) + b"more"), "more bytes than its shape"),
        (npz(l14_img=npy(GOOD, shape="(99, 5)")), "has 99 rows"),
    ],
)
def test_an_npz_that_lies_loses_its_file_only(
    pool: tuple[Path, list[Row], np.ndarray], data: bytes | None, fault: str
) -> None:
    folder, found, _ = pool
    path = folder / "pool" / "00000.npz"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    (folder / "all.txt").write_text("\n".join(map(str, range(7))))
    made: Subset = select(
        folder / "pool", folder / "out.npy", ImageFilter(folder / "centroids.npy", clusters=folder / "all.txt")
    )
    assert uids(folder / "out.npy") == expected(found[50:], lambda row: True)
    assert (made.status, made.num_rows, len(made.unreadable)) == (1, 40, 1)
    lost = made.unreadable[0]
    assert (lost.file, lost.num_rows) == ("00000.parquet", 50)
    with pytest.raises(DamagedFileError, match=fault):
        raise DamagedFileError(lost.fault)


def test_files_of_the_filter_are_checked_before_any_work(pool: tuple[Path, list[Row], np.ndarray]) -> None:
    folder, _, _ = pool
    centroids, target = folder / "centroids.npy", folder / "target.npy"
    (folder / "numbers.txt").write_text("0\n7\n")
    np.save(folder / "objects.npy", np.array([[{}]], dtype=object))
    np.save(folder / "wide.npy", np.ones((3, 6)))
    np.save(folder / "nan.npy", np.full((3, 5), np.nan))
    (folder / "none.npy").write_bytes(b"")
    refused = [
        (ImageFilter(centroids), UsageError, "give either --target-embeddings"),
        (ImageFilter(folder / "nothing.npy", target), UsageError, "--centroids .*nothing.npy: there is no such file"),
        (ImageFilter(folder / "objects.npy", target), SubsetError, "--centroids .*objects.npy"),
        (ImageFilter(folder / "none.npy", target), SubsetError, "--centroids .*none.npy"),
        (ImageFilter(centroids, folder / "wide.npy"), SubsetError, "rows of 6 numbers, and --centroids has 5"),
        (ImageFilter(centroids, folder / "nan.npy"), SubsetError, "not finite"),
        (ImageFilter(centroids, clusters=folder / "numbers.txt"), SubsetError, "numbers from 0 to 6"),
        (ImageFilter(centroids, clusters=target), SubsetError, "Give whole numbers"),
    ]
    for each, kind, message in refused:
        with pytest.raises(kind, match=message):
            select(folder / "pool", folder / "out.npy", each)
    if not torch.cuda.is_available():
        with pytest.raises(SubsetError, match="--device cuda: there is no CUDA device"):
            select(folder / "pool", folder / "out.npy", ImageFilter(centroids, target, device="cuda"))
    assert not (folder / "out.npy").exists()
