"""The sections of a recipe. The text below a field is its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ObjectiveName = Literal[
    "openclip",
    "siglip",
    "sogclr",
    "isogclr",
    "fastclip-v0",
    "fastclip-v1",
    "fastclip-v2",
    "fastclip-v3",
    "rgcl-g",
    "amorlip",
    "neuclip",
    "neuclip-queue",
    "exact",
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    preset: str = "ViT-B-32"
    """Architecture: a name from `neuclip_scale.models.presets`: ViT-B-32, ViT-B-16, ViT-L-14, ViT-H-14, RN50 (each also
    with -quickgelu), demo, toy."""
    image_tower: str = ""
    """A timm model name that replaces the preset's image tower; empty keeps the preset's."""
    text_tower: str = ""
    """A transformers encoder (name or local folder) that replaces the preset's text tower; empty keeps the preset's."""
    image_size: int = 0
    """Input resolution in pixels; 0 takes the preset's."""
    image_layers: int = 0
    """Transformer blocks of the preset's image tower; 0 takes the preset's."""
    text_layers: int = 0
    """Transformer blocks of the preset's text tower; 0 takes the preset's."""
    pretrained: str = ""
    """Weights to start from: an open_clip or transformers CLIP folder, or a weights file of open_clip."""
    pretrained_towers: Literal["both", "image", "text"] = "both"
    """What of them: both towers and their temperature, or one tower."""
    lock: Literal["", "image", "text"] = ""
    """A tower that is not trained, as in LiT; empty trains both."""
    unlocked_layers: int = 0
    """Last layers of the locked tower that train nevertheless; the projection with the final norm is one."""
    dropout: float = 0.0
    """Dropout inside the transformer blocks of both towers."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: Literal["auto", True, False] = False
    """Compile both towers with torch.compile: shorter steps after a first one that takes a minute longer. auto: CLIP's
    own transformers on a GPU where that works."""
    cuda_graphs: bool = False
    """Replay what was compiled as CUDA graphs, for micro-batches so small that the GPU waits for the host. Captions'
    lengths differ from batch to batch: their tower takes part with pack_captions=False."""
    pack_captions: bool = True
    """Leave out most of the captions' padding, in CLIP's own text tower: the same features in less time and memory."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str = ""
    """Training shards: a folder, a brace pattern (`/data/{00000..01023}.tar`), a glob, an address (s3://, gs://,
    https://, any of fsspec's), a command (`pipe:...`), a manifest made by `neuclip data index`, or several of these
    joined with `::`."""
    weights: tuple[float, ...] = ()
    """Relative weight of each source joined with `::`; empty reads every sample of all of them once an epoch."""
    replacement: bool = False
    """Draw windows of samples with replacement instead of reading every sample once an epoch."""
    num_streams: int = 8
    """Canonical streams. Any world size that divides it sees the same global batches in the same order."""
    shuffle_window: int = 4096
    """Samples of one stream that are permuted together; shards themselves are permuted every epoch."""
    num_workers: int = 2
    """Decoding processes per rank; 0 decodes in the training process. Does not change the data order."""
    prefetch_batches: int = 2
    """Batches that each worker prepares ahead."""
    cache_dir: str = ""
    """Where remote shards are kept while they are read; empty: $NEUCLIP_CACHE, else among the temporary files."""
    cache_gib: float = 50.0
    """Bound of that folder in GiB: two shards for each stream that is read on the machine, at least."""
    stall_warning_seconds: float = 60.0
    """A wait for data longer than this is told, with the worker and the shard it reads."""
    stall_timeout_seconds: float = 1800.0
    """A wait longer than this ends the run, which can be resumed; 0 waits for ever."""
    max_worker_memory_gib: float = 0.0
    """GiB that a decoding process may come to hold. Above, it lets its caches go, and if that does not help the run
    ends, to be resumed from the newest checkpoint. 0: no limit."""
    image_keys: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """Tar member extensions that hold the picture, first match wins."""
    caption_key: str = "txt"
    """Where the caption stands: a tar member's extension (UTF-8 text), or a field of a JSON member, `json:caption`."""
    captions: tuple[str, ...] = ()
    """Several such places, one drawn each time a sample is read, or the next that has one; a JSON list gives any of its
    entries. Empty: caption_key alone."""
    caption_weights: tuple[float, ...] = ()
    """Relative frequencies of `captions`; empty: equal ones."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Area range of the random resized crop; open_clip's default."""
    decoder: Literal["auto", "turbo", "pillow", "reference"] = "auto"
    """auto: JPEG by libjpeg-turbo (simplejpeg) where it is installed, the rest by Pillow, large JPEG at 1/2, 1/4 or 1/8
    of their size; turbo: refuse to run without it; pillow: the same by Pillow alone; reference: Pillow's full decode
    and resize, open_clip's pixels exactly. Evaluation always takes the last."""
    max_image_pixels: int = 50_000_000
    """Pictures of more pixels are refused before they are decoded (decompression bombs). At most 89478485, Pillow's own
    limit."""
    max_bad_fraction: float = 0.02
    """Training stops when more than this fraction of the samples read was unusable; fewer are counted and listed."""
    require_audit: str = ""
    """audit.json of `neuclip audit` that must be of these shards and without discrepancy; its digest goes into the
    run's summary and the model card."""


