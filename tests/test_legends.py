"""What pictures say that gates are turned with."""

import pytest

from solo_gating.plots import sweep, training

POINT = {"asked": None, "share": 0.4, "knn_top1": 60.0, "threshold": 0.0}


@pytest.fixture
def texts(monkeypatch):
    """All labels of the picture that is written."""
    found = []

    def read(path, figure):
        for axis in figure.axes:
            found.extend(axis.get_legend_handles_labels()[1])

    for module in (sweep, training):
        monkeypatch.setattr(module, "write_picture", read)
    return found


@pytest.mark.parametrize(
    ("dial", "more", "turned", "position"),
    [
        ("threshold", {}, "threshold", "threshold 0"),
        ("threshold", {"budget": 0.5}, "budget and threshold", "budget 0.5, threshold 0"),
        ("budget", {"budget": 0.5}, "budget", "budget 0.5"),
    ],
)
def test_a_sweep_names_what_was_turned(texts, tmp_path, dial, more, turned, position):
    sweep.draw_sweep([POINT | more], 70.0, None, tmp_path / "sweep.png", "title", dial)
    assert f"gated path, {turned} turned" in texts
    assert f"gated path as it is ({position})" in texts


@pytest.mark.parametrize(("dial", "words"), [("threshold", " (thresholded masks)"), ("budget", "")])
def test_curves_name_a_threshold_where_there_is_one(monkeypatch, texts, tmp_path, dial, words):
    logs = {"train_flops_share_epoch": {0: 0.5}, "val_flops_share": {0: 0.4}}
    monkeypatch.setattr(training, "read_logs", lambda folder: logs)
    training.draw_curves(tmp_path, 0.3, "title", dial)
    assert f"validation{words}" in texts


def test_curves_of_a_distilled_run_show_the_variance_that_is_not_explained(
    monkeypatch, texts, tmp_path
):
    names = ("train_vicreg_loss_epoch", "train_budget_loss_epoch", "train_flops_share_epoch")
    names = (*names, "train_unexplained_variance_epoch", "val_gated_acc1")  # five panels, two rows
    monkeypatch.setattr(training, "read_logs", lambda folder: {name: {0: 0.5} for name in names})
    training.draw_curves(tmp_path, 0.3, "title")
    assert "unexplained variance" in texts
