"""The model: an image tower, a text tower and a learned temperature behind one forward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuclip_scale.config import ConfigError
from neuclip_scale.models.fused import fuse
from neuclip_scale.models.packing import Packing, pack
from neuclip_scale.models.presets import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from neuclip_scale.models.resnet import ModifiedResNet
from neuclip_scale.models.text import TextTransformer, TransformersTower, encode_tokens, reset_text_parameters
from neuclip_scale.models.transformer import LayerNorm, Transformer
from neuclip_scale.models.vision import TimmTower, VisionTransformer
from neuclip_scale.projection import Projection, TowerOutput

SCALARS = ("logit_scale", "logit_bias")
"""Parameters that are in neither tower."""
PROGRAMS = 64
"""That torch may compile of one piece of code. All blocks share theirs: both towers', with a graph and without, of all
tokens and of one are the eight that it would make, and micro-batches of another size (the last) take as many again.
What it does not make runs uncompiled, and where a checkpointed block is run again that is another graph: an error."""

Towers = Literal["both", "image", "text"]
"""What a forward pass runs."""

ImageTower = VisionTransformer | ModifiedResNet | TimmTower
TextTower = TextTransformer | TransformersTower


class CLIPOutput(NamedTuple):
    """What one forward gives; features are float32 rows of unit length."""

    image_features: Tensor | None
    """[N, embed_dim], or None when no images were given."""
    text_features: Tensor | None
    """[N, embed_dim], or None when no tokens were given."""
    logit_scale: Tensor
    """1/tau, float32, shape [1]."""
    logit_bias: Tensor | None
    """SigLIP's additive bias, float32, shape [1]; None in a model without one."""
    image_projection: Projection | None = None
    """What made the image features, after `show_projections`."""
    text_projection: Projection | None = None

    def both(self) -> tuple[Tensor, Tensor]:
        """Image and text features of a pass of both towers."""
        assert self.image_features is not None
        assert self.text_features is not None
        return self.image_features, self.text_features

    def with_maps_of(self, other: CLIPOutput) -> CLIPOutput:
        """The same with the last maps of another pass of the step, which are equal: one copy is enough."""
        image, text = (
            theirs._replace(inputs=own.inputs) if own and theirs else own
            for own, theirs in (
                (self.image_projection, other.image_projection),
                (self.text_projection, other.text_projection),
            )
        )
        return self._replace(image_projection=image, text_projection=text)

    def without_maps(self) -> CLIPOutput:
        """The same without what made the features."""
        return self._replace(image_projection=None, text_projection=None)


