"""Singular values over training as GIFs: what a frame shows, and what is asked of the rows."""

import sys

import pytest

from gammabeta import _runs, cli
from gammabeta.report import _animation

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

STEPS = (0, 10, 100, 1000)


def value_of(layer, norm, step, percent, seed):
    """Grows with the step, and far beyond 1."""
    return (0.3 + layer * percent / 50 + step / 500) * (2 if norm == "bn" else 1) + 0.1 * seed


def store(run, *, places=tuple(_animation.SHOWN), data="mnist", steps=STEPS, budget="small"):
    for layer, activation in places:
        for norm in _animation.NORMS:
            for seed in (0, 1):
                spec = {
                    "schema": _runs.SCHEMA,
                    "experiment": "jacobian",
                    "arm": {"activation": activation, "norm": norm, "layer": layer},
                    "seed": seed,
                    "budget": budget,
                    "data": {"name": data, "digest": "0123456789abcdef"},
                    "code": "fedcba9876543210",
                    "versions": {"gammabeta": "0", "torch": "0", "python": "0"},
                }
                rows = [
                    {
                        "kind": "spectrum",
                        "step": step,
                        "x": float(percent),
                        "y": value_of(layer, norm, step, percent, seed),
                    }
                    for step in steps
                    for percent in range(5, 100, 5)
                ]
                _runs.write_cell(run, spec, rows, "")
    return run


def found(run):
    return _animation.animations(_runs.read_cells([run]))


def colored(frame, color):
    """Pixels of a color: (x, y)."""
    wanted = tuple(int(color[k : k + 2], 16) for k in (1, 3, 5))
    picture = frame.convert("RGB")
    near = [
        (x, y)
        for x in range(picture.width)
        for y in range(picture.height)
        if all(abs(a - b) < 25 for a, b in zip(picture.getpixel((x, y)), wanted, strict=True))
    ]
    assert near
    return near


def test_a_file_for_each_layer_with_a_frame_for_each_step(tmp_path):
    files = _animation.write([store(tmp_path / "run")], tmp_path / "out" / "values.gif")
    assert [file.name for file in files] == [
        "values-layer-1-relu.gif",
        "values-layer-2-sigmoid.gif",
    ]
    for file in files:
        with Image.open(file) as gif:
            assert gif.n_frames == len(STEPS)
            assert gif.size == _animation.SIZE
            assert gif.info["loop"] == 0
        assert file.stat().st_size < 300_000


def test_both_arms_stand_side_by_side_on_axes_that_hold_everything(tmp_path):
    animation, _ = found(store(tmp_path / "run"))
    assert animation.steps == list(STEPS)
    assert animation.largest == pytest.approx(value_of(1, "bn", 1000, 95, 1))
    boxes = _animation.boxes(animation.largest)
    left, right = boxes["bn"], boxes["none"]
    assert left.right < right.left
    assert (left.top, left.bottom, left.largest) == (right.top, right.bottom, right.largest)
    assert left.largest >= animation.largest > 1
    assert left.at(50, 2.0)[1] == right.at(50, 2.0)[1]
    for norm, box in boxes.items():
        for step in STEPS:
            for percent in range(5, 100, 5):
                _, y = box.at(percent, value_of(1, norm, step, percent, 1))
                assert box.top <= y < box.bottom, "nothing is cut off"


def test_each_half_draws_its_own_curve_where_its_values_are(tmp_path):
    animation, _ = found(store(tmp_path / "run"))
    boxes = _animation.boxes(animation.largest)
    for step, frame in zip(animation.steps, _animation.frames(animation), strict=True):
        for norm, box in boxes.items():
            pixels = colored(frame, _animation.COLORS[norm])
            assert all(box.left <= x <= box.right for x, _ in pixels)
            tops = sum(value_of(1, norm, step, 95, seed) for seed in (0, 1)) / 2
            assert min(y for _, y in pixels) == pytest.approx(box.at(95, tops)[1] - 3, abs=2)


def test_the_title_of_a_frame_tells_its_step(tmp_path, monkeypatch):
    drawn = []
    from PIL import ImageDraw

    text = ImageDraw.ImageDraw.text

    def note(self, place, words, *more, **options):
        drawn.append(words)
        return text(self, place, words, *more, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    animation, _ = found(store(tmp_path / "run"))
    _animation.frames(animation)
    titles = [words for words in drawn if "step" in words]
    assert [t.split("step ")[1] for t in titles] == ["0", "10", "100", "1,000"]
    assert all(t.startswith("Layer 1, ReLU") for t in titles)
    assert "On MNIST, budget small, 2 seeds: mean and range." in drawn


def test_cells_of_different_kinds_are_not_mixed(tmp_path):
    run = store(tmp_path / "run")
    alone = found(run)
    store(run, data="digits", steps=(0, 7))
    store(run, budget="tiny", steps=(0, 3))
    assert found(run) == alone
    assert found(store(tmp_path / "digits", data="digits"))[0].where.startswith("the bundled")


def test_what_has_one_arm_or_one_step_is_no_animation(tmp_path):
    assert found(store(tmp_path / "short", steps=(0,))) == []
    run = store(tmp_path / "run", places=[(1, "relu")])
    assert [a.title for a in found(run)] == ["Layer 1, ReLU"]
    assert found(store(tmp_path / "other", places=[(2, "relu")])) == []


def test_the_command_prints_its_files_or_says_what_is_missing(tmp_path, monkeypatch, capsys):
    def call(*words):
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", *map(str, words)])
        return ended.value.code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    run = store(tmp_path / "run", places=[(1, "relu")])
    assert call(run, "--format", "gif") == (0, "report-layer-1-relu.gif\n", "")
    code, _, err = call(run, "--format", "gif", "-o", "v.gif")
    assert (code, err) == (0, "")
    assert (tmp_path / "v-layer-1-relu.gif").is_file()
    code, out, err = call(store(tmp_path / "other", places=[(2, "relu")]), "--format", "gif")
    assert (code, out) == (2, "")
    assert "have none" in err
    assert "gammabeta study run" in err
    monkeypatch.setitem(sys.modules, "PIL", None)  # importing it now fails
    code, out, err = call(run, "--format", "gif")
    assert (code, out) == (2, "")
    assert err == _animation.INSTALL + "\n"
    assert "[animation]" in err
