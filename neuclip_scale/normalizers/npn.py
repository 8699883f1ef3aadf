"""The normalizer-prediction network of NeuCLIP (arXiv 2511.08417), with its gradient in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuclip_scale import distributed
from neuclip_scale.normalizers.replaying import Replays
from neuclip_scale.similarity.choosing import Kernels, choose, choose_alike

ADAGRAD_EPS = 1e-10
KERNELS = Kernels("NPN with {} prototypes", "neuclip_scale.normalizers.triton_npn_check")


class NormalizerPredictionNetwork(nn.Module):
    """Predicts the log-normalizer of one side's anchors from m prototypes of the other side.

        a_i = log( eps + 1/m sum_k exp((cos(x_i, W_k) - s_ii) / tau) )

    One linear layer with row-normalised weights and log-sum-exp pooling. Always fp32 (or fp64), replicated on every
    rank, updated by AdaGrad on mean_i exp(-a_i)(eps + g_i) + a_i - 1, whose minimiser is log(eps + g_i).

    `prototype_index` remembers which sample a prototype was copied from: an anchor leaves out the prototype made from
    its own pair, which would otherwise add exp(0)/m and put a floor of log(1/m) under a_i (docs/method.md).
    """

    weight: Tensor
    squares: Tensor
    prototype_index: Tensor

    def __init__(self, embed_dim: int, num_prototypes: int = 4096, eps: float = 1e-6) -> None:
        """Prototypes are random directions until the first `restart`; `embed_dim` d, `num_prototypes` m."""
        super().__init__()
        self.eps = eps
        self.log_eps = math.log(eps) if eps > 0 else -math.inf
        self.register_buffer("weight", F.normalize(torch.randn(num_prototypes, embed_dim), dim=1))  # [m, d]
        self.register_buffer("squares", torch.zeros(num_prototypes, embed_dim))
        self.register_buffer("prototype_index", torch.full((num_prototypes,), -1, dtype=torch.int64))
        self.replays = Replays()

    @property
    def num_prototypes(self) -> int:
        """m."""
        return self.weight.shape[0]

    @torch.no_grad()
    def forward(
        self,
        anchors: Tensor,
        positive_similarity: Tensor,
        temperature: Tensor | float,
        sample_index: Tensor | None = None,
        *,
        tile_size: int = 1024,
    ) -> Tensor:
        """Predict a for anchors [b, d] with s_ii [b] -> [b]; with `sample_index` [b] they skip their own prototypes."""
        if choose(KERNELS, self.weight).name == "triton":
            from neuclip_scale.normalizers import triton_npn

            return triton_npn.replayed_prediction(self, anchors, positive_similarity, temperature, sample_index)
        directions = F.normalize(self.weight, dim=1)
        out = torch.empty_like(positive_similarity)
        for tile in self.tiles(anchors, positive_similarity, temperature, sample_index, tile_size):
            tile.multiply(directions)
            out[tile.rows] = self._predict(tile.exponentiate() + tile.shift)
        return out

    def flops(self, num_anchors: int, num_updates: int) -> int:
        """FLOPs of `num_updates` updates (logits and gradient) and one prediction, 2 b m d for each product."""
        return (2 * num_updates + 1) * 2 * num_anchors * self.weight.numel()

    @torch.no_grad()
    def updates(
        self,
        anchors: Tensor,
        positive_similarity: Tensor,
        temperature: Tensor | float,
        log_g: Tensor,
        sample_index: Tensor | None = None,
        *,
        num_updates: int = 1,
        learning_rate: float = 0.01,
        tile_size: int = 1024,
    ) -> Iterator[None]:
        """Take `num_updates` AdaGrad steps towards the batch's normalizers (collective, once per update).

        It stops while each gradient travels, so that another network's can be computed: go through it to the end.

        anchors [b, d], positive_similarity [b] and log_g [b] are this rank's; the loss is the mean over all ranks'
        anchors. g does not depend on the prototypes, so the B x B similarities behind it are not computed again.
        """
        target = self._predict(log_g)  # log(eps + g)
        # Both reduce a gradient, Triton's before it is projected: a sum of the two would be neither.
        if choose_alike(KERNELS, self.weight).name == "triton":
            from neuclip_scale.normalizers import triton_npn

            batch = anchors, positive_similarity, temperature, sample_index, target
            yield from triton_npn.replayed_updates(
                self, *batch, num_updates=num_updates, learning_rate=learning_rate, eps=ADAGRAD_EPS
            )
            return
        # Neither the anchors nor the prototypes' origins change between updates.
        tiles = self.tiles(anchors, positive_similarity, temperature, sample_index, tile_size)
        for _ in range(num_updates):
            gradient = self.local_gradient(tiles, target, target.shape[0] * distributed.world_size())
            finish = distributed.start_all_reduce_sum(gradient)
            yield
            finish()
            self.descend(gradient, learning_rate)

    @torch.no_grad()
    def gradient(
        self,
        anchors: Tensor,
        positive_similarity: Tensor,
        temperature: Tensor | float,
        target: Tensor,
        sample_index: Tensor | None = None,
        tile_size: int = 1024,
    ) -> Tensor:
        """Gradient of the mean loss over all ranks' anchors with respect to the prototypes -> [m, d] (collective).

            r_i = 1 - exp(target_i - a_i),  q_ik = softmax-like weight of prototype k in exp(a_i)
            dL/dWhat_k = 1/(tau B) sum_i q_ik r_i x_i, projected on the tangent space of What_k, divided by |W_k|

        `target` [b] is log(eps + g).
        """
        tiles = self.tiles(anchors, positive_similarity, temperature, sample_index, tile_size)
        gradient = self.local_gradient(tiles, target, target.shape[0] * distributed.world_size())
        return distributed.all_reduce_sum(gradient)

    def local_gradient(self, tiles: list[Tile], target: Tensor, num_anchors: int) -> Tensor:
        """This rank's part of `gradient`, of a mean over `num_anchors`."""
        norms = self.weight.norm(dim=1, keepdim=True)
        directions = self.weight / norms
        total = torch.zeros_like(self.weight)
        for tile in tiles:
            tile.multiply(directions)
            log_mean = tile.exponentiate() + tile.shift
            predicted = self._predict(log_mean)
            # q_ik is an exponential of the tile times a factor of its row, which the [t, d] anchors take up.
            factor = (1 - (target[tile.rows] - predicted).exp()) * (tile.largest + tile.shift - predicted).exp()
            # With eps = 0 an anchor whose prototypes are all its own predicts -inf.
            factor.masked_fill_(log_mean == -torch.inf, 0.0)
            total.addmm_(tile.logits.T, factor[:, None] * tile.anchors)
        total /= num_anchors
        total -= directions * (total * directions).sum(1, keepdim=True)
        return total.div_(norms)

    def descend(self, gradient: Tensor, learning_rate: float) -> None:
        """One step of AdaGrad."""
        self.squares.addcmul_(gradient, gradient)
        self.weight.addcdiv_(gradient, self.squares.sqrt().add_(ADAGRAD_EPS), value=-learning_rate)

    @torch.no_grad()
    def restart(
        self, prototypes: Tensor, prototype_index: Tensor | None = None, *, reset_accumulator: bool = True
    ) -> None:
        """Replace the prototypes by embeddings [m, d] of samples `prototype_index` [m] (unknown: -1)."""
        if prototypes.shape != self.weight.shape:
            raise ValueError(
                f"prototypes: got shape {tuple(prototypes.shape)}, need {tuple(self.weight.shape)} "
                "(num_prototypes x embed_dim)."
            )
        self.weight.copy_(prototypes)
        if prototype_index is None:
            self.prototype_index.fill_(-1)
        else:
            self.prototype_index.copy_(prototype_index)
        if reset_accumulator:
            self.squares.zero_()

    def tiles(
        self,
        anchors: Tensor,
        positive_similarity: Tensor,
        temperature: Tensor | float,
        sample_index: Tensor | None,
        tile_size: int,
    ) -> list[Tile]:
        """The anchors in tiles of at most `tile_size` rows, one buffer of [tile_size, m] among them."""
        m, tiles = self.num_prototypes, []
        buffer = anchors.new_empty(min(tile_size, anchors.shape[0]), m)
        for first in range(0, anchors.shape[0], tile_size):
            rows = slice(first, min(first + tile_size, anchors.shape[0]))
            count = anchors.new_full((rows.stop - first,), m)
            own = None
            if sample_index is not None:
                own = sample_index[rows, None] == self.prototype_index
                count = (count - own.sum(1)).clamp_min_(1)
            shift = -positive_similarity[rows] / temperature - count.log()
            tiles.append(Tile(rows, anchors[rows] / temperature, shift, own, buffer[: rows.stop - first]))
        return tiles

    def _predict(self, log_mean: Tensor) -> Tensor:
        """log(eps + exp(log_mean))."""
        # new_tensor would copy from the host's memory, which waits for a GPU.
        return torch.logaddexp(log_mean, log_mean.new_full((), self.log_eps))


