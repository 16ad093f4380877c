"""What a model is for: a wrong model scores badly, an equal one perfectly, and the figures are the field's."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vitprune.errors import DataError
from vitprune.model import Selection, attach
from vitprune.tasks import TASKS, ClassVectors, Embedding, Spread, read_class_vectors, task_named
from vitprune.tasks.dense import PatchFeatures
from vitprune.tasks.embedding import Embeddings

NUM_IMAGES, WIDTH = 120, 8


def _outputs(seed=0):
    return torch.randn(NUM_IMAGES, WIDTH, generator=torch.Generator().manual_seed(seed))


def _targets(task, outputs):
    """What the dense model gives, with some noise: it is good, but not perfect."""
    noisy = outputs + 0.5 * _outputs(9)
    if task.name == "multilabel":
        return (noisy > 0).float()
    return noisy if task.name == "regression" else noisy.argmax(dim=1)


def _results(task, outputs, reference=None, targets=None):
    targets = torch.full((len(outputs),), -1) if targets is None else targets
    return task.results(task.record(outputs, reference), targets)


def _selection(logits):
    return Selection(logits, logits, logits[:, None], (), (), None, ())


EACH = pytest.mark.parametrize("name", ["classification", "multilabel", "regression", "embedding"])


@EACH
def test_an_equal_model_is_perfect_and_a_wrong_one_is_not(name):
    task, dense = task_named(name), _outputs()
    targets = _targets(task, dense)
    results = {
        "dense": _results(task, dense, None, targets),
        "same": _results(task, dense.clone(), dense, targets),
        "near": _results(task, dense + 0.1 * _outputs(1), dense, targets),
        "wrong": _results(task, _outputs(2), dense, targets),
    }
    if task.gallery:
        train = _outputs(5)
        gallery = _results(task, train, None, _targets(task, train))
        results = {key: each.beside(gallery) for key, each in results.items()}
    found = {key: each.fidelity(results["dense"]) | each.accuracy() for key, each in results.items()}
    for figure in (*task.fidelity, *task.accuracy):
        same, near, wrong = (found[key][figure.key] for key in ("same", "near", "wrong"))
        better = (lambda a, b: a >= b) if figure.higher_is_better else (lambda a, b: a <= b)
        assert better(same, near) or figure in task.accuracy, (figure, same, near)  # those are of chance too
        assert better(near, wrong), (figure, near, wrong)
        assert same != wrong, figure
    distances = [results[key].distances(results["dense"]).mean().item() for key in ("same", "near", "wrong")]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances[0] < distances[1] < distances[2]
    change = results["wrong"].change(results["dense"])
    key = task.change.key
    low, high = change[f"{key}_ci95"]
    assert low <= change[key] <= high
    assert (high < 0) == task.change.higher_is_better, "a wrong model is a loss beyond chance"
    none = results["same"].change(results["dense"])
    assert none[key] == pytest.approx(0)
    low, high = none[f"{key}_ci95"]
    assert low <= 0 <= high


@EACH
def test_the_loss_is_least_for_the_teacher_and_has_a_gradient(name):
    task, teacher = task_named(name), _outputs()
    losses = [
        task.distillation(_selection(each), _selection(teacher), Spread.of(teacher)).item()
        for each in (teacher, teacher + 0.1 * _outputs(1), _outputs(2))
    ]
    assert losses[0] == pytest.approx(0, abs=1e-5)
    assert losses[0] < losses[1] < losses[2]
    student = _outputs(3).requires_grad_()
    task.distillation(_selection(student), _selection(teacher), Spread.of(teacher)).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0
    output = _outputs(4).requires_grad_()
    (gradient,) = torch.autograd.grad(task.influence(output), output)
    assert gradient.abs().sum() > 0


@EACH
def test_without_labels_there_is_fidelity_and_no_accuracy(name):
    task, dense = task_named(name), _outputs()
    results = _results(task, dense + 0.1, dense), _results(task, dense)
    assert set(results[0].accuracy().values()) == {None}
    assert set(results[0].change(results[1]).values()) == {None}
    assert all(value is not None for value in results[0].fidelity(results[1]).values())


def test_average_precision_is_that_of_the_definition():
    task = task_named("multilabel")
    logits = torch.tensor([[3.0], [2.0], [1.0], [0.5]])
    results = _results(task, logits, None, torch.tensor([[1.0], [0.0], [1.0], [0.0]]))
    assert results.accuracy()["map_pct"] == pytest.approx(100 * (1 / 1 + 2 / 3) / 2)
    assert results.accuracy()["f1_pct"] == pytest.approx(100 * 2 * 2 / (4 + 2))


def test_labels_that_no_image_has_are_not_counted():
    task = task_named("multilabel")
    results = _results(task, _outputs(), None, torch.zeros(NUM_IMAGES, WIDTH))
    assert results.accuracy()["map_pct"] is None
    assert results.change(results)["map_points"] is None


def test_binary_divergence_is_that_of_the_formula_in_float64():
    task, logits, reference = task_named("multilabel"), _outputs(), _outputs(1)
    p, q = reference.double().sigmoid(), logits.double().sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(dim=1)
    torch.testing.assert_close(task.record(logits, reference)["kl"].double(), expected, atol=1e-5, rtol=1e-4)


def test_regression_figures_are_those_of_the_definition():
    task = task_named("regression")
    values, targets = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0], [3.0], [3.0]])
    found = _results(task, values, None, targets).accuracy()
    assert found["mae"] == pytest.approx(2 / 3)
    assert found["r2"] == pytest.approx(1 - 2 / (8 / 3))
    constant = _results(task, torch.ones(3, 1))
    assert _results(task, values).fidelity(constant)["pearson_r"] is None, "what never changes correlates with nothing"


def test_neighbours_are_those_of_a_full_search():
    task, dense = task_named("embedding"), _outputs()
    sparse = dense + 0.3 * _outputs(1)
    found = _results(task, sparse).fidelity(_results(task, dense))
    sets = []
    for vectors in (sparse, dense):
        unit = F.normalize(vectors, dim=1)
        order = (unit @ unit.T).fill_diagonal_(-2).argsort(dim=1, descending=True)
        sets.append(order[:, :10].tolist())
    shared = [len(set(ours) & set(theirs)) / 10 for ours, theirs in zip(*sets, strict=True)]
    assert found["neighbour_overlap_pct"] == pytest.approx(100 * sum(shared) / NUM_IMAGES)
    nearest = [ours[0] == theirs[0] for ours, theirs in zip(*sets, strict=True)]
    assert found["same_nearest_pct"] == pytest.approx(100 * sum(nearest) / NUM_IMAGES)


def test_what_all_vectors_share_is_not_taken_for_likeness():
    task, shared = task_named("embedding"), torch.full((WIDTH,), 10.0)
    found = _results(task, _outputs(1) + shared).fidelity(_results(task, _outputs() + shared))
    assert found["cosine"] < 0.3
    assert F.cosine_similarity(_outputs(1) + shared, _outputs() + shared).mean() > 0.95


def test_knn_votes_as_dino_does():
    vectors = F.normalize(torch.tensor([[1.0, 0.0]]), dim=1)
    keys = F.normalize(torch.tensor([[1.0, 0.05], [1.0, 0.9], [1.0, 0.9], [0.0, 1.0]]), dim=1)
    model = Embeddings(torch.tensor([0]), vectors, (keys, torch.tensor([0, 1, 1, 1])))
    weights = (keys @ vectors[0] / 0.07).exp()
    assert model.knn().tolist() == [int(weights[1:].sum() > weights[0])] == [0]
    assert model.accuracy()["knn_top1_pct"] == 100.0


def test_zero_shot_takes_the_likest_class():
    classes = ClassVectors(("a", "b"), F.normalize(torch.randn(2, WIDTH), dim=1))
    task = Embedding(classes)
    outputs = 3 * classes.vectors[[0, 1, 1]]
    found = _results(task, outputs, None, torch.tensor([0, 1, 0])).accuracy()
    assert found["zero_shot_top1_pct"] == pytest.approx(200 / 3)
    assert found["zero_shot_top5_pct"] == 100.0
    assert task.change.key == "zero_shot_top1_points"


def test_one_image_has_no_neighbours():
    task = task_named("embedding")
    found = _results(task, _outputs()[:1]).fidelity(_results(task, _outputs()[:1]))
    assert found["neighbour_overlap_pct"] is None
    assert found["cosine"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("tensors", "names", "said"),
    [
        ({"a": torch.ones(2, WIDTH)}, None, "does not say the classes' names"),
        ({"a": torch.ones(2, WIDTH)}, '["x"]', "names 1 different classes and has 2 vectors"),
        ({"a": torch.ones(2, WIDTH)}, '["x", "x"]', "names 1 different classes"),
        ({"a": torch.ones(2, 3)}, '["x", "y"]', "vectors of 3 numbers, and the model's embedding has 8"),
        ({"a": torch.ones(2, WIDTH), "b": torch.ones(2)}, '["x", "y"]', "not one vector a class"),
        ({"a": torch.zeros(2, WIDTH)}, '["x", "y"]', "not finite or zero"),
        ({"a": torch.ones(2, WIDTH)}, "x, y", "cannot be read"),
    ],
)
def test_class_vectors_that_do_not_fit_are_refused(tmp_path, tensors, names, said):
    path = tmp_path / "classes.safetensors"
    save_file(tensors, path, metadata=None if names is None else {"class_names": names})
    with pytest.raises(DataError, match=said):
        read_class_vectors(path, WIDTH)


def test_class_vectors_are_read_at_unit_length(tmp_path):
    path = tmp_path / "classes.safetensors"
    save_file({"text": torch.full((2, WIDTH), 3.0).half()}, path, metadata={"class_names": json.dumps(["x", "y"])})
    found = read_class_vectors(path, WIDTH)
    assert found.names == ("x", "y")
    assert found.vectors.norm(dim=1).tolist() == pytest.approx([1, 1])


def test_every_task_says_what_it_is_called():
    for name, task in TASKS.items():
        assert task.name == name
        assert task.noun
        assert task.fidelity
        keys = [figure.key for figure in (*task.accuracy, *task.fidelity)]
        assert len(set(keys)) == len(keys)


def _features(seed=0):
    return torch.randn(6, 12, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_patches_are_compared_less_what_all_of_an_image_share():
    task, shared = task_named("dense"), torch.full((WIDTH,), 10.0)
    kept = torch.arange(12).expand(6, 12) < 4
    dense = PatchFeatures(_features() + shared, None)
    near = torch.where(kept.unsqueeze(-1), _features(), _features() + 0.5 * _features(1)) + shared
    found = {}
    for name, features in {"same": dense.features, "near": near, "wrong": _features(2) + shared}.items():
        results = task.results(task.record(PatchFeatures(features, kept), dense), torch.full((6,), -1))
        found[name] = results.fidelity(results) | {"distance": results.distances(results).mean().item()}
    for figure in task.fidelity:
        assert found["same"][figure.key] == pytest.approx(1)
    assert found["near"]["token_cosine_kept"] == pytest.approx(1, abs=0.02)
    assert 0.7 < found["near"]["token_cosine_pruned"] < 0.95
    assert found["wrong"]["token_cosine"] < 0.4
    assert found["same"]["distance"] < found["near"]["distance"] < found["wrong"]["distance"]


def test_a_model_without_pruned_patches_says_so():
    task = task_named("dense")
    results = task.results(task.record(PatchFeatures(_features(), None)), torch.full((6,), -1))
    assert results.fidelity(results)["token_cosine_pruned"] is None
    assert results.fidelity(results)["token_cosine"] == pytest.approx(1)


def test_dense_runs_sparse_and_timm_models_alike(make_vit, make_images):
    task, model = task_named("dense"), make_vit(num_classes=0)
    images = make_images(model)
    with torch.no_grad():
        expected, found = (task.run(each, images).features for each in (model, attach(model, keep=1.0)))
        sparse = task.run(attach(model, keep=0.5), images)
    torch.testing.assert_close(found, expected)
    assert expected.shape == sparse.features.shape
    assert sparse.kept.float().mean() < 0.5


@EACH
def test_a_loss_is_the_mean_over_images_whatever_they_are_dealt_with(name):
    """So that microbatches and processes give one gradient."""
    task, student, teacher = task_named(name), _outputs(1), _outputs()
    spread = Spread.of(teacher)
    whole = task.distillation(_selection(student), _selection(teacher), spread)
    halves = [
        task.distillation(_selection(student[part]), _selection(teacher[part]), spread)
        for part in (slice(0, 30), slice(30, NUM_IMAGES))
    ]
    torch.testing.assert_close((30 * halves[0] + 90 * halves[1]) / NUM_IMAGES, whole)


def test_how_sure_a_model_is_and_whether_it_answers_the_same():
    logits = torch.tensor([[4.0, 0.0, 0.0], [1.0, 0.9, 0.0]])
    other = torch.tensor([[3.0, 0.0, 0.0], [0.9, 1.0, 0.0]])
    targets = torch.tensor([0, 0])
    classes, labels = task_named("classification"), task_named("multilabel")
    best = logits.softmax(dim=1).sort(dim=1, descending=True).values
    torch.testing.assert_close(classes.certainty(logits), best[:, 0] - best[:, 1])
    one, two = (classes.results(classes.record(each), targets) for each in (logits, other))
    assert one.same(two).tolist() == [True, False]
    assert torch.equal(one.certainty, classes.certainty(logits))

    logits, other = torch.tensor([[4.0, -3.0], [0.5, -8.0]]), torch.tensor([[1.0, -1.0], [-0.1, -8.0]])
    torch.testing.assert_close(labels.certainty(logits), 2 * torch.tensor([3.0, 0.5]).sigmoid() - 1)
    one, two = (labels.results(labels.record(each), targets) for each in (logits, other))
    assert one.same(two).tolist() == [True, False]
    torch.testing.assert_close(one.certainty, labels.certainty(logits))
    for name in ("regression", "embedding", "dense"):
        assert task_named(name).certainty(logits) is None, "they do not say how sure they are"
