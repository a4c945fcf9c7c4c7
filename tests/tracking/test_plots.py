"""The curves are drawn, with what belongs to them, also from short and broken records."""

import builtins
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from behrt_jax.tracking import plots
from behrt_jax.tracking.plots import best_validation, plot_curves, plot_together

BASELINES = {"unigram": {"loss": 5.6, "accuracy": 0.03, "accuracy_top5": 0.12, "accuracy_top10": 0.2}}


def records(losses, split="tuning"):
    accuracy = 0.15 if split == "train" else 0.1
    return [
        {
            "step": 10 * i,
            "epoch": float(i),
            "split": split,
            "loss": loss,
            "accuracy": accuracy,
            "accuracy_top10": 3 * accuracy,
        }
        for i, loss in enumerate(losses, start=1)
    ]


@pytest.fixture
def axes():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    return Figure().add_subplot()


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_pictures_are_written_readable(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    metrics = records([6.5, 6.0, 5.0], "train") + records([6.4, 5.5, 5.2])
    drawn = plot_curves(metrics, BASELINES, tmp_path / "plots")
    assert drawn == [tmp_path / "plots" / "loss.png", tmp_path / "plots" / "accuracy.png"]
    for path in drawn:
        picture = imread(path)  # [height, width, 4]
        assert picture.shape[:2] == (774, 1008)
        blue = np.all(np.isclose(picture[..., :3], np.array([0, 0x72, 0xB2]) / 255, atol=0.02), axis=-1)
        orange = np.all(np.isclose(picture[..., :3], np.array([0xD5, 0x5E, 0]) / 255, atol=0.02), axis=-1)
        assert blue.sum() > 200
        assert orange.sum() > 200


def test_drawing_leaves_no_state_in_pyplot(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    plot_curves(records([6.0, 5.0]), BASELINES, tmp_path)
    assert pyplot.get_fignums() == []


def test_loss_axes_hold_both_splits_the_baseline_and_the_best_epoch(axes):
    metrics = records([6.5, 6.0, 5.0], "train") + records([6.4, 5.2, 5.5])
    assert plots._draw_loss(axes, metrics, BASELINES, best_validation(metrics))
    drawn = lines(axes)
    assert list(drawn) == ["train", "validation", "unigram baseline", "best validation: 5.200 at epoch 2"]
    assert list(drawn["train"].get_xdata()) == [1, 2, 3]
    assert list(drawn["validation"].get_ydata()) == [6.4, 5.2, 5.5]
    assert set(drawn["unigram baseline"].get_ydata()) == {5.6}
    best = drawn["best validation: 5.200 at epoch 2"]
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([2], [5.2])
    assert "nats" in axes.get_ylabel()


def test_other_baselines_are_lines_of_their_own(axes):
    baselines = {
        **BASELINES,
        "co-occurrence": {"loss": 4.8, "accuracy": 0.2},
        "oracle": {"loss": 4.1, "accuracy": 0.3, "accuracy_top10": 0.6},
    }
    plots._draw_loss(axes, records([5.0]), baselines, None)
    drawn = lines(axes)
    assert set(drawn["co-occurrence baseline"].get_ydata()) == {4.8}
    assert set(drawn["best possible"].get_ydata()) == {4.1}
    axes.clear()
    plots._draw_accuracy(axes, records([5.0]), baselines, None)
    assert set(lines(axes)["best possible, top-10"].get_ydata()) == {0.6}


def test_accuracy_axes_hold_top_1_and_a_lighter_top_10_and_mark_the_epoch_of_least_loss(axes):
    metrics = records([6.5, 6.0], "train") + records([5.2, 5.5])
    assert plots._draw_accuracy(axes, metrics, BASELINES, best_validation(metrics))
    drawn = lines(axes)
    assert drawn["validation, top-10"].get_alpha() < drawn["validation, top-1"].get_alpha()
    assert set(drawn["unigram baseline, top-1"].get_ydata()) == {0.03}
    assert set(drawn["unigram baseline, top-10"].get_ydata()) == {0.2}
    assert list(drawn["10.0% at epoch 1 (least validation loss)"].get_ydata()) == [0.1]
    assert len(drawn) == 8


def test_best_validation_is_the_earliest_of_the_least_and_ignores_training_and_nan():
    metrics = [*records([1.0], "train"), *records([math.nan, None, 5.0, 4.0, 4.0])]
    best = best_validation(metrics)
    assert best is not None
    assert best["step"] == 40
    assert best_validation(records([1.0], "train")) is None


def test_nothing_is_drawn_without_figures(tmp_path):
    folder = tmp_path / "plots"
    assert plot_curves([], BASELINES, folder) == []
    without = [{"step": 1, "epoch": 1.0, "split": "tuning", "loss": None, "accuracy": math.nan}]
    assert plot_curves(without, BASELINES, folder) == []
    assert not folder.exists()


def test_nothing_is_drawn_where_matplotlib_is_missing(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert plot_curves(records([5.0]), BASELINES, tmp_path) == []


values = st.one_of(st.none(), st.floats(0, 20), st.just(math.nan), st.just(math.inf))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(train=st.lists(values, max_size=4), tuning=st.lists(values, max_size=4), accuracy=values)
def test_any_records_can_be_drawn_and_gaps_stay_gaps(train, tuning, accuracy):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    metrics = records(train, "train") + [{**record, "accuracy": accuracy} for record in records(tuning)]
    axes = Figure().add_subplot()
    any_loss = plots._draw_loss(axes, metrics, {}, best_validation(metrics))
    finite = [value for value in tuning if value is not None and math.isfinite(value)]
    found = lines(axes)
    assert any_loss == ("train" in found or "validation" in found)
    assert ("validation" in found) == bool(finite)
    if finite:
        heights = np.asarray(found["validation"].get_ydata(), float)
        assert len(heights) == len(tuning)
        assert heights[~np.isnan(heights)].tolist() == finite
    plots._draw_accuracy(Figure().add_subplot(), metrics, {}, best_validation(metrics))


@pytest.fixture
def drawn(monkeypatch):
    """Lines of each picture that is drawn: name -> label -> heights."""
    found = {}

    def draw_pictures(folder, sizes, draw):
        from matplotlib.figure import Figure

        for name in sizes:
            axes = Figure().add_subplot()
            if draw(axes, name):
                found[name] = {label: list(line.get_ydata()) for label, line in lines(axes).items()}
        return []

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "draw_pictures", draw_pictures)
    return found


LABELS = {"base rate": {"loss": 0.67}, "count model": {"loss": 0.4, "auroc": 0.9}}


def test_of_labels_loss_and_auroc_are_drawn_beside_their_baselines(drawn, tmp_path):
    metrics = [
        {"step": 10, "epoch": 1.0, "split": "train", "loss": 0.7},
        {"step": 10, "epoch": 1.0, "split": "tuning", "loss": 0.6, "auroc": 0.7},
        {"step": 20, "epoch": 2.0, "split": "tuning", "loss": 0.5, "auroc": 0.8},
    ]
    plot_curves(metrics, LABELS, tmp_path)
    assert set(drawn) == {"loss", "auroc"}
    assert drawn["loss"]["train"] == [0.7] and drawn["loss"]["validation"] == [0.6, 0.5]
    assert drawn["loss"]["base rate"] == [0.67, 0.67] and drawn["loss"]["count model"] == [0.4, 0.4]
    assert drawn["auroc"]["validation"] == [0.7, 0.8]
    assert drawn["auroc"]["count model"] == [0.9, 0.9] and drawn["auroc"]["chance"] == [0.5, 0.5]


def test_each_member_of_a_population_has_a_curve(drawn, tmp_path):
    metrics = [
        {"step": k, "epoch": float(k), "split": "tuning", "loss": 0.6,
         "members": [{"loss": 0.7 - 0.1 * k}, {"loss": None if k == 2 else 0.5}]}
        for k in (1, 2)
    ]  # fmt: skip
    plot_curves(metrics, LABELS, tmp_path, ["seed 0", "seed 1"])
    assert set(drawn) == {"loss"}  # no AUROC is known
    assert drawn["loss"]["validation, mean"] == [0.6, 0.6]
    assert drawn["loss"]["seed 0"] == pytest.approx([0.6, 0.5])
    assert drawn["loss"]["seed 1"][0] == 0.5 and math.isnan(drawn["loss"]["seed 1"][1])


def test_runs_are_drawn_together_by_name_and_those_without_a_validation_left_out(drawn, tmp_path):
    plot_together({"a": records([6.0, 5.0]), "b": records([5.5]), "none": records([4.0], "train")}, tmp_path)
    assert drawn == {"loss": {"a": [6.0, 5.0], "b": [5.5]}}
    drawn.clear()
    plot_together({"none": []}, tmp_path)
    assert drawn == {}