class CLIP(nn.Module):
    """Two towers and `logit_scale`, a parameter of shape [1] that holds log(1/tau).

    CLIP's own text transformer lies on the model itself (`token_embedding`, `transformer`, ...), any other
    text tower under `text`, both as in open_clip, so that its checkpoints' names are these.
    """

    image_size: int
    """Edge of the square input in pixels."""
    context_length: int
    """Tokens per caption that the text tower takes at most."""
    embed_dim: int
    image_mean: tuple[float, float, float]
    """Channel means that the pictures are normalised with, for values in [0, 1]."""
    image_std: tuple[float, float, float]

    def __init__(
        self,
        visual: ImageTower,
        text: TextTower,
        *,
        embed_dim: int,
        image_size: int,
        image_mean: tuple[float, float, float] = CLIP_IMAGE_MEAN,
        image_std: tuple[float, float, float] = CLIP_IMAGE_STD,
        temperature_init: float = 0.07,
        logit_bias_init: float | None = None,
    ) -> None:
        super().__init__()
        if not temperature_init > 0:
            raise ConfigError("objective.temperature_init", temperature_init, "must be above zero", "CLIP's is 0.07.")
        self.embed_dim, self.image_size, self.context_length = embed_dim, image_size, text.context_length
        self.image_mean, self.image_std = image_mean, image_std
        self.projected_widths = visual.projected_width, text.projected_width
        """Of what the last map of the image and of the text tower is given, one more where it has a bias."""
        self.at_rest: Literal["", "image", "text"] = ""
        """A tower that stays in evaluation mode."""
        self.packs_captions = not isinstance(text, TransformersTower)
        """Whether `pack` leaves out padding; only CLIP's own text tower can do without."""
        self._compiled = self._fused = self._graphs = False
        self.shows_projection = False  # of CLIP's own text tower, which lies on the model
        self.starting_values: dict[str, Tensor] = {}
        """Pretrained values, by name, that `building.filled_blocks` gives a planned model instead of initial ones."""
        self.visual = visual
        self.text: TransformersTower | None = None
        if isinstance(text, TransformersTower):
            self.text = text
        else:
            self.token_embedding: nn.Embedding = text.token_embedding
            self.positional_embedding: nn.Parameter = text.positional_embedding
            self.transformer: Transformer = text.transformer
            self.ln_final: LayerNorm = text.ln_final
            self.text_projection: nn.Parameter = text.text_projection
        # One element and not zero dimensions, which DeepSpeed and FSDP2 cannot shard.
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = None if logit_bias_init is None else nn.Parameter(torch.empty(1))
        self._scalars = -math.log(temperature_init), logit_bias_init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of what is not in a tower of its own."""
        if self.text is None:
            reset_text_parameters(self)
        log_scale, bias = self._scalars
        nn.init.constant_(self.logit_scale, log_scale)
        if self.logit_bias is not None and bias is not None:
            nn.init.constant_(self.logit_bias, bias)

    def forward(
        self, images: Tensor | None = None, tokens: Tensor | None = None, packing: Packing | None = None
    ) -> CLIPOutput:
        """Encode pictures [N, 3, H, W] (normalised), token ids [N, L], or both.

        With a `packing` of the tokens, from `pack`, CLIP's own text tower leaves out most of their padding.
        Give both in training: a tower left out of a backward pass has no gradient, which DDP and ZeRO do not
        forgive.
        """
        self._fuse(images if tokens is None else tokens)
        image: TowerOutput | None = None if images is None else self.visual(images)
        text: TowerOutput | None = None if tokens is None else self._encode_text(tokens, packing)
        return CLIPOutput(
            image_features=None if image is None else _unit_rows(image.features),
            text_features=None if text is None else _unit_rows(text.features),
            logit_scale=self.logit_scale.float().exp(),
            # A copy: the parameter's own memory is gone once FSDP2 has sharded it again.
            logit_bias=None if self.logit_bias is None else self.logit_bias.float().clone(),
            image_projection=None if image is None else image.projection,
            text_projection=None if text is None else text.projection,
        )

    def train(self, mode: bool = True) -> CLIP:
        """As `nn.Module.train`, but for the tower at rest."""
        super().train(mode)
        if mode and self.at_rest:
            tower = self.visual if self.at_rest == "image" else self.text or self.transformer
            tower.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only block inputs for the backward pass of both towers, or (False) everything."""
        self.visual.set_grad_checkpointing(enable)
        if self.text is not None:
            self.text.set_grad_checkpointing(enable)
        else:
            self.transformer.grad_checkpointing = enable

    def show_projections(self, shows: bool = True) -> None:
        """Let `forward` give the towers' last maps and what they are given, for normalizers that apply them again."""
        self.visual.shows_projection = shows
        (self.text or self).shows_projection = shows

    def blocks(self) -> Iterator[nn.Module]:
        """The towers' repeated parts, in the order they run: what sharding gathers and checkpointing recomputes.

        A tower without blocks of its own kind (timm, transformers) is one block.
        """
        for tower in (self.visual, self.text or self.transformer):
            transformer = tower if isinstance(tower, Transformer) else getattr(tower, "transformer", None)
            if isinstance(transformer, Transformer):
                yield from transformer.resblocks
            else:
                yield tower

    def compile_towers(self, *, by_block: bool = False, cuda_graphs: bool = False, **options: Any) -> None:
        """Compile each tower, or each of its blocks, at its next call, in place: names in the state dict stay as they
        are. A text tower of packed captions always goes by blocks.

        `cuda_graphs`: whole towers' kernels are recorded and replayed; `begin_step` before each step. `options` go to
        `torch.compile`.
        """
        self._compiled, self._graphs = True, cuda_graphs
        limits = torch._dynamo.config
        limits.recompile_limit = max(PROGRAMS, limits.recompile_limit)
        # The lengths of packed captions differ from step to step. One program for all of the tower's blocks, of sizes
        # that are not known and four rectangles in each, would take minutes to make.
        packed = set(self.transformer.resblocks) if self.packs_captions else set()
        for block in packed:
            block.compile(dynamic=True, **options)
        if by_block:
            for block in set(self.blocks()) - packed:
                # Shapes as they are: a checkpointed block that is run again must find the graph of its first run.
                block.compile(dynamic=False, **options)
            return
        if cuda_graphs:
            options["mode"] = "reduce-overhead"
        self.visual.compile(**options)
        if not packed:
            (self.text or self.transformer).compile(**options)

    def begin_step(self) -> None:
        """Before a step's first forward pass: what the step before left in CUDA graphs' memory may be overwritten.

        Without it torch sees an end where a micro-batch's backward pass is done, and overwrites what others kept.
        """
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def compiling_nothing_new(self) -> AbstractContextManager[None]:
        """Inside, compiled towers run the programs they have, and what fits none as it is: for evaluation.

        Its modes and sizes would take minutes to compile and use up `PROGRAMS`.
        """
        return torch.compiler.set_stance("eager_on_recompile") if self._compiled else nullcontext()

    def pack(self, lengths: Sequence[int], device: torch.device) -> Packing | None:
        """How captions of these lengths (`data.batch.caption_lengths`) are packed; None if they are not."""
        if not self.packs_captions or not lengths:
            return None
        return pack(lengths, self.context_length, device, alike=self._compiled)

    def _fuse(self, inputs: Tensor | None) -> None:
        """Before the first program is made: only here is it sure on which device."""
        if self._compiled and not self._fused and inputs is not None and inputs.is_cuda:
            fuse(self, inputs.device)
            self._fused = True

    def _encode_text(self, tokens: Tensor, packing: Packing | None) -> TowerOutput:
        return encode_tokens(self, tokens, packing) if self.text is None else self.text(tokens)


def joined_projections(outputs: Sequence[CLIPOutput]) -> tuple[Projection, Projection] | None:
    """Both towers', where they show them, of passes with one set of weights together."""
    image = [output.image_projection for output in outputs if output.image_projection]
    text = [output.text_projection for output in outputs if output.text_projection]
    if not (image and text):
        return None
    first, second = (each[0]._replace(inputs=torch.cat([part.inputs for part in each])) for each in (image, text))
    return first, second


def _unit_rows(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)
