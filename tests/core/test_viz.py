"""Numbers and pictures of a map: orientation at H ≠ W, pooling with odd sizes, and what bad input gets."""

import subprocess
import sys

import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig, maps, parameter_table, spec, viz

H, W, POOL = 5, 8, 2
KEYS = (2, 4)
IMAGE = np.linspace(0, 1, 20 * 48).reshape(20, 48)  # 4×6 pixels a position
EPS = np.finfo(np.float64).eps
UNEVEN = np.random.default_rng(5).dirichlet(np.full(H * W, 0.1), H * W).reshape(H, W, H, W)


def planted(height=H, width=W, pool=1):
    """Every position attends to the key at its mirror image, and to nothing else."""
    keys = (height // pool, width // pool)
    grid = np.zeros((height, width, *keys))
    for h in range(height):
        for w in range(width):
            grid[
                h, w, min((height - 1 - h) // pool, keys[0] - 1), min((width - 1 - w) // pool, keys[1] - 1)
            ] = 1
    return grid


def drawn_weights(figure, panel):
    """The opacity of the colour over a panel: the weights as the picture shows them."""
    return figure.axes[panel].images[-1].get_array()[..., 3]


def test_a_map_of_the_definition_is_unflattened_in_its_orientation():
    config = SelfAttentionConfig(8, 3, kv_pool=POOL)
    generator = np.random.default_rng(0)
    params = {name: generator.standard_normal(row.shape) for name, row in parameter_table(config).items()}
    x = generator.standard_normal((3, H, W, 8))
    grid = maps.unflatten(spec.attention_map(config, params, x), H, W, kv_pool=POOL)
    assert grid.shape == (3, H, W, *KEYS)
    query = x[2, 3, 6] @ params["query.kernel"] + params["query.bias"]
    windows = (x[2] @ params["key.kernel"] + params["key.bias"])[: KEYS[0] * POOL]
    key = windows.reshape(KEYS[0], POOL, KEYS[1], POOL, -1).max(axis=(1, 3))
    weights = np.exp(key @ query)
    np.testing.assert_allclose(grid[2, 3, 6], weights / weights.sum(), rtol=64 * EPS)


@pytest.mark.parametrize("shape", [(H * W, H * W + 1), (W, H), (H * W, 8)])
def test_a_map_of_other_sizes_is_not_unflattened(shape):
    with pytest.raises(ValueError, match=r"expected \(…, 40, 40\) for a feature map of 5×8"):
        maps.unflatten(np.zeros(shape), H, W)


def test_statistics_of_a_map_that_attends_to_one_key():
    statistics = maps.map_statistics(planted())
    assert (statistics.entropy == 0).all()
    assert (statistics.effective_size == 1).all()
    assert (statistics.peak == 1).all()
    assert statistics.mean_distance[0, 0] == pytest.approx(np.hypot(H - 1, W - 1))
    assert statistics.mean_distance[2, 6] == 5


def test_statistics_of_a_pooled_map_measure_from_the_middle_of_the_window():
    grid = np.zeros((H, W, *KEYS))
    grid[..., 1, 3] = 0.75  # covers rows 2 and 3, columns 6 and 7
    grid[..., 0, 0] = 0.25  # covers rows 0 and 1, columns 0 and 1
    statistics = maps.map_statistics(grid, kv_pool=POOL)
    assert statistics.mean_distance[4, 1] == pytest.approx(
        0.75 * np.hypot(4 - 2.5, 1 - 6.5) + 0.25 * np.hypot(4 - 0.5, 1 - 0.5)
    )
    assert statistics.effective_size[0, 0] == pytest.approx(0.75**-0.75 * 0.25**-0.25)


def test_statistics_of_a_batch():
    grids = np.stack([planted(), np.full((H, W, H, W), 1 / (H * W))])
    statistics = maps.map_statistics(grids)
    assert statistics.effective_size.shape == (2, H, W)
    np.testing.assert_allclose(statistics.effective_size[1], H * W)


def test_every_pixel_belongs_to_one_position():
    found = np.array([[maps.position_of((y, x), (20, 48), (H, W)) for x in range(48)] for y in range(20)])
    assert (found[..., 0] == np.repeat(np.arange(H), 4)[:, None]).all()
    assert (found[..., 1] == np.repeat(np.arange(W), 6)).all()


def test_upsampling_keeps_places_and_levels():
    weights = np.zeros((H, W))
    weights[1, 6] = 1
    large = maps.upsample(weights, (20, 48), (H, W))
    y, x = np.unravel_index(large.argmax(), large.shape)
    assert maps.position_of((y, x), (20, 48), (H, W)) == (1, 6)
    assert 0.7 < large.max() <= 1
    np.testing.assert_allclose(maps.upsample(np.full((H, W), 0.3), (20, 48), (H, W)), 0.3)
    np.testing.assert_array_equal(maps.upsample(weights, (H, W), (H, W)), weights)


def test_upsampling_leaves_out_what_no_window_covers():
    large = maps.upsample(np.ones(KEYS), (20, 48), (H, W), kv_pool=POOL)
    assert np.isnan(large[16:]).all()
    assert (large[:16] == 1).all()


@pytest.mark.parametrize(("pool", "point"), [(1, (17, 3)), (1, (2, 45)), (POOL, (2, 45)), (POOL, (17, 3))])
def test_the_picture_shows_each_point_its_own_map_the_right_way_round(pool, point):
    figure = viz.attention_figure(IMAGE, planted(pool=pool), [(9, 20), point], kv_pool=pool)
    y, x = np.unravel_index(drawn_weights(figure, 2).argmax(), IMAGE.shape)
    h, w = maps.position_of(point, IMAGE.shape, (H, W))
    mirror = maps.position_of((y, x), IMAGE.shape, (H, W))
    expected = [min(side - 1 - place, side // pool * pool - 1) // pool for side, place in ((H, h), (W, w))]
    assert [place // pool for place in mirror] == expected


def test_the_picture_has_the_colour_of_the_point_in_both_places():
    from matplotlib.colors import to_hex

    figure = viz.attention_figure(IMAGE, planted(), [(1, 2), (18, 40)])
    for index in range(2):
        colour = viz.COLOURS[index].lower()
        image, panel = figure.axes[0], figure.axes[1 + index]
        assert to_hex(image.lines[index].get_color()) == colour
        assert to_hex(panel.lines[0].get_color()) == colour
        assert to_hex(panel.images[-1].get_array()[0, 0, :3]) == colour
        assert {to_hex(spine.get_edgecolor()) for spine in panel.spines.values()} == {colour}
        (x,), (y,) = image.lines[index].get_data()
        assert (y, x) == [(1, 2), (18, 40)][index]


@pytest.mark.parametrize("kind", ["protan", "deutan", "tritan"])
def test_the_colours_stay_apart_with_colour_blindness(kind):
    """Source: Machado et al., 2009, table of severity 1."""
    matrices = {
        "protan": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deutan": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        "tritan": [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ],
    }
    from matplotlib.colors import to_rgb

    linear = np.array([to_rgb(colour) for colour in viz.COLOURS]) ** 2.2
    seen = (linear @ np.array(matrices[kind]).T).clip(0, 1) ** (1 / 2.2)
    gaps = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(len(seen), 1)]
    assert gaps.min() > 0.1


@pytest.mark.parametrize(
    ("gamma", "message"), [(0.0, "gamma = 0: the map has no effect"), (-2e-4, "next to no effect")]
)
def test_a_map_without_effect_is_warned_of_and_the_picture_says_so(gamma, message):
    with pytest.warns(UserWarning, match=message) as caught:
        figure = viz.attention_figure(IMAGE, planted(), [(0, 0)], gamma=gamma)
    assert caught[0].filename == __file__
    assert message in figure.get_suptitle()


def test_a_map_with_effect_is_not_warned_of():
    assert "-0.250" in viz.attention_figure(IMAGE, planted(), [(0, 0)], gamma=-0.25).get_suptitle()


def test_exchanged_sides_are_warned_of():
    with pytest.warns(UserWarning, match="transposed"):
        viz.attention_figure(IMAGE.T, planted(), [(0, 0)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"points": [(0, 0), (20, 3), (5, -1)]},
            "points y=20, x=3, y=5, x=-1 outside the image; expected y from 0 to 19 and x from 0 to 47",
        ),
        ({"points": []}, "got 0 points; expected 1 to 6"),
        ({"points": [(0, 0)] * 7}, "got 7 points"),
        ({"image": np.zeros((20, 48, 2))}, "image of shape"),
        ({"image": IMAGE * 255}, "not within 0 to 1"),
        ({"image": np.full((20, 48), np.nan)}, "not within 0 to 1"),
        ({"image": np.zeros((20, 48), np.int64)}, "dtype int64"),
        ({"grid": np.zeros((H * W, H * W))}, "got a map of shape"),
        ({"grid": planted(pool=2)}, "pass the layer's kv_pool"),
        ({"grid": planted() * np.nan}, "NaN"),
        ({"grid": planted() / 2}, "rows sum to 0.5 to 0.5"),
        ({"grid": UNEVEN.transpose(2, 3, 0, 1)}, "is it transposed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_drawn_is_refused(changes, message):
    arguments = {"image": IMAGE, "grid": planted(), "points": [(0, 0)]} | changes
    with pytest.raises(ValueError, match=r"attention_figure") as caught:
        viz.attention_figure(**arguments)
    assert message in str(caught.value)


def test_all_problems_are_said_at_once():
    with pytest.raises(ValueError, match=r"outside the image.*kv_pool"):
        viz.attention_figure(IMAGE, planted(pool=2), [(99, 0)])


@pytest.mark.parametrize(
    "image", [np.zeros((20, 48, 3), np.uint8), np.ones((20, 48, 4)), np.ones((20, 48, 1), np.float32)]
)
def test_images_of_every_kind_are_drawn(image):
    assert viz.attention_figure(image, planted(), [(0, 0)]).axes[0].images[0].get_array().shape[:2] == (
        20,
        48,
    )


def test_a_large_picture_is_drawn_with_fewer_pixels_in_the_same_places():
    large = np.zeros((1500, 2400), np.uint8)  # 300×300 pixels a position
    figure = viz.attention_figure(large, planted(), [(400, 2000)])  # position (1, 6), which attends to (3, 1)
    for panel in (0, 1):
        for drawn in figure.axes[panel].images:
            assert max(drawn.get_array().shape) < 1024
            assert drawn.get_extent() == pytest.approx((-0.5, 2399.5, 1499.5, -0.5), abs=4)
    y, x = np.unravel_index(drawn_weights(figure, 1).argmax(), drawn_weights(figure, 1).shape)
    rows, columns = drawn_weights(figure, 1).shape
    assert maps.position_of((y, x), (rows, columns), (H, W)) == (3, 1)


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_figure_is_written_and_not_over_another(suffix, tmp_path):
    figure = viz.attention_figure(IMAGE, planted(), [(0, 0)])
    path = tmp_path / f"map.{suffix}"
    viz.save_figure(figure, path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite"):
        viz.save_figure(figure, path)
    assert path.read_bytes() == before
    assert [path] == list(tmp_path.iterdir())


def test_a_suffix_that_nothing_writes(tmp_path):
    with pytest.raises(ValueError, match=r"got the suffix '.txt'; expected one of .*\.png"):
        viz.save_figure(viz.attention_figure(IMAGE, planted(), [(0, 0)]), tmp_path / "map.txt")


def test_the_animation_has_a_frame_for_each_step_and_one_scale(tmp_path):
    from PIL import Image

    path = tmp_path / "maps.gif"
    faint = np.full((H, W, H, W), 1 / (H * W))
    viz.save_animation(
        path, [IMAGE], [faint, planted(), faint], [(2, 3)], titles=["a", "b", "c"], gammas=[0.0, 0.1, 0.2]
    )
    with Image.open(path) as movie:
        assert movie.n_frames == 3
        frames = []
        for index in range(3):
            movie.seek(index)
            frames.append(np.asarray(movie.convert("RGB"), np.float64))
    # Where the sharp map is one and the faint one a fortieth, faint colours stay faint: the scale is common.
    blue = [frame[..., 2].mean() - frame[..., 0].mean() for frame in frames]
    assert blue[0] < blue[1]
    with pytest.raises(FileExistsError):
        viz.save_animation(path, [IMAGE], [faint], [(2, 3)], titles=["a"])


def test_an_animation_of_uneven_lists_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got 2 grids, 2 images, 1 titles, 2 gammas"):
        viz.save_animation(tmp_path / "a.gif", [IMAGE], [planted()] * 2, [(0, 0)], titles=["a"])
    assert not list(tmp_path.iterdir())


SCRIPT = """
import sys, matplotlib, numpy as np
from selfattn_core import viz
# Reading the backend by its key would make matplotlib choose one.
settings = lambda: {key: matplotlib.rcParams._get(key) for key in matplotlib.rcParams}
before = settings()
figure = viz.attention_figure(np.eye(4), np.full((2, 2, 2, 2), 0.25), [(0, 3)])
viz.save_figure(figure, sys.argv[1])
print("matplotlib.pyplot" in sys.modules, before == settings())
"""


def test_pyplot_and_its_settings_are_left_alone(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "a.png")], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "True"]


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("selfattn_core.installed.missing_modules", list)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'selfattn\[viz\]'"):
        viz.attention_figure(IMAGE, planted(), [(0, 0)])
