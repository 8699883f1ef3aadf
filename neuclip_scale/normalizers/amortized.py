"""AmorLIP's networks that predict log-normalizers from embeddings (arXiv 2505.18983)."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuclip_scale import distributed
from neuclip_scale.config import AmortizedConfig
from neuclip_scale.sections import section


class AmortizedNetwork(nn.Module):
    """d -> h, ReLU, LayerNorm -> d, ReLU, LayerNorm -> plus the input, ReLU -> 1: log lambda of an embedding."""

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.widen, self.widen_norm = nn.Linear(embed_dim, hidden), nn.LayerNorm(hidden)
        self.narrow, self.narrow_norm = nn.Linear(hidden, embed_dim), nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[b, d] -> [b]."""
        hidden = self.narrow_norm(F.relu(self.narrow(self.widen_norm(F.relu(self.widen(features))))))
        return self.head(F.relu(hidden + features)).squeeze(-1)


class AmortizedNormalizers(nn.Module):
    """Both sides' networks: trained on every batch, averaged, and frozen copies of the last epoch's average predict.

    A new epoch copies the average into `previous` and starts network, average and Adam afresh, as the authors'
    published command does. Replicated: every rank makes the same updates from gradients averaged over the ranks.
    """

    def __init__(self, embed_dim: int, section: AmortizedConfig, seed: int) -> None:
        super().__init__()
        self.embed_dim, self.section, self.seed = embed_dim, section, seed
        self.epoch = -1
        # Their gradients are made here: a trainer that collects a loss's parameters must not find them.
        self.networks = self._new_networks(0).requires_grad_(False)
        self.average, self.previous = copy.deepcopy(self.networks), copy.deepcopy(self.networks)
        self.adam = self._new_adam()

    def begin(self, epoch: int) -> None:
        """Enter `epoch` (0-based), if it is new."""
        if epoch == self.epoch:
            return
        if self.epoch >= 0:
            self.previous.load_state_dict(self.average.state_dict())
        self.epoch = epoch
        fresh = self._new_networks(epoch).state_dict()
        self.networks.load_state_dict(fresh)
        self.average.load_state_dict(fresh)
        self.adam = self._new_adam()

    @section("normalizers/network")
    def blend(self, image: Tensor, text: Tensor, log_sums: Tensor) -> Tensor:
        """log(beta lambda_previous + (1 - beta) sum) for features [b, d] and log sums [b, 2] -> [b, 2]."""
        beta = self.weight()
        if beta == 0.0:
            return log_sums
        predicted = torch.stack([net(side) for net, side in zip(self.previous, (image, text), strict=True)], 1)
        if beta == 1.0:
            return predicted
        return torch.logaddexp(predicted + math.log(beta), log_sums + math.log1p(-beta))

    def weight(self) -> float:
        """beta of this epoch: from 0 along a cosine to `blend_max` at `blend_epochs`."""
        progress = min(1.0, max(self.epoch, 0) / self.section.blend_epochs) if self.section.blend_epochs else 1.0
        return self.section.blend_max * 0.5 * (1 - math.cos(math.pi * progress))

    def flops(self, num_anchors: int) -> int:
        """FLOPs of one step's updates of both networks, and of the prediction in epochs that blend it in."""
        network = self.networks[0]
        assert isinstance(network, AmortizedNetwork)
        layers = [layer.weight.numel() for layer in (network.widen, network.narrow, network.head)]
        # The backward pass multiplies twice per layer, but the first one's input needs no gradient.
        update = 3 * sum(layers) - layers[0]
        predict = sum(layers) if self.weight() > 0 else 0
        return 2 * 2 * num_anchors * (self.section.updates_per_step * update + predict)

    @section("normalizers/network")
    def fit(self, image: Tensor, text: Tensor, target: Tensor) -> Tensor:
        """Adam steps on the mean squared error to `target` [b, 2] over all ranks (collective); the first error, []."""
        parameters = list(self.networks.parameters())
        first = target.new_zeros(())
        for update in range(self.section.updates_per_step):
            with torch.enable_grad():
                for parameter in parameters:
                    parameter.requires_grad_(True)
                outputs = [net(side) for net, side in zip(self.networks, (image, text), strict=True)]
                # The mean over both sides' errors, doubled: the sum of the two sides' mean squared errors.
                error = 2 * F.mse_loss(torch.stack(outputs, 1), target)
                gradients = torch.autograd.grad(error, parameters)
            flat = torch.cat([gradient.flatten() for gradient in gradients]) / distributed.world_size()
            distributed.all_reduce_sum(flat)
            sizes = [parameter.numel() for parameter in parameters]
            for parameter, part in zip(parameters, flat.split(sizes), strict=True):
                parameter.requires_grad_(False)
                parameter.grad = part.view_as(parameter)
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)
            if update == 0:
                first = error.detach()
        return first

    def update_average(self) -> None:
        """Move the running average towards the networks."""
        for kept, new in zip(self.average.parameters(), self.networks.parameters(), strict=True):
            kept.lerp_(new, 1 - self.section.ema)

    def get_extra_state(self) -> dict[str, Any]:
        """Epoch and Adam's moments."""
        return {"epoch": self.epoch, "adam": self.adam.state_dict()["state"]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `get_extra_state`."""
        self.epoch = state["epoch"]
        self.adam = self._new_adam()
        self.adam.load_state_dict({**self.adam.state_dict(), "state": state["adam"]})

    def _new_networks(self, epoch: int) -> nn.ModuleList:
        hidden = max(1, round(self.embed_dim * self.section.hidden_factor))
        with torch.random.fork_rng(devices=[]):  # the same on every rank and after resuming
            torch.manual_seed(self.seed * 1_000_003 + epoch)
            return nn.ModuleList([AmortizedNetwork(self.embed_dim, hidden) for _ in range(2)])

    def _new_adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.networks.parameters(), lr=self.section.learning_rate)
