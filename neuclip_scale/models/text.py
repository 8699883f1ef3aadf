"""Text towers: CLIP's transformer, and any encoder of the transformers library behind a linear projection.

Every tower maps token ids [N, L] to a `TowerOutput`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from neuclip_scale.config import ConfigError
from neuclip_scale.models.packing import Packing, join
from neuclip_scale.models.presets import TextTransformerConfig
from neuclip_scale.models.transformer import LayerNorm, Transformer
from neuclip_scale.projection import Projection, TowerOutput

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class TextTransformerParts(Protocol):
    """What holds CLIP's text tower: `TextTransformer`, or the whole model, where open_clip puts the parts."""

    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: Transformer
    ln_final: LayerNorm
    text_projection: nn.Parameter
    shows_projection: bool


class TextTransformer(nn.Module):
    """CLIP's causal text transformer with open_clip's parameter names.

    Initial values (Radford et al. 2021, section 2.5 and its released code): tokens normal 0.02, positions
    0.01, projection width ** -0.5, and the blocks' of `transformer.ResidualAttentionBlock`.
    """

    def __init__(
        self, config: TextTransformerConfig, embed_dim: int, *, quick_gelu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        width, layers = config.width, config.layers
        self.context_length, self.vocab_size = config.context_length, config.vocab_size
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(
            width, layers, config.heads, causal=True, quick_gelu=quick_gelu, dropout=dropout, scaled=True
        )
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self.projected_width, self.shows_projection = width, False
        reset_text_parameters(self)

    def forward(self, tokens: Tensor, packing: Packing | None = None) -> TowerOutput:
        return encode_tokens(self, tokens, packing)


def reset_text_parameters(parts: TextTransformerParts) -> None:
    """Initial values of what is not in the text tower's blocks."""
    nn.init.normal_(parts.token_embedding.weight, std=0.02)
    nn.init.normal_(parts.positional_embedding, std=0.01)
    nn.init.normal_(parts.text_projection, std=len(parts.text_projection) ** -0.5)


def encode_tokens(parts: TextTransformerParts, tokens: Tensor, packing: Packing | None = None) -> TowerOutput:
    """What CLIP's text tower makes of `tokens` [N, L], L at most the context length."""
    positions = parts.positional_embedding
    if packing is None:
        x = parts.token_embedding(tokens) + positions[: tokens.shape[1]]  # [N, L, width]
    else:
        embedded = packing.split(parts.token_embedding(packing.rows(tokens)))
        x = join([part + positions[: part.shape[1]] for part in embedded])  # [T, width]
        tokens = tokens[packing.order]
    # What autocast makes of pictures' tokens: half of the memory that blocks and norms pass over.
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # which has none on the meta device
        x = x.to(torch.get_autocast_dtype(x.device.type))
    # The end token has the largest id of the vocabulary, and under the causal mask only it has seen the whole
    # text.
    x = parts.ln_final(parts.transformer(x, tokens.argmax(dim=-1), packing))  # [N, width]
    if packing is not None:
        x = x[packing.inverse]
    matrix = parts.text_projection
    return TowerOutput(x @ matrix, Projection.of(x, matrix) if parts.shows_projection else None)


_POSITIONS_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "longformer",
    "mpnet",
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
)
"""Encoders whose first token stands at position pad_token_id + 1: so many positions are nobody's."""


