"""What report.json and keepmaps.json hold; keys that versions before this one did not write have defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from vitprune.common.json_version import SCHEMA_VERSION
from vitprune.model import TaskName
from vitprune.schedule import Stage
from vitprune.tasks import NamedClass


class _Content(BaseModel):
    """Keys that this version does not know are kept as they are."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    def as_json(self) -> dict[str, Any]:
        """The content in JSON's types; if it was read from a file, with the keys that this file has."""
        return self.model_dump(mode="json", exclude_unset=True)


class Speed(_Content):
    """One row of the benchmark, see `vitprune.measure.Timing`."""

    batch_size: int
    latency_ms_p50: float
    latency_ms_p25: float | None = None
    latency_ms_p75: float | None = None
    images_per_s: float = Field(gt=0)
    peak_memory_mib: float | None = None
    num_runs: int | None = None
    single_pass_ms_p50: float | None = None
    single_pass_ms_p90: float | None = None
    single_pass_ms_p99: float | None = None
    num_single_passes: int = 0
    mode: str = "eager"
    rounds_ms: list[float] = []


class _Fidelity(_Content):
    """How close a model is to the dense one, by task; see `vitprune.tasks`. Those of other tasks are not written."""

    agreement_pct: float | None = None
    kl: float | None = None
    label_agreement_pct: float | None = None
    pearson_r: float | None = None
    rmse_to_dense: float | None = None
    error_pct: float | None = None
    cosine: float | None = None
    cosine_p5: float | None = None
    neighbour_overlap_pct: float | None = None
    same_nearest_pct: float | None = None
    token_cosine: float | None = None
    token_cosine_p5: float | None = None
    token_cosine_kept: float | None = None
    token_cosine_pruned: float | None = None


class Accuracy(_Fidelity):
    """Of one model on the evaluation images, by task; None without labels, and not written of other tasks."""

    top1_pct: float | None = None
    top5_pct: float | None = None
    map_pct: float | None = None
    f1_pct: float | None = None
    mae: float | None = None
    r2: float | None = None
    knn_top1_pct: float | None = None
    zero_shot_top1_pct: float | None = None
    zero_shot_top5_pct: float | None = None
    num_gallery_images: int | None = None
    num_images: int


class Side(Accuracy):
    """The dense or the sparse model."""

    gmacs: float
    params_m: float
    speed: list[Speed] = Field(min_length=1)


class SpeedUp(_Content):
    """Sparse against dense at one batch size."""

    batch_size: int
    speedup: float
    speedup_ci95: tuple[float, float] | None = None
    slower: bool


class Delta(_Fidelity):
    """Sparse against dense, by task: the change of accuracy, in points or its own unit, with 95 % intervals."""

    top1_points: float | None = None
    top1_points_ci95: tuple[float, float] | None = None
    top1_points_over_random: float | None = None
    top1_points_over_random_ci95: tuple[float, float] | None = None
    map_points: float | None = None
    map_points_ci95: tuple[float, float] | None = None
    map_points_over_random: float | None = None
    map_points_over_random_ci95: tuple[float, float] | None = None
    mae_change: float | None = None
    mae_change_ci95: tuple[float, float] | None = None
    mae_change_over_random: float | None = None
    mae_change_over_random_ci95: tuple[float, float] | None = None
    knn_top1_points: float | None = None
    knn_top1_points_ci95: tuple[float, float] | None = None
    knn_top1_points_over_random: float | None = None
    knn_top1_points_over_random_ci95: tuple[float, float] | None = None
    zero_shot_top1_points: float | None = None
    zero_shot_top1_points_ci95: tuple[float, float] | None = None
    zero_shot_top1_points_over_random: float | None = None
    zero_shot_top1_points_over_random_ci95: tuple[float, float] | None = None
    kl_random: float | None = None
    gmacs_pct: float
    speedup: list[SpeedUp] = Field(min_length=1)


class AtKeep(_Content):
    """A model of a range at another keep ratio than the one it opens at."""

    keep: float
    side: Side
    delta: Delta


class Correct(_Content):
    """How many images each model got right."""

    both_right: int
    dense_only: int
    sparse_only: int
    neither: int


class ClassRow(_Content):
    """One class of the evaluation images."""

    index: int
    name: str | None = None
    num_images: int
    dense_top1_pct: float
    sparse_top1_pct: float


class Rare(_Content):
    """Sparse against dense on the images of classes that training hardly shows; see `tasks.on_rare_classes`.

    `counted_by` says what the training images' classes are from: their labels, or what the dense model predicts.
    """

    fewer_than: int
    counted_by: Literal["labels", "predictions"]
    num_images: int
    dense_top1_pct: float | None
    sparse_top1_pct: float | None
    top1_points: float | None
    top1_points_ci95: tuple[float, float] | None
    agreement_pct: float
    kl: float | None