class Tile:
    """Some anchors of a step and what about them is the same in all its updates; t of them.

    Of [t, m] there is only the buffer, shared by all tiles of a step, and a mask of own prototypes, one byte each.
    """

    def __init__(self, rows: slice, anchors: Tensor, shift: Tensor, own: Tensor | None, buffer: Tensor) -> None:
        self.rows = rows
        self.anchors = anchors  # [t, d], x_i / tau
        self.shift = shift  # [t], -s_ii / tau - log |K_i|
        self.own = own  # [t, m] bool
        self.logits = buffer  # [t, m]
        self.largest = shift  # [t], of the row's logits

    def multiply(self, directions: Tensor) -> None:
        """Fill the buffer with cos(x_i, W_k)/tau, own prototypes at -inf."""
        torch.mm(self.anchors, directions.T, out=self.logits)
        if self.own is not None:
            self.logits.masked_fill_(self.own, -torch.inf)

    def exponentiate(self) -> Tensor:
        """Turn the buffer into exp(logit - largest of its row); returns the logits' log-sum-exps, [t]."""
        # An anchor whose prototypes are all its own has no finite logit, and -inf - -inf has no value.
        self.largest = self.logits.amax(1).clamp_min_(torch.finfo(self.logits.dtype).min)
        self.logits.sub_(self.largest[:, None]).exp_()
        return self.logits.sum(1).log_().add_(self.largest)
