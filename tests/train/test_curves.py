import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from coat_deploy.errors import BackendMissing, UsageError
from coat_deploy.train.curves import (
    confusion_figure,
    draw_confusion,
    draw_history,
    history_figure,
)
from coat_deploy.train.progress import EpochReport

pytest.importorskip("matplotlib")

SVG = "{http://www.w3.org/2000/svg}"


def report(epoch: int, top1: float | None = None) -> EpochReport:
    measured = () if top1 is None else (top1, 0.9, 2.0 / epoch)
    return EpochReport(epoch, 4, epoch * 10, 3.0 / epoch, 0.1 * epoch, 500, 0.1, 0, 1.0, *measured)


REPORTS = [report(1), report(2, 0.75), report(3), report(4, 0.5)]
CONFUSION = np.array([[8, 2, 0], [0, 0, 0], [1, 0, 3]])
LABELS = ("coat", "hat", "boot")
AWKWARD = ("cat | dog", "# x", "<b> & 'c'", "$a$ \\frac", "猫 😀", "a\nb\x00", "\udcff", "")


def texts(svg: bytes) -> list[str]:
    return [str(node.text) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def lines(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {ln.get_label(): (list(ln.get_xdata()), list(ln.get_ydata())) for ln in axes.lines}


def test_the_panels_hold_loss_top1_and_learning_rate_by_epoch():
    loss, top1, rate = history_figure(REPORTS).axes
    assert lines(loss) == {
        "training": ([1, 2, 3, 4], [3.0, 1.5, 1.0, 0.75]),
        "validation": ([2, 4], [1.0, 0.5]),
    }
    assert lines(top1) == {"validation": ([2, 4], [0.75, 0.5])}
    assert lines(rate)["learning rate"][1] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_the_last_and_the_best_accuracy_are_written_down():
    heading = history_figure(REPORTS).axes[1].get_title(loc="left")
    assert heading == "validation top-1: 50.0% at the end, 75.0% at best (epoch 2)"


def test_a_last_accuracy_that_is_the_best_is_called_so():
    heading = history_figure(REPORTS[:2]).axes[1].get_title(loc="left")
    assert heading == "validation top-1: 75.0% at the end, its best"


def test_without_an_evaluation_there_is_no_panel_of_accuracy():
    loss, _rate = history_figure([report(1), report(2)]).axes
    assert list(lines(loss)) == ["training"]


def test_a_single_epoch_is_drawn_as_dots_on_whole_epochs():
    figure = history_figure([report(1, 0.5)], "one")
    assert all(line.get_marker() == "o" for axes in figure.axes for line in axes.lines)
    assert draw_history([report(1, 0.5)], ".png").startswith(b"\x89PNG\r\n\x1a\n")
    assert all(tick == int(tick) for tick in figure.axes[-1].get_xticks())


def test_an_svg_of_the_history_names_its_curves():
    words = texts(draw_history(REPORTS, ".svg", "$mine$ <1>"))
    assert {"$mine$ <1>", "training", "validation", "learning rate", "epoch"} <= set(words)


def test_a_matrix_holds_shares_of_its_rows():
    figure = confusion_figure(CONFUSION, LABELS)
    shown = figure.axes[0].images[0].get_array()
    expected = [[0.8, 0.2, 0.0], [np.nan] * 3, [0.25, 0.0, 0.75]]
    np.testing.assert_allclose(shown.filled(np.nan), expected)


def test_few_classes_have_their_counts_written_where_they_belong():
    axes = confusion_figure(CONFUSION, LABELS).axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "8", (1, 0): "2", (0, 2): "1", (2, 2): "3"}


def test_rows_are_named_with_their_images_and_columns_alone():
    axes = confusion_figure(CONFUSION, LABELS).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "coat  10",
        "hat  0",
        "boot  4",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(LABELS)


@pytest.mark.parametrize("classes", [2, 10, 30, 100])
def test_names_are_large_enough_to_read_and_do_not_overlap(classes):
    figure = confusion_figure(
        np.eye(classes, dtype=np.int64), [f"class {i}" for i in range(classes)]
    )
    sizes = {label.get_size() for label in figure.axes[0].get_yticklabels()}
    row = figure.get_figheight() * 72 / classes
    assert len(sizes) == 1 and 7 <= sizes.pop() < row


@pytest.mark.parametrize(("classes", "largest"), [(2, 999_999), (30, 9_999)])
def test_counts_fit_their_cells(classes, largest):
    figure = confusion_figure(np.diag([largest] * classes), ["x"] * classes)
    figure.canvas.draw()
    axes = figure.axes[0]
    width = axes.get_window_extent().width / classes
    assert max(text.get_window_extent().width for text in axes.texts) < width


def test_many_classes_have_names_but_no_counts():
    axes = confusion_figure(np.eye(60, dtype=np.int64), [f"class {i}" for i in range(60)]).axes[0]
    assert len(axes.texts) == 0
    assert len(axes.get_yticklabels()) == 60


def test_a_thousand_classes_go_by_number():
    axes = confusion_figure(np.eye(1000, dtype=np.int64), ["x"] * 1000).axes[0]
    assert axes.get_ylabel() == "true class, by number"
    assert "x" not in [label.get_text() for label in axes.get_yticklabels()]


def test_an_svg_of_the_matrix_names_its_classes():
    words = texts(draw_confusion(CONFUSION, LABELS, ".svg", "clothes"))
    assert {"coat  10", "hat  0", "boot  4", "coat", "hat", "boot", "clothes: confusion"} <= set(
        words
    )


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_names_of_any_kind_are_drawn(suffix):
    confusion = np.eye(len(AWKWARD), dtype=np.int64)
    content = draw_confusion(confusion, AWKWARD, suffix)
    if suffix == ".svg":
        assert {
            "cat | dog",
            "# x",
            "<b> & 'c'",
            "$a$ \\frac",
            "猫 😀",
            "a b\N{REPLACEMENT CHARACTER}",
        } <= (set(texts(content)))
    else:
        assert content.startswith(b"\x89PNG")


def test_a_long_name_is_cut_short():
    words = texts(draw_confusion(np.array([[1, 0], [0, 1]]), ("x" * 90, "y"), ".svg"))
    assert "x" * 27 + "…" in words


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_figures_give_the_same_picture(suffix):
    assert draw_history(REPORTS, suffix) == draw_history(REPORTS, suffix)
    drawn = [draw_confusion(CONFUSION, LABELS, suffix) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_drawing_leaves_pyplot_and_its_settings_alone():
    code = (
        "import sys, matplotlib\n"
        "keys = 'font.family', 'font.size', 'svg.fonttype', 'text.parse_math'\n"
        "before = [matplotlib.rcParams[key] for key in keys]\n"
        "from coat_deploy.train.curves import draw_history\n"
        "from coat_deploy.train.progress import EpochReport\n"
        "draw_history([EpochReport(1, 1, 1, 1.0, 0.1, 1.0, 0.0, 0.0, 1.0)], '.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert [matplotlib.rcParams[key] for key in keys] == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("suffix", [".pdf", "", "svg"])
def test_another_suffix_is_refused(suffix):
    with pytest.raises(UsageError, match=r"expected \.png or \.svg"):
        draw_history(REPORTS, suffix)
    with pytest.raises(UsageError, match=r"expected \.png or \.svg"):
        draw_confusion(CONFUSION, LABELS, suffix)


def test_without_matplotlib_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendMissing, match=r'pip install "coat-deploy\[plot\]"'):
        draw_history(REPORTS, ".svg")