class Target(_Content):
    """A speed asked for (by one of two measures), predicted before training, and measured after it."""

    speedup: float | None
    latency_ms: float | None
    batch_size: int
    precision: str
    predicted_speedup: float
    predicted_latency_ms: float
    measured_speedup: float
    measured_latency_ms: float
    measured_dense_latency_ms: float | None = None
    met: bool


class Training(_Content):
    """The recipe, and what was done, see `vitprune.training.Progress`."""

    recipe: dict[str, Any]
    identity: dict[str, Any] = {}
    steps_done: int
    num_steps: int
    num_skipped: int = 0
    num_microbatches: int = 1
    num_images: int
    num_unreadable: int = 0
    unreadable: list[str] = []
    seconds: float
    seconds_split: dict[str, float] = {}
    phases: dict[str, int] = {}
    sampled_ratios: list[float] | None = None
    backbone_lr: float | None = None


class DataSummary(_Content):
    """The images."""

    name: str
    num_train_images: int | None
    num_val_images: int
    num_unreadable_val: int = 0
    unreadable_val: list[str] = []
    how_classes: str | None = None
    left_out: str | None = None
    remarks: list[str] = []
    note: str | None = None


class Report(_Content):
    """report.json."""

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)]
    model: str
    task: TaskName = "classification"
    label: str
    keep: float | None
    keep_range: tuple[float, float] | None = None
    schedule: str | None = None
    pruned: str
    align: int = 1
    num_patches: int | None = None
    stages: list[Stage]
    dense: Side
    sparse: Side
    random: Accuracy
    delta: Delta
    keeps: list[AtKeep] = []
    correct: Correct | None = None
    classes: list[ClassRow] = []
    rare: Rare | None = None
    coverage: dict[str, float] | None = None
    target: Target | None = None
    training: Training
    data: DataSummary
    commands: dict[str, str] = {}
    precision: str
    device: str
    seconds: float
    environment: dict[str, Any] = {}


class Step(BaseModel):
    """What a page shows of one line of log.jsonl, see `vitprune.training.StepRecord`."""

    step: int
    phase: str = ""
    losses: dict[str, float | None] = {}
    kept_ratios: list[float] = []
    target_ratios: list[float] = []


_Number = Annotated[int, Field(ge=0)]
_BASE64 = r"^[A-Za-z0-9+/]+={0,2}$"
Jpeg = Annotated[str, Field(pattern=_BASE64, max_length=2_000_000)]
Thumbnail = Annotated[str, Field(pattern=_BASE64, max_length=50_000)]
Said = list[NamedClass] | Annotated[str, Field(max_length=10_000)]
"""See `vitprune.tasks.Answer`."""


class ImageRow(BaseModel):
    """One image of keepmaps.json.

    Attributes:
        group: who was right, one of `vitprune.report.samples`' groups.
        place: where the image stands in its group, by `distance`.
        jpeg: the image as the models saw it, made smaller, as base64; `width` and `height` are its own, in pixels.
        label: what is right: the class, labels or values; None where not known.
        kept: numbers of the patches that are left after each stage, in raster order.
        owners: where tokens are merged, for each patch the number of the kept one that it is part of after a stage.
        dense, sparse: what the models say: the likeliest classes, best first, or a text; nothing of an embedding.
        distance: how far the sparse model's output is from the dense one's, by the task; of versions before `kl`.
        likeness: of each patch's features to the dense model's, where these are what the model is for.
        neighbours: by model the numbers of the images that are nearest to it, nearest first, in `KeepMaps.thumbnails`.
    """

    group: str
    place: str
    jpeg: Jpeg
    width: Annotated[int, Field(ge=1, le=4096)]
    height: Annotated[int, Field(ge=1, le=4096)]
    label: str | None
    kept: list[list[_Number]]
    owners: list[list[_Number]] = []
    dense: Said
    sparse: Said
    distance: float = Field(validation_alias=AliasChoices("distance", "kl"))
    likeness: Annotated[list[Annotated[float, Field(ge=-1, le=1)]], Field(max_length=512 * 512)] = []
    neighbours: dict[Literal["dense", "sparse"], Annotated[list[_Number], Field(max_length=20)]] = {}


class KeepMaps(BaseModel):
    """keepmaps.json.

    Attributes:
        grid_size: patches (rows, columns).
        num_seen: images that these were chosen from.
        images: the chosen ones.
        thumbnails: small images that `ImageRow.neighbours` counts, as base64 of JPEG.
    """

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    grid_size: tuple[Annotated[int, Field(ge=1, le=512)], Annotated[int, Field(ge=1, le=512)]]
    num_seen: int
    images: list[ImageRow] = Field(max_length=50)
    thumbnails: list[Thumbnail] = Field([], max_length=500)

    @property
    def num_images(self) -> int:
        """Images of the data set that are in it, small ones too."""
        return len(self.images) + len(self.thumbnails)
