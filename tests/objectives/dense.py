"""Dense float64 formulas of every objective, written from the papers and nothing else: what the tiled code is held to.

Each is a class with the state its paper keeps; `step(image, text, log_scale, bias, index)` takes unit rows and leaves
with a graph and returns the loss whose autograd gradient is the paper's update.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss


def margins(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """s_ij - s_ii with images as anchors and with texts as anchors, both [B, B]."""
    s = image @ text.T
    return s - s.diagonal()[:, None], s.T - s.diagonal()[:, None]


def others(matrix: Tensor) -> Tensor:
    """Entries off the diagonal, row by row: [B, B - 1]."""
    B = len(matrix)
    return matrix[~torch.eye(B, dtype=torch.bool)].view(B, B - 1)


class SigLIP:
    def step(self, image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        sign = 2 * torch.eye(len(image), dtype=image.dtype) - 1
        return -logsigmoid(sign * (log_scale.exp() * image @ text.T + bias)).sum() / len(image)


class Table:
    """u of FastCLIP's equation 2, for both sides of n samples."""

    def __init__(self, n: int, gamma_min: float, decay: int, *, constant: bool = False) -> None:
        self.u = torch.full((n, 2), torch.nan, dtype=torch.float64)
        self.n, self.gamma_min, self.decay, self.constant = n, gamma_min, decay, constant
        self.seen = 0
        self.gammas: set[float] = set()

    def update(self, index: Tensor, g: Tensor) -> Tensor:
        epoch = self.seen // self.n
        if self.constant or epoch >= self.decay:
            gamma = self.gamma_min
        else:
            gamma = 0.5 * (1 + math.cos(math.pi * epoch / self.decay)) * (1 - self.gamma_min) + self.gamma_min
        self.gammas.add(gamma)
        self.seen += len(index)
        old = self.u[index]
        self.u[index] = torch.where(old.isnan(), g.detach(), (1 - gamma) * old + gamma * g.detach())
        return self.u[index]


