"""The tiled path against the dense formulas, in float64, with ragged tiles."""

import pytest
import torch
from torch.nn.functional import normalize

from neuclip_scale.similarity import PairFeatures, pair_gradients, pair_logsumexp, pair_row_sums, reference


def make_pairs(world: int, local: slice, dim: int = 7) -> PairFeatures:
    generator = torch.Generator().manual_seed(world)
    image = normalize(torch.randn(world, dim, generator=generator, dtype=torch.float64), dim=1)
    text = normalize(image + 0.5 * torch.randn(world, dim, generator=generator, dtype=torch.float64), dim=1)
    return PairFeatures(image[local], text[local], image, text, local.start)


CASES = [(29, slice(0, 29)), (29, slice(0, 13)), (29, slice(17, 29)), (2, slice(0, 2)), (2, slice(1, 2))]


@pytest.mark.parametrize(("world", "local"), CASES)
@pytest.mark.parametrize("tile_size", [1, 4, 13, 64])
@pytest.mark.parametrize("exclude_diagonal", [False, True])
def test_tiled_equals_dense(world: int, local: slice, tile_size: int, exclude_diagonal: bool) -> None:
    pairs, scale = make_pairs(world, local), torch.tensor([23.0], dtype=torch.float64)
    expected = reference.pair_logsumexp(pairs, scale, exclude_diagonal=exclude_diagonal)
    actual = pair_logsumexp(pairs, scale, exclude_diagonal=exclude_diagonal, tile_size=tile_size)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)

    shifts = [torch.linspace(20, 25, world, dtype=torch.float64), torch.linspace(24, 19, world, dtype=torch.float64)]
    expected = reference.pair_gradients(pairs, scale, *shifts, exclude_diagonal=exclude_diagonal)
    actual = pair_gradients(pairs, scale, *shifts, exclude_diagonal=exclude_diagonal, tile_size=tile_size)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("world", "local"), CASES)
@pytest.mark.parametrize("tile_size", [1, 4, 64])
def test_a_scale_for_every_row(world: int, local: slice, tile_size: int) -> None:
    pairs = make_pairs(world, local)
    scales = torch.linspace(5, 40, 2 * world, dtype=torch.float64).view(world, 2)
    shifts = [scales[:, side] + torch.linspace(-1, 2, world, dtype=torch.float64) for side in range(2)]
    s = pairs.world_image @ pairs.world_text.T
    eye = torch.eye(world, dtype=torch.bool)
    for side, sums in enumerate(pair_row_sums(pairs, scales[local], tile_size=tile_size)):
        logits = (scales[:, side, None] * (s, s.T)[side]).masked_fill(eye, -torch.inf)[local]
        torch.testing.assert_close(sums.logsumexp, torch.logsumexp(logits, 1), rtol=1e-12, atol=1e-12)
        mean = (torch.softmax(logits, 1) * logits.nan_to_num(neginf=0.0)).sum(1)
        torch.testing.assert_close(sums.mean, mean, rtol=1e-12, atol=1e-12)
    weights = (scales[:, :1] * s - shifts[0][:, None]).exp() + (scales[:, 1] * s - shifts[1]).exp()
    weights.masked_fill_(eye, 0.0)
    expected = (weights @ pairs.world_text)[local], (weights.T @ pairs.world_image)[local]
    actual = pair_gradients(pairs, scales, *shifts, exclude_diagonal=True, tile_size=tile_size)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_local_rows_add_up_to_the_whole() -> None:
    scale = torch.tensor([11.0], dtype=torch.float64)
    whole = pair_logsumexp(make_pairs(29, slice(0, 29)), scale, exclude_diagonal=True, tile_size=5)
    parts = [
        pair_logsumexp(make_pairs(29, slice(a, b)), scale, exclude_diagonal=True, tile_size=5)
        for a, b in ((0, 10), (10, 29))
    ]
    for side in range(2):
        torch.testing.assert_close(torch.cat([part[side] for part in parts]), whole[side], rtol=1e-13, atol=1e-13)


def test_extreme_temperatures_stay_finite() -> None:
    pairs = make_pairs(29, slice(0, 29))
    pairs = PairFeatures.single(pairs.image.float(), pairs.text.float())
    for scale in (1e-3, 100.0):
        rows = pair_logsumexp(pairs, torch.tensor([scale]), exclude_diagonal=True, tile_size=8)
        assert all(torch.isfinite(side).all() for side in rows)


def test_no_square_matrix_is_allocated() -> None:
    """Largest tensor any operation returns stays at one tile: counted through the dispatcher, not guessed."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    image = normalize(torch.randn(512, 8), dim=1)
    pairs = PairFeatures.single(image, image.flip(0))
    with Largest() as largest:
        rows = pair_logsumexp(pairs, torch.tensor([10.0]), exclude_diagonal=True, tile_size=32)
        pair_gradients(pairs, torch.tensor([10.0]), *rows, exclude_diagonal=True, tile_size=32)
    assert largest.elements == 512 * 8
