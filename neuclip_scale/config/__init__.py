"""The recipe of a run: frozen dataclasses, strict YAML, dotted overrides, and the resolved copy kept with the run.

Every value that changes what is computed is a field here, with its help text below it (tyro shows it in `--help`).
Nothing is ignored and nothing is rounded: an unknown key, a wrong type or a combination that cannot work is a
`ConfigError` that names the field, the value and the remedy.
"""

from neuclip_scale.config.checking import (
    check_objective,
    check_places,
    check_recipe,
    local_batch_size,
    matmul_precision,
    micro_batch_size,
    num_micro_batches,
    num_steps,
    pairs_encoded_again,
    unused_length,
    warnings_at_start,
)
from neuclip_scale.config.errors import ConfigError
from neuclip_scale.config.launcher import check_launcher
from neuclip_scale.config.neutral import NEUTRAL, PLACES, changes_training
from neuclip_scale.config.reading import (
    dump_recipe,
    flat_fields,
    load_recipe,
    parse,
    recipe_changes,
    recipe_fields,
    recipe_names,
)
from neuclip_scale.config.schema import (
    AmortizedConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    IndividualTemperatureConfig,
    ModelConfig,
    NPNConfig,
    ObjectiveConfig,
    ObjectiveName,
    OptimConfig,
    QueueConfig,
    Recipe,
    TrainConfig,
)

__all__ = [
    "NEUTRAL",
    "PLACES",
    "AmortizedConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "IndividualTemperatureConfig",
    "ModelConfig",
    "NPNConfig",
    "ObjectiveConfig",
    "ObjectiveName",
    "OptimConfig",
    "QueueConfig",
    "Recipe",
    "TrainConfig",
    "changes_training",
    "check_launcher",
    "check_objective",
    "check_places",
    "check_recipe",
    "dump_recipe",
    "flat_fields",
    "load_recipe",
    "local_batch_size",
    "matmul_precision",
    "micro_batch_size",
    "num_micro_batches",
    "num_steps",
    "pairs_encoded_again",
    "parse",
    "recipe_changes",
    "recipe_fields",
    "recipe_names",
    "unused_length",
    "warnings_at_start",
]