class FastCLIP:
    """v0, v1, v3, SogCLR and RGCL-g. Autograd sees sum g/(eps + u), whose derivative is the paper's estimator."""

    def __init__(self, name: str, table: Table | None, *, eps: float, rho: float) -> None:
        self.name, self.table, self.eps, self.rho = name, table, eps, rho

    def step(self, image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        tau = 1 / log_scale.exp()
        if self.name in ("fastclip-v1", "sogclr"):
            tau = tau.detach() + 0 * tau  # a gradient of zero
        g = torch.stack([others((m / tau).exp()).mean(1) for m in margins(image, text)], 1)
        u = g.detach() if self.table is None else self.table.update(index, g)
        inner = (g / (self.eps + u)).sum(1).mean()
        value = (self.eps + u).log().sum(1).mean() + inner - inner.detach()
        if self.name == "fastclip-v0":
            return value
        rho = self.rho if self.name in ("fastclip-v3", "rgcl-g") else 0.0
        return tau * (value + 2 * rho)


class RGCL:
    """iSogCLR and FastCLIP v2: a tau and an Adam for each sample and side."""

    def __init__(self, n: int, table: Table, *, eps: float, rho: float, lr: float, tau0: float) -> None:
        self.table, self.eps, self.rho, self.lr = table, eps, rho, lr
        self.tau = torch.full((n, 2), tau0, dtype=torch.float64)
        self.first, self.second = torch.zeros_like(self.tau), torch.zeros_like(self.tau)
        self.visits = torch.zeros(n, 1, dtype=torch.float64)

    def step(self, image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        tau = self.tau[index].requires_grad_()
        sides = margins(image, text)
        g = torch.stack([others((m / tau[:, side, None]).exp()).mean(1) for side, m in enumerate(sides)], 1)
        u = self.table.update(index, g)
        inner = g / (self.eps + u)
        per_pair = tau * ((self.eps + u).log() + inner - inner.detach() + self.rho)
        # Each tau's own gradient, without 1/B.
        (gradient,) = torch.autograd.grad(per_pair.sum(), tau, retain_graph=True)
        self._adam(index, gradient.clamp(-5, 5))
        loss = per_pair.sum(1).mean()
        (unused,) = torch.autograd.grad(loss, log_scale, retain_graph=True, allow_unused=True)
        assert unused is None
        return loss + 0 * log_scale.sum()

    def _adam(self, index: Tensor, gradient: Tensor) -> None:
        self.visits[index] += 1
        count = self.visits[index]
        self.first[index] = 0.9 * self.first[index] + 0.1 * gradient
        self.second[index] = 0.999 * self.second[index] + 0.001 * gradient**2
        first, second = self.first[index] / (1 - 0.9**count), self.second[index] / (1 - 0.999**count)
        self.tau[index] = (self.tau[index] - self.lr * first / (second.sqrt() + 1e-8)).clamp(0.01, 1.0)


class AmorLIP:
    """The linear surrogate; its networks are the tested ones' own modules, their training is written out here."""

    def __init__(self, networks: torch.nn.ModuleList, n: int, epochs: int, *, beta_max: float, decay: int) -> None:
        import copy

        self.make = lambda: copy.deepcopy(networks).double().requires_grad_(True)
        self.net, self.average, self.previous = self.make(), self.make(), self.make()
        self.adam = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        self.n, self.epochs, self.beta_max, self.decay = n, epochs, beta_max, decay
        self.seen = self.steps = 0

    def restart(self, fresh: torch.nn.ModuleList) -> None:
        self.previous.load_state_dict(self.average.state_dict())
        self.net.load_state_dict(fresh.state_dict())
        self.average.load_state_dict(fresh.state_dict())
        self.adam = torch.optim.Adam(self.net.parameters(), lr=1e-3)

    def step(self, image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        epoch, B = self.seen // self.n, len(image)
        beta = self.beta_max * (1 - 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / self.decay))))
        scale = log_scale.exp()
        s = scale * image @ text.T
        total = torch.stack([others(s.exp()).sum(1), others(s.T.exp()).sum(1)], 1)
        features = image.detach(), text.detach()
        with torch.no_grad():
            predicted = torch.stack([net(x) for net, x in zip(self.previous, features)], 1).exp()
        target = (beta * predicted + (1 - beta) * total.detach()).log()
        for _ in range(3):
            self.adam.zero_grad()
            sum(mse_loss(net(x), t) for net, x, t in zip(self.net, features, target.unbind(1))).backward()
            self.adam.step()
        if self.steps % 2 == 0:
            with torch.no_grad():
                for kept, new in zip(self.average.parameters(), self.net.parameters()):
                    kept.copy_(0.92 * kept + 0.08 * new)
        self.seen, self.steps = self.seen + B, self.steps + 1
        own = s.diagonal()
        surrogate = ((total + 1e-3 * own.exp()[:, None]) / target.exp()).sum(1).mean() - 2 * own.mean()
        part = self.epochs // 3
        rho = (8.5, -8.5, -8.5)[min(epoch // part, 2)]
        return surrogate / scale.detach() + rho / scale


class NeuCLIPQueue:
    """Past embeddings in a list, cut to the last M; horizons gain weight by how their own past explains new batches."""

    def __init__(self, size: int, *, eps: float, rho: float, weight: float, horizons: list[float]) -> None:
        self.size, self.eps, self.rho, self.weight = size, eps, rho, weight
        self.horizons = horizons
        first = [0.5 ** (place + 1) for place in range(len(horizons) - 1)]
        self.shares = [[*first, 1 - sum(first)] for _ in range(2)]
        self.past: list[tuple[Tensor, Tensor, int]] = []

    def step(self, image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        tau = 1 / log_scale.exp()
        g = [others((m / tau).exp()).mean(1) for m in margins(image, text)]
        loss = 2 * self.rho * tau
        B = len(image)
        for side, (anchors, batch_g) in enumerate(((image, g[0]), (text, g[1]))):
            a = torch.empty(B, dtype=torch.float64)
            shares, gradient = self.shares[side], [0.0] * len(self.horizons)
            for i, anchor in enumerate(anchors.detach()):
                own, g_i = (image[i] * text[i]).sum().detach(), float(batch_g[i].detach())
                joined, alone = [], []
                for horizon in self.horizons:
                    total = weights = 0.0
                    for younger, entry in enumerate(reversed(self.past)):
                        if entry[2] != int(index[i]):
                            w = math.exp(-younger / horizon)
                            total += w * float(((anchor @ entry[1 - side] - own) / tau.detach()).exp())
                            weights += w
                    joined.append((total + (B - 1) * g_i) / (weights + B - 1))
                    alone.append(self.eps + total / weights if weights else math.nan)
                mean = sum(share * value for share, value in zip(shares, joined))
                a[i] = math.log(self.eps + (1 - self.weight) * mean + self.weight * g_i)
                if self.past:
                    mean = sum(share * value for share, value in zip(shares, alone))
                    ratio = min((self.eps + g_i) / mean, 20.0)
                    for h, value in enumerate(alone):
                        gradient[h] += value / mean * (1 - ratio) / B
            loss = loss + tau * ((-a).exp() * (self.eps + batch_g) + a - 1).mean()
            moved = [share * math.exp(-0.5 * slope) for share, slope in zip(shares, gradient)]
            floored = [max(share / sum(moved), 1e-3) for share in moved]
            self.shares[side] = [share / sum(floored) for share in floored]
        self.past += [(i, t, int(n)) for i, t, n in zip(image.detach(), text.detach(), index)]
        self.past = self.past[-self.size :]
        return loss


class Exact:
    """NeuCLIP's loss with a over all n pairs of a data set whose features are given."""

    def __init__(self, image: Tensor, text: Tensor, *, eps: float, rho: float) -> None:
        self.image, self.text, self.eps, self.rho = image, text, eps, rho

    def step(self, image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        tau = 1 / log_scale.exp()
        g = [others((m / tau).exp()).mean(1) for m in margins(image, text)]
        loss = 2 * self.rho * tau
        own = (image * text).sum(1, keepdim=True)
        mine = index[:, None] == torch.arange(len(self.image))
        for anchors, negatives, batch_g in ((image, self.text, g[0]), (text, self.image, g[1])):
            terms = ((anchors @ negatives.T - own) / tau).exp().masked_fill(mine, 0.0)
            a = (self.eps + terms.sum(1) / (~mine).sum(1)).log().detach()
            loss = loss + tau * ((-a).exp() * (self.eps + batch_g) + a - 1).mean()
        return loss
