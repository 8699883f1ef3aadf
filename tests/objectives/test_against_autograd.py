"""Each objective's loss and gradients against autograd through a dense formula written here from the papers."""

import math
from typing import Any

import dense
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from neuclip_scale.losses import create_loss
from neuclip_scale.normalizers import DatasetFeatures
from neuclip_scale.objectives.fastclip import later_gamma_min
from neuclip_scale.objectives.neuclip_queue import default_size
from neuclip_scale.objectives.registry import OBJECTIVES

N, B, D = 60, 21, 6
EPS, RHO = 1e-8, 6.5


def batches(num_steps: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    image = torch.randn(N, D, generator=generator, dtype=dtype)
    text = image + 0.7 * torch.randn(N, D, generator=generator, dtype=dtype)
    picks = [torch.randperm(N, generator=generator)[:B] for _ in range(num_steps)]
    drift = [1 + 0.1 * torch.randn(N, D, generator=generator, dtype=dtype) for _ in range(num_steps)]
    return [((image * d)[index], text[index], index) for index, d in zip(picks, drift)]


def encode_dataset() -> DatasetFeatures:
    """What an encoder that stands still would give for all N pairs."""
    image, text = torch.randn(2, N, D, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return DatasetFeatures(normalize(image, dim=1), normalize(text, dim=1), torch.arange(N))


def leaves(image: Tensor, text: Tensor, log_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return (
        image.clone().requires_grad_(),
        text.clone().requires_grad_(),
        torch.tensor([log_scale], dtype=image.dtype, requires_grad=True),
    )


def dense_log_g(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """log of the mean of exp((s_ij - s_ii)/tau) over the other pairs, both sides."""
    s = image @ text.T
    eye = torch.eye(len(image), dtype=torch.bool)
    sides = []
    for matrix in (s, s.T):
        margins = (scale * (matrix - s.diagonal()[:, None])).masked_fill(eye, -torch.inf)
        sides.append(torch.logsumexp(margins, 1) - math.log(len(image) - 1))
    return sides[0], sides[1]


def assert_same_gradients(ours: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(ours, reference):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tile_size", [4, 21, 1024])
def test_openclip_equals_open_clips_own_loss(tile_size: int) -> None:
    open_clip = pytest.importorskip("open_clip", reason="a core dependency; absent only in a broken install")
    peer = open_clip.loss.ClipLoss()
    loss = create_loss("openclip", embed_dim=D, tile_size=tile_size)
    for image, text, _ in batches(2):
        ours, theirs = leaves(image, text, 2.5), leaves(image, text, 2.5)
        value = loss(normalize(ours[0], dim=1), normalize(ours[1], dim=1), ours[2].exp())
        expected = peer(normalize(theirs[0], dim=1), normalize(theirs[1], dim=1), theirs[2].exp())
        torch.testing.assert_close(value, expected.reshape(()), rtol=1e-12, atol=1e-12)
        (3 * value).backward()
        (3 * expected).backward()
        assert_same_gradients(ours, theirs)


def test_the_later_rule_for_gamma_min() -> None:
    """min(1, 4.177 epochs^-0.7265): 0.415 for 24 epochs (published for DFN-14M), 1 for 7 (DFN-192M)."""
    assert later_gamma_min(24) == pytest.approx(0.415, abs=5e-4)
    assert later_gamma_min(7) == 1.0


@pytest.mark.parametrize("tile_size", [4, 1024])
def test_fastclip_v3_over_several_epochs_of_state(tile_size: int) -> None:
    loss = create_loss(
        "fastclip-v3", embed_dim=D, dataset_size=N, eps=EPS, rho=RHO, gamma_min=0.3, gamma_decay_epochs=3,
        tile_size=tile_size,
    )  # fmt: skip
    u = torch.full((N, 2), torch.nan, dtype=torch.float64)
    gammas = []
    for step, (image, text, index) in enumerate(batches(14)):
        epoch = step * B // N
        gamma = 1.0 if epoch == 0 else 0.3
        if 0 < epoch < 3:
            gamma = 0.5 * (1 + math.cos(math.pi * epoch / 3)) * 0.7 + 0.3
        gammas.append(gamma)

        ours, theirs = leaves(image, text, 2.7), leaves(image, text, 2.7)
        value = loss(normalize(ours[0], dim=1), normalize(ours[1], dim=1), ours[2].exp(), sample_index=index)
        value.backward()

        scale = theirs[2].exp()
        tau = 1 / scale
        g = torch.stack(dense_log_g(normalize(theirs[0], dim=1), normalize(theirs[1], dim=1), scale), 1).exp()
        seen = ~u[index].isnan()
        u[index] = torch.where(seen, (1 - gamma) * u[index] + gamma * g.detach(), g.detach())
        # value: tau mean log(eps + u) + 2 rho tau; gradient: u stands for g in the outer derivative only.
        log_u = (EPS + u[index]).log()
        surrogate = tau * ((g / (EPS + u[index])).sum(1).mean() - (g / (EPS + u[index])).detach().sum(1).mean())
        expected = tau * (log_u.sum(1).mean() + 2 * RHO) + surrogate
        expected.backward()
        torch.testing.assert_close(value, expected.reshape(()), rtol=1e-10, atol=1e-12)
        assert_same_gradients(ours, theirs)
        torch.testing.assert_close(torch.stack(loss.log_normalizers(), 1), log_u, rtol=1e-10, atol=1e-12)
    assert len(set(gammas)) == 4, "the steps must pass through the schedule"


EPOCHS = 5
TAU0 = 2**-5  # the same number in fp32, in which the table is made


def dense_reference(name: str, loss: torch.nn.Module) -> Any:
    """The paper's formula with its own state; see `dense`."""
    table = dense.Table(N, 0.3, 3, constant=name in ("sogclr", "isogclr"))
    if name == "siglip":
        return dense.SigLIP()
    if name in ("isogclr", "fastclip-v2"):
        return dense.RGCL(N, table, eps=EPS, rho=RHO, lr=0.0133, tau0=TAU0)
    if name == "amorlip":
        networks = loss.objective.networks._new_networks(0)
        return dense.AmorLIP(networks, N, EPOCHS, beta_max=0.8, decay=3)
    if name == "neuclip-queue":
        return dense.NeuCLIPQueue(50, eps=EPS, rho=RHO, weight=0.25, horizons=[10, 20, 40, math.inf])
    if name == "exact":
        return dense.Exact(*encode_dataset()[:2], eps=EPS, rho=RHO)
    return dense.FastCLIP(name, None if name == "rgcl-g" else table, eps=EPS, rho=RHO)


@pytest.mark.parametrize("tile_size", [4, 1024])
@pytest.mark.parametrize(
    "name",
    [
        "siglip", "sogclr", "isogclr", "fastclip-v0", "fastclip-v1", "fastclip-v2", "fastclip-v3", "rgcl-g", "amorlip",
        "neuclip-queue", "exact",
    ],
)  # fmt: skip
def test_every_method_over_several_epochs_of_state(name: str, tile_size: int) -> None:
    own: dict[str, Any] = {"blend_epochs": 3} if name == "amorlip" else {"rho": RHO, "eps": EPS}
    if name == "neuclip-queue":
        own |= {"size": 50, "batch_weight": 0.25, "global_batch_size": 10}
    if name in ("isogclr", "fastclip-v2"):
        own["temperature_init"] = TAU0
    loss = create_loss(
        name, embed_dim=D, dataset_size=N, num_epochs=EPOCHS, gamma_min=0.3, gamma_decay_epochs=3,
        tile_size=tile_size, encode_dataset=encode_dataset, **own,
    )  # fmt: skip
    reference = dense_reference(name, loss)
    for step, (image, text, index) in enumerate(batches(14)):
        ours, theirs = leaves(image, text, 2.7), leaves(image, text, 2.7)
        biases = [torch.tensor([-6.0], dtype=torch.float64, requires_grad=True) for _ in range(2)]
        features = normalize(ours[0], dim=1), normalize(ours[1], dim=1)
        value = loss(*features, ours[2].exp(), biases[0], index)
        value.backward()
        epoch = step * B // N
        if name == "amorlip" and epoch > (step - 1) * B // N:
            reference.restart(loss.objective.networks._new_networks(epoch))
        expected = reference.step(normalize(theirs[0], dim=1), normalize(theirs[1], dim=1), theirs[2], biases[1], index)
        expected.backward()
        # AmorLIP's networks sum over a batch in another order and Adam divides by small numbers.
        rtol = 1e-7 if name == "amorlip" else 1e-9
        torch.testing.assert_close(value, expected.reshape(()), rtol=rtol, atol=1e-11)
        for mine, dense_leaf in zip(ours, theirs):
            torch.testing.assert_close(mine.grad, dense_leaf.grad, rtol=rtol, atol=1e-10)
        if name == "siglip":
            torch.testing.assert_close(biases[0].grad, biases[1].grad, rtol=1e-10, atol=1e-12)
    if hasattr(reference, "table") and reference.table is not None:
        torch.testing.assert_close(loss.objective.table.rows.exp(), reference.table.u.nan_to_num(0.0))
        assert len(reference.table.gammas) == (1 if name in ("sogclr", "isogclr") else 4)
    if isinstance(reference, dense.NeuCLIPQueue):
        shares = torch.tensor(reference.shares, dtype=torch.float64)
        torch.testing.assert_close(loss.objective.horizon.weights, shares, rtol=1e-9, atol=0)
        first = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
        assert (shares / first).log().abs().amax(1).min() > 0.05, "each side's weights must have moved"
        assert (shares[0] / shares[1]).log().abs().max() > 0.01, "each side in its own way"
    if isinstance(reference, dense.RGCL):
        torch.testing.assert_close(loss.objective.temperatures.rows[:, :2], reference.tau, rtol=1e-8, atol=1e-10)
        assert reference.tau.std() > 1e-3, "the temperatures must have moved apart"


def test_the_queues_size_is_that_of_16_steps_within_bounds() -> None:
    def size(**options: Any) -> int:
        return int(create_loss("neuclip-queue", embed_dim=D, **options).objective.queue.size)

    assert size(global_batch_size=1024) == 16384
    assert size(global_batch_size=256) == size() == 8192
    assert size(global_batch_size=64) == 8192
    assert size(global_batch_size=32) == 4096, "no pair is older than 128 steps"
    assert size(global_batch_size=256, dataset_size=100) == 100
    assert size(global_batch_size=256, size=7) == 7
    anew = {batch: default_size(batch, None, project_anew=True) for batch in (1024, 64, 32, 16)}
    assert anew == {1024: 16384, 64: 8192, 32: 8192, 16: 4096}, "no pair mapped anew is older than 256 steps"


def test_siglip_equals_open_clips_own_loss() -> None:
    from open_clip.loss import SigLipLoss

    peer, loss = SigLipLoss(), create_loss("siglip", embed_dim=D, tile_size=4)
    image, text, _ = batches(1)[0]
    ours, theirs = leaves(image, text, 2.3), leaves(image, text, 2.3)
    bias = [torch.tensor([-10.0], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    value = loss(normalize(ours[0], dim=1), normalize(ours[1], dim=1), ours[2].exp(), bias[0])
    expected = peer(normalize(theirs[0], dim=1), normalize(theirs[1], dim=1), theirs[2].exp(), bias[1])
    torch.testing.assert_close(value, expected.reshape(()), rtol=1e-12, atol=1e-12)
    value.backward()
    expected.backward()
    assert_same_gradients((*ours, bias[0]), (*theirs, bias[1]))


def dense_prediction(weight: Tensor, anchors: Tensor, positives: Tensor, scale: Tensor, own: Tensor) -> Tensor:
    """a_i of one side, by the definition: log of eps plus the mean over the prototypes that are not i's own."""
    terms = (scale * (anchors @ normalize(weight, dim=1).T - positives[:, None])).exp().masked_fill(own, 0.0)
    return (EPS + terms.sum(1) / (~own).sum(1)).log()


@pytest.mark.parametrize("tile_size", [4, 1024])
@pytest.mark.parametrize("m", [8, 34])
@pytest.mark.parametrize("reset", [False, True])
def test_neuclip_with_restarts_and_updates(tile_size: int, m: int, reset: bool) -> None:
    T_u, T_r, lr = 3, 4, 0.02
    loss = create_loss(
        "neuclip", embed_dim=D, eps=EPS, rho=RHO, num_prototypes=m, updates_per_step=T_u, restart_every=T_r,
        learning_rate=lr, tile_size=tile_size, reset_accumulator=reset,
    )  # fmt: skip
    weights: list[Tensor] = []
    past_features, past_index = (torch.empty(0, D), torch.empty(0, D)), torch.empty(0, dtype=torch.int64)
    for step, (image, text, index) in enumerate(batches(10)):
        ours, theirs = leaves(image, text, 2.7), leaves(image, text, 2.7)
        value = loss(normalize(ours[0], dim=1), normalize(ours[1], dim=1), ours[2].exp(), sample_index=index)
        value.backward()

        features = normalize(theirs[0], dim=1), normalize(theirs[1], dim=1)
        scale = theirs[2].exp()
        tau, positives = 1 / scale, (features[0] * features[1]).sum(1)
        log_g = dense_log_g(*features, scale)
        if step == 0:  # no past yet: this batch, repeated in an order that is the objective's business
            prototype_index = loss.objective.image_npn.prototype_index.clone()
            assert set(prototype_index.tolist()) <= set(index.tolist())
            rows = [int((index == sample).nonzero()) for sample in prototype_index]
            sources = [feature.detach()[rows] for feature in features]
        elif step % T_r == 0:  # the last m pairs of past batches
            slots = [max(range(slot, len(past_index), m)) for slot in range(m)]  # a ring: pair p stands at p mod m
            prototype_index, sources = past_index[slots], [feature[slots] for feature in past_features]
        if step % T_r == 0:
            weights = [sources[1].clone().requires_grad_(), sources[0].clone().requires_grad_()]
            if reset or step == 0:
                squares = [torch.zeros(m, D, dtype=torch.float64) for _ in range(2)]
        own = index[:, None] == prototype_index
        rows = []
        for side in range(2):
            anchors, target = features[side].detach(), (EPS + log_g[side].detach().exp())
            for _ in range(T_u):
                a = dense_prediction(weights[side], anchors, positives.detach(), scale.detach(), own)
                (gradient,) = torch.autograd.grad(((-a).exp() * target + a - 1).mean(), weights[side])
                squares[side] += gradient**2
                weights[side].data -= lr * gradient / (squares[side].sqrt() + 1e-10)
            rows.append(dense_prediction(weights[side], anchors, positives.detach(), scale.detach(), own).detach())
        expected = 2 * RHO * tau
        for side in range(2):
            a = rows[side]
            expected = expected + tau * ((-a).exp() * (EPS + log_g[side].exp()) + a - 1).mean()
        expected.backward()
        torch.testing.assert_close(torch.stack(loss.log_normalizers()), torch.stack(rows), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(value, expected.reshape(()), rtol=1e-7, atol=1e-9)
        for mine, exact in zip(ours, theirs):
            torch.testing.assert_close(mine.grad, exact.grad, rtol=1e-6, atol=1e-9)
        past_features = tuple(torch.cat([old, new.detach()[-m:]]) for old, new in zip(past_features, features))
        past_index = torch.cat([past_index, index[-m:]])


def test_losses_return_a_dict_when_asked_and_refuse_misuse() -> None:
    image, text, _ = batches(1)[0]
    image, text = normalize(image, dim=1), normalize(text, dim=1)
    scale = torch.tensor(10.0)
    assert set(create_loss("openclip", embed_dim=D)(image, text, scale, output_dict=True)) == {"contrastive_loss"}
    with pytest.raises(ValueError, match="sample_index"):
        create_loss("fastclip-v3", embed_dim=D, dataset_size=N)(image, text, scale)
    with pytest.raises(ValueError, match="dataset_size"):
        create_loss("fastclip-v3", embed_dim=D)
    with pytest.raises(ValueError, match="tile_sise"):
        create_loss("openclip", embed_dim=D, tile_sise=4)
    with pytest.raises(ValueError, match="at least 2"):
        create_loss("openclip", embed_dim=D)(image[:1], text[:1], scale)
    assert create_loss("neuclip", embed_dim=D)(image, text, scale).isfinite(), "an index is optional for neuclip"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluation_mode_leaves_the_state_alone(name: str) -> None:
    loss = create_loss(name, embed_dim=D, dataset_size=N, num_prototypes=16, encode_dataset=encode_dataset)
    steps = [(normalize(i.float(), dim=1), normalize(t.float(), dim=1), index) for i, t, index in batches(3)]
    scale = torch.tensor([12.0])
    loss(*steps[0][:2], scale, sample_index=steps[0][2])
    loss.eval()
    before = [buffer.clone() for buffer in loss.buffers()]
    loss(*steps[1][:2], scale, sample_index=steps[1][2])
    assert all(torch.equal(a, b) for a, b in zip(before, loss.buffers()))
    assert loss.objective.num_steps == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_state_dict_restores_the_trajectory(name: str) -> None:
    options = {
        "dataset_size": N,
        "encode_dataset": encode_dataset,
        "num_prototypes": 16,
        "restart_every": 3,
        "gamma_decay_epochs": 3,
    }
    steps = [(normalize(i.float(), dim=1), normalize(t.float(), dim=1), index) for i, t, index in batches(8)]
    scale = torch.tensor([12.0])
    loss = create_loss(name, embed_dim=D, **options)
    for image, text, index in steps[:4]:
        loss(image, text, scale, sample_index=index)
    copy = create_loss(name, embed_dim=D, **options)
    copy.load_state_dict(loss.state_dict())
    copy.objective.load_rank_states([loss.objective.rank_state()])
    for image, text, index in steps[4:]:
        expected = loss(image, text, scale, sample_index=index)
        assert torch.equal(copy(image, text, scale, sample_index=index), expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_trainers_autocast_does_not_reach_the_loss(name: str) -> None:
    image, text, index = batches(1, torch.float32)[0]
    features, scale = (normalize(image, dim=1), normalize(text, dim=1)), torch.tensor([12.0])
    values = []
    for enabled in (False, True):
        torch.manual_seed(0)
        loss = create_loss(name, embed_dim=D, dataset_size=N, num_prototypes=16, encode_dataset=encode_dataset)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values.append(loss(*features, scale, sample_index=index))
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("num_epochs", "expected"),
    [
        (7, [3, 3, 2, 2, 1, 1, 1]),  # equal whole epochs, the rest for the last
        (1, [3, 3, 3, 2, 2, 1, 1]),  # parts of an epoch where there are no three
        (None, [3] * 7),
    ],
)
def test_amorlips_rho_has_its_parts_in_runs_of_any_length(num_epochs: float | None, expected: list[float]) -> None:
    options = {} if num_epochs is None else {"num_epochs": num_epochs}
    objective = create_loss("amorlip", embed_dim=D, dataset_size=700, rho=[3, 2, 1], **options).objective
    found = []
    for seventh in range(7):
        objective.samples_seen = round(seventh / 7 * 700 * (num_epochs or 7))
        found.append(objective._rho())
    assert found == expected