@dataclass(frozen=True, kw_only=True)
class NPNConfig:
    num_prototypes: int = 4096
    """m, the number of prototypes per side."""
    updates_per_step: int = 10
    """T_u, AdaGrad updates of the prototypes before each encoder step."""
    restart_every: int = 500
    """T_r, steps between restarts from sampled embeddings; 0 never restarts after the first."""
    learning_rate: float = 0.01
    """AdaGrad's learning rate."""
    prototype_source: Literal["batch", "recent"] = "recent"
    """Embeddings a restart samples from: the current global batch, or a store of the most recent past batches."""
    reset_accumulator: bool = False
    """Whether a restart also clears AdaGrad's accumulated squares."""
    exclude_own: bool = True
    """Whether an anchor leaves out the prototype that was made from its own pair."""
    cuda_graphs: bool = False
    """On a GPU: start a step's updates as CUDA graphs, recorded in the second step, and not kernel by kernel."""


@dataclass(frozen=True, kw_only=True)
class QueueConfig:
    size: int = 0
    """M, past pairs whose embeddings are negatives of the normalizers; 0 takes those of the last 16 steps, or if these
    are less than 8192 that many, but of no more than 128 steps (256 with `project_anew`), and at most the data set."""
    forget: bool = True
    """Whether older pairs count less, exp(-age/h), in the mixture of horizons h that has explained the last batches
    best."""
    join_batch: bool = True
    """Whether the batch's own negatives stand in one mean with the queue's."""
    project_anew: bool = False
    """Whether the queue keeps what the towers' last maps were given, not what these made of it, and sums over what
    they would make now: so pairs age less. `width` numbers for each pair and side in place of d, and as much work."""
    batch_weight: float = 0.5
    """w in a = log((1 - w) exp(a) + w g), g the mini-batch's estimate: bounds each weight by 1/w. 0 is the truer
    normalizer, which has not trained better (docs/comparison.md)."""


@dataclass(frozen=True, kw_only=True)
class AmortizedConfig:
    hidden_factor: float = 1.0
    """Width of the networks' hidden layer over the embeddings' width."""
    learning_rate: float = 1e-3
    """Adam's learning rate."""
    updates_per_step: int = 3
    """Adam steps of the networks before each encoder step."""
    ema: float = 0.92
    """Decay of the networks' running average, whose copy of the last epoch predicts."""
    ema_every: int = 2
    """Steps between updates of the running average."""
    blend_max: float = 0.8
    """Largest weight of the prediction beside the batch's own sum."""
    blend_epochs: int = 16
    """Epochs over which that weight rises from 0 along a cosine."""
    positive_weight: float = 1e-3
    """Weight of the positive pair in the sums over the batch."""
    rho: tuple[float, ...] = (8.5, -8.5, -8.5)
    """Weights of the term rho tau, each for an equal part of the run's epochs, or of a run with fewer epochs."""


