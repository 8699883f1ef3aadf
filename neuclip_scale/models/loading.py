"""Models of other libraries' checkpoints, ready to encode."""

from __future__ import annotations

from pathlib import Path

from neuclip_scale.config import ConfigError
from neuclip_scale.models.building import create_model
from neuclip_scale.models.clip import CLIP
from neuclip_scale.models.interop import CONFIG_FILE, load_open_clip_state_dict, read_weights
from neuclip_scale.models.presets import differences, get_preset


def load_pretrained(path: str | Path, *, preset: str = "") -> CLIP:
    """The model of an open_clip checkpoint or a transformers CLIPModel, in evaluation mode, float32, on the CPU.

    `path` is a folder as open_clip pushes to the hub (`open_clip_config.json` and weights) or as transformers saves
    (`config.json` and `model.safetensors` or `pytorch_model.bin`), or a weights file (.safetensors, or a pickle, of
    which only tensors are read). The architecture is what the JSON beside the weights says, else `preset`. Raises
    `ConfigError` for an unknown or unsupported architecture and for a `preset` that the JSON contradicts,
    `FileNotFoundError`, and `ValueError` when the weights do not fit.
    """
    path = Path(path)
    state_dict, found = read_weights(path)
    architecture = get_preset(preset) if preset else found
    if architecture is None:
        raise ConfigError("preset", preset, f"{path} has no {CONFIG_FILE} that names the architecture", "Give preset=.")
    different = differences(found, architecture) if found is not None else []
    if different:
        problem = f"the JSON beside {path} tells of another architecture ({'; '.join(different)})"
        raise ConfigError("preset", preset, problem, "Leave preset out, or choose the one they were trained with.")
    model = create_model(architecture, logit_bias_init=0.0 if "logit_bias" in state_dict else None)
    load_open_clip_state_dict(model, state_dict)
    return model.eval()
