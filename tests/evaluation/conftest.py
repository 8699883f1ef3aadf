"""A model on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    from neuclip_scale.config import ModelConfig, Recipe
    from neuclip_scale.models.building import build_model
    from neuclip_scale.models.interop import to_open_clip_state_dict

    torch.manual_seed(0)
    model = build_model(Recipe(model=ModelConfig(preset="demo")))
    tensors = {name: tensor.clone().contiguous() for name, tensor in to_open_clip_state_dict(model).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"