class TransformersTower(nn.Module):
    """An encoder of the transformers library, pooled over the tokens that are not padding, then projected.

    `name` is a model on the hub or a local folder; a folder with `config.json` and no weights gives random
    ones. Parameter names are those of open_clip's HFTextEncoder with `hf_proj_type="linear"`
    (`transformer.*`, `proj.weight`). Code from the hub is never run. Every dropout rate of the encoder is set
    to `dropout`. The context is `context_length`, or the encoder's number of positions if that is smaller.
    """

    def __init__(
        self,
        name: str,
        embed_dim: int,
        context_length: int,
        *,
        pooling: Literal["mean", "cls"] = "mean",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        config = read_encoder_config(name)
        _set_dropout(config, name, dropout)
        self.name, self.pooling, self.pad_token_id = name, pooling, config.pad_token_id
        self.context_length = encoder_context_length(config, context_length)
        self.vocab_size = int(config.vocab_size)
        self.transformer: Any = _create_encoder(name, config)
        self.proj = nn.Linear(config.hidden_size, embed_dim, bias=False)
        self.projected_width, self.shows_projection = int(config.hidden_size), False

    def extra_repr(self) -> str:
        """See `Attention.extra_repr`."""
        return f"pooling={self.pooling}"

    def set_grad_checkpointing(self, enable: bool) -> None:
        # transformers 5 renamed gradient_checkpointing_{enable,disable}.
        new_name = hasattr(self.transformer, "activation_checkpointing_enable")
        prefix = "activation" if new_name else "gradient"
        if not enable:
            getattr(self.transformer, f"{prefix}_checkpointing_disable")()
            return
        try:
            getattr(self.transformer, f"{prefix}_checkpointing_enable")(
                {"use_reentrant": False, "preserve_rng_state": True}
            )
        except ValueError as error:
            raise ConfigError(
                "model.grad_checkpointing", enable, f"transformers does not support it for {self.name}",
                "Set it to false.",
            ) from error  # fmt: skip

    def forward(self, tokens: Tensor) -> TowerOutput:
        mask = tokens != self.pad_token_id  # [N, L]
        hidden = self.transformer(input_ids=tokens, attention_mask=mask.long()).last_hidden_state  # [N, L, width]
        if self.pooling == "cls":
            x = hidden[:, 0]
        else:
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            x = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        return TowerOutput(self.proj(x), Projection.of_linear(x, self.proj) if self.shows_projection else None)


def read_encoder_config(name: str) -> PretrainedConfig:
    """The transformers config of a model on the hub or in a local folder, else a `ConfigError`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "model.text_tower",
            name,
            f"transformers cannot read its config ({error})",
            "Give a model's name on the hub (with access to it), or a folder that has config.json.",
        ) from error
    if getattr(config, "pad_token_id", None) is None:
        raise ConfigError(
            "model.text_tower",
            name,
            "its config has no pad_token_id, so padding cannot be told from text",
            "Set pad_token_id in its config.json.",
        )
    return config


def encoder_context_length(config: PretrainedConfig, context_length: int) -> int:
    """`context_length`, or the encoder's number of positions if it has fewer."""
    # Encoders with relative positions (T5) have no such field and no limit.
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in _POSITIONS_AFTER_PADDING:
        positions -= config.pad_token_id + 1
    return min(context_length, positions or context_length)


def _create_encoder(name: str, config: PretrainedConfig) -> Any:
    try:
        model, absent = _load_encoder(name, config)
    except Exception as error:  # of many kinds, and torch's advice to turn weights_only off must not reach the user
        said = re.split(r"\.\s|\n", str(error).strip())[0]
        raise ConfigError(
            "model.text_tower",
            name,
            f"transformers makes no encoder of it ({type(error).__name__}: {said})",
            "Give a text encoder whose weights are whole, plain tensors and fit its config.json.",
        ) from error
    # transformers keeps the dtype of the file, which may be half: weights are trained in fp32.
    model = model.float()
    # T5's encoder saved alone says that it is all of the model, and is given a decoder here.
    both = config.is_encoder_decoder or (hasattr(model, "encoder") and hasattr(model, "decoder"))
    encoder: Any = model.get_encoder() if both else model
    if getattr(encoder, "pooler", None) is not None:
        # BERT's extra layer on the first token: unused here, and a parameter without gradient stops DDP.
        encoder.pooler = None
    used = {id(parameter) for parameter in encoder.parameters()}
    lacking = sorted(key for key, parameter in model.named_parameters() if key in absent and id(parameter) in used)
    if lacking:
        raise ConfigError(
            "model.text_tower",
            name,
            f"its weights lack {len(lacking)} parameters ({', '.join(lacking[:3])}, ...), which would begin at random",
            "Give the weights that belong to its config.json, or leave them all out to begin at random.",
        )
    return encoder.train()


def _load_encoder(name: str, config: PretrainedConfig) -> tuple[Any, set[str]]:
    """The whole model, and the names of what its weights lack; none in a folder without weights."""
    from transformers import AutoModel

    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*")):
        return AutoModel.from_config(config, trust_remote_code=False), set()
    model, report = AutoModel.from_pretrained(name, config=config, trust_remote_code=False, output_loading_info=True)
    return model, set(report["missing_keys"])


def _set_dropout(config: PretrainedConfig, name: str, dropout: float) -> None:
    fields = [key for key, value in config.to_dict().items() if "dropout" in key and isinstance(value, (int, float))]
    fields = [key for key in fields if not isinstance(getattr(config, key), bool)]
    if dropout and not fields:
        raise ConfigError("model.dropout", dropout, f"the encoder {name} has no dropout", "Set it to 0.")
    for key in fields:
        setattr(config, key, dropout)
