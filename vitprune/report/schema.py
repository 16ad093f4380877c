"""What report.json and keepmaps.json hold; keys that versions before this one did not write have defaults."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Speed(_Part):
    """One row of the benchmark."""

    batch_size: int
    images_per_s: float = Field(gt=0)
    latency_ms_p50: float
    latency_ms_p25: float | None = None
    latency_ms_p75: float | None = None
    peak_memory_mib: float | None = None


class Accuracy(_Part):
    """Of one model on the evaluation images; None without labels."""

    top1_pct: float | None
    top5_pct: float | None
    num_images: int


class Side(Accuracy):
    """The dense or the sparse model."""

    gmacs: float
    params_m: float
    speed: list[Speed] = Field(min_length=1)


class SpeedUp(_Part):
    """Sparse against dense at one batch size."""

    batch_size: int
    speedup: float
    slower: bool


class Delta(_Part):
    """Sparse against dense; in points, with 95 % intervals."""

    top1_points: float | None
    top1_points_ci95: tuple[float, float] | None
    top1_points_over_random: float | None = None
    agreement_pct: float
    kl: float | None = None
    kl_random: float | None = None
    gmacs_pct: float
    speedup: list[SpeedUp] = Field(min_length=1)


class ClassRow(_Part):
    """One class of the evaluation images."""

    index: int
    name: str | None = None
    num_images: int
    dense_top1_pct: float
    sparse_top1_pct: float


class Answers(_Part):
    """How many images each model got right."""

    both_right: int
    dense_only: int
    sparse_only: int
    neither: int


class StageRow(_Part):
    """One stage of the plan."""

    block: int
    ratio: float
    num_tokens: int


class Training(_Part):
    """Recipe and what was done."""

    recipe: dict[str, Any]
    steps_done: int
    num_steps: int
    num_images: int
    seconds: float
    num_skipped: int = 0
    num_restored: int = 0
    num_unreadable: int = 0
    unreadable: list[str] = []
    seconds_by_part: dict[str, float] = {}
    phases: dict[str, int] = {}
    backbone_lr: float | None = None
    warm_start_of: str | None = None


class DataPart(_Part):
    """The images."""

    name: str
    num_train_images: int | None
    num_val_images: int
    num_unreadable_val: int = 0
    unreadable_val: list[str] = []
    note: str | None = None


class Target(_Part):
    """A speed asked for (by one of two measures), promised before training, and measured after it."""

    speedup: float | None
    latency_ms: float | None
    batch_size: int
    precision: str
    promised_speedup: float
    promised_latency_ms: float
    measured_speedup: float
    measured_latency_ms: float
    met: bool


class Report(_Part):
    """report.json."""

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)]
    model: str
    label: str
    keep: float | None
    schedule: str | None = None
    dropped: str
    num_patches: int | None = None
    stages: list[StageRow]
    dense: Side
    sparse: Side
    random: Accuracy
    delta: Delta
    classes: list[ClassRow] = []
    answers: Answers | None = None
    coverage: dict[str, float] | None = None
    target: Target | None = None
    training: Training
    data: DataPart
    commands: dict[str, str] = {}
    precision: str
    device: str
    wall_s: float
    environment: dict[str, Any] = {}


class AnswerRow(_Part):
    """One class that a model names for an image."""

    index: int
    name: str | None = None
    probability_pct: float


class ImageRow(_Part):
    """One image of keepmaps.json.

    Attributes:
        group: who was right, one of `vitprune.report.samples`' groups.
        place: where the image stands in its group, by how far the sparse answer is from the dense one.
        jpeg: the image as the models saw it, made smaller, as base64.
        width, height: of the JPEG, in pixels.
        label: the true class; None where not known.
        kept: numbers of the patches that are left after each stage, in raster order.
        dense, sparse: the likeliest classes, best first.
        kl: KL divergence of the sparse answer from the dense one, in nats.
    """

    group: str
    place: str
    jpeg: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=2_000_000)]
    width: Annotated[int, Field(ge=1, le=4096)]
    height: Annotated[int, Field(ge=1, le=4096)]
    label: str | None
    kept: list[list[Annotated[int, Field(ge=0)]]]
    dense: list[AnswerRow] = Field(min_length=1)
    sparse: list[AnswerRow] = Field(min_length=1)
    kl: float


class KeepMaps(_Part, populate_by_name=True):
    """keepmaps.json.

    Attributes:
        grid_size: patches (rows, columns).
        num_seen: images that these were chosen from.
        images: the chosen ones.
    """

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    grid_size: tuple[Annotated[int, Field(ge=1, le=512)], Annotated[int, Field(ge=1, le=512)]]
    num_seen: int
    images: list[ImageRow] = Field(max_length=50, alias="pictures")  # the key since version 1