@dataclass(frozen=True, kw_only=True)
class IndividualTemperatureConfig:
    learning_rate: float = 0.0133
    """Adam's learning rate for each pair's own tau."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    max_gradient: float = 5.0
    """Each gradient is clamped to [-max_gradient, max_gradient]."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    name: ObjectiveName = "neuclip"
    """Training objective."""
    temperature_init: float = 0.0
    """tau at the start; the model stores log(1/tau). 0 takes the objective's published one: 0.1 for siglip, 0.03 for
    isogclr and fastclip-v2, 0.07 for the others."""
    temperature_min: float = 0.01
    """Lower bound of tau."""
    temperature_max: float = 1.0
    """Upper bound of tau."""
    rho: float = 8.5
    """Weight of the term that keeps a learned tau from collapsing (isogclr, fastclip-v2 and v3, rgcl-g, neuclip
    and neuclip-queue, exact)."""
    eps: float = 1e-6
    """Added to the normalizer before its logarithm."""
    gamma_min: float = 0.2
    """Smallest weight of the newest estimate in the u table; sogclr and isogclr use it throughout. 0 takes the later
    rule of the same group, min(1, 4.177 epochs^-0.7265)."""
    gamma_decay_epochs: int = 0
    """Epochs over which gamma falls from 1 to gamma_min along a cosine; 0 takes the length of the run."""
    exact_refresh_every: int = 1
    """Steps between two encodings of the whole data set (exact): each takes n/B of a step's forward passes."""
    bias_init: float = -10.0
    """SigLIP's learned bias at the start (siglip)."""
    tile_size: int = 1024
    """Edge of the similarity tiles, in rows, at most 512 on a CPU; bounds the memory of the loss."""
    exchange: Literal["gather", "ring"] = "gather"
    """How ranks see each other's features: every rank gathers all of them, or a rank's share at a time travels around
    the ranks, twice a step (siglip: once): less memory for very large batches. Not with neuclip-queue."""
    npn: NPNConfig = field(default_factory=NPNConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    amortized: AmortizedConfig = field(default_factory=AmortizedConfig)
    individual: IndividualTemperatureConfig = field(default_factory=IndividualTemperatureConfig)

    @property
    def initial_temperature(self) -> float:
        """tau at the start, the published one where `temperature_init` is 0."""
        return self.temperature_init or PUBLISHED_TEMPERATURES.get(self.name, 0.07)


PUBLISHED_TEMPERATURES = {"siglip": 0.1, "isogclr": 0.03, "fastclip-v2": 0.03}


@dataclass(frozen=True, kw_only=True)
class TowerOptimConfig:
    learning_rate_factor: float = 1.0
    """Factor on optim.learning_rate for this tower."""
    weight_decay_factor: float = 1.0
    """Factor on optim.weight_decay for this tower."""
    layer_decay: float = 1.0
    """Each layer's learning rate is this times that of the layer after it; 1 for equal ones."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: str = "adamw"
    """adamw (torch's, fused), or one of timm's: lamb, lion, muon, adopt, adafactorbv, ... ZeRO 1 to 3 run adamw
    only: an optimizer that looks at whole matrices or norms would be wrong on their slices."""
    learning_rate: float = 5e-4
    """Peak learning rate of the encoders."""
    image: TowerOptimConfig = field(default_factory=TowerOptimConfig)
    text: TowerOptimConfig = field(default_factory=TowerOptimConfig)
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of Adam and of the optimizers that have two such rates."""
    momentum: float = 0.9
    """Momentum of the optimizers that have one (sgd, muon)."""
    eps: float = 1e-6
    """Epsilon of Adam and of the optimizers that have one."""
    ema_decay: float = 0.0
    """Decay of a running average of the weights, which is then what is evaluated; 0 keeps none. Early in a run it is
    min(ema_decay, (1 + step)/(10 + step)). BatchNorm's statistics (RN50, some timm towers) are no weights: the average
    is evaluated, and exported, with those of the last steps, as torch's AveragedModel has it and timm's EMA has not."""
    weight_decay: float = 0.2
    """Applied to tensors of two and more dimensions, as in open_clip: not to biases, gains and logit_scale."""
    warmup_steps: int = 500
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant", "cooldown"] = "cosine"
    """Learning rate after warm-up: falling along a cosine, constant, or constant with a cooldown to zero at the end."""
    cooldown_steps: int = 0
    """Last steps of the run in which `cooldown` falls."""
    cooldown_power: float = 1.0
    """The fall is (rest of the cooldown) to this power; 1 is a straight line."""
    temperature_learning_rate: float = 0.0
    """Peak learning rate of log(1/tau) and SigLIP's bias; 0 takes the encoders'."""
    temperature_schedule: Literal["encoders", "constant"] = "encoders"
    """Learning rate of log(1/tau): the encoders' schedule, or constant from the first step (FastCLIP, AmorLIP)."""
    temperature_drop_at: float = 0.0
    """Two steps after tau is at most this, its learning rate falls to a third (FastCLIP, NeuCLIP: 0.03); 0 never."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    global_batch_size: int = 1024
    """Pairs per step over all ranks: the contrastive batch."""
    micro_batch_size: int = 0
    """Pairs encoded at a time on one rank; below the local batch, gradients are cached. 0: the local batch."""
    kept_micro_batches: int = 1
    """Of several micro-batches, those whose activations are kept from the first encoding, so that they are not encoded
    again: each saves its forward pass and costs a micro-batch's memory, but for the first, whose memory a backward
    pass needs anyway."""
    kept_tower: Literal["", "image", "text"] = ""
    """A tower whose activations are kept for every micro-batch, so that only the other one is run again."""
    num_steps: int = 0
    """Optimizer steps; 0 derives them from `epochs`."""
    epochs: float = 0.0
    """Passes over the data, used when num_steps is 0; a last incomplete batch is not taken."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the encoders; features, losses and normalizers are always held in fp32."""
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """How a GPU multiplies what is held in fp32, in torch's words: highest (fp32), high (TF32), medium (factors rounded
    to bf16, sums in fp32). auto: medium where the encoders' own products are no finer, highest with precision=fp32."""
    max_grad_norm: float = 0.0
    """Clip the encoders' gradient to this norm; 0 does not clip."""
    hang_timeout_seconds: float = 2100.0
    """A rank whose step takes longer writes its stacks to RUN/stacks and ends, so that the job fails instead of waiting
    for ever; the first step may take three times as long, evaluations and measurements of the normalizers do not count.
    0: none but the half hour that a collective may wait. Longer than data.stall_timeout_seconds, a stall of the data
    is told as such."""
    log_every_steps: int = 10
    """Steps between lines on the console; metrics.jsonl has every step."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    background: bool = True
    """Train on while a checkpoint is written; costs the host a copy of what each rank writes."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every_steps: int = 0
    """Checkpoints of steps that this divides stay for good; 0: none."""


@dataclass(frozen=True, kw_only=True)
class FSDPConfig:
    replicas: int = 1
    """Copies of the model, each sharded over world size / replicas ranks (hybrid sharding); 1 shards over all ranks."""
    reshard_after_forward: bool = False
    """Let a block's gathered parameters go after each pass, and not once a step: less memory, by the blocks' size in
    the precision that they run in, and a gathering more for each pass."""
    accumulate_sharded: bool = False
    """Reduce gradients after every micro-batch and keep this rank's part of the sum: less memory, more traffic."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in the host's memory."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    config: str = "zero2"
    """ZeRO settings: a JSON file, or the name of one in `ds_configs/` (zero0, zero1, zero2, zero3, zero2_offload,
    zero3_offload). Batch sizes, precision, clipping and optimizer come from the recipe and may not stand in it."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    name: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """How the encoders are spread over the ranks: replicated, or sharded by FSDP2 or DeepSpeed ZeRO."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU when there is one."""
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    data: str = ""
    """Folder with evaluation sets (`zeroshot/`, `retrieval/`); empty skips evaluation."""
    every_steps: int = 0
    """Steps between evaluations during training; 0 evaluates at the end only."""
    at_samples: tuple[int, ...] = ()
    """Numbers of samples seen at which to evaluate too, as [1280000, 12800000]: after the step that reaches each."""
    normalizer_every_steps: int = 0
    """Steps between measurements of the normalizer's error against the exact value; 0 never."""
    normalizer_reference: int = 0
    """Training pairs that the exact value is computed over; 0 takes all (reported with the result)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One complete training run."""

    name: str = "run"
    """Name of the recipe, for people."""
    run_dir: str = ""
    """Folder that receives config, metrics, checkpoints and results."""
    resume: str = "auto"
    """auto: the newest checkpoint in run_dir; never: refuse a run_dir that has one; PATH: that one."""
    seed: int = 0
    """Seed of the initial weights, the data order, augmentation and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
