"""An animated GIF of a map over the steps of a training."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.files.writing import write_atomically
from selfattn_core.installed import require
from selfattn_core.viz.drawing import draw, empty_figure
from selfattn_core.viz.panels import largest_weights, panels_of_grid
from selfattn_core.weights import PathLike

__all__ = ["save_animation"]


def save_animation(
    path: PathLike,
    images: Sequence[Array],
    grids: Sequence[Array],
    points: Sequence[tuple[int, int]],
    *,
    titles: Sequence[str],
    gammas: Sequence[float] | None = None,
    kv_pool: int = 1,
    milliseconds: int = 400,
    overwrite: bool = False,
) -> None:
    """Write an animated GIF of a map over training steps, one figure for each frame.

    Each point's colour scale is the same in all frames, so that you can see a map sharpen.

    Args:
        path: path of the .gif file. Its folder must exist.
        images: one image for each frame, or one for all, see `attention_figure`.
        grids: the map at each step, each (H, W, H', W').
        points: see `attention_figure`.
        titles: title of each frame, for example "step 400".
        gammas: the layer's gamma at each step. If it is about 0, the frame shows a note. There is no warning, because a
            training starts there.
        kv_pool: `kv_pool` of the layer's config.
        milliseconds: duration of each frame. The last frame stays four times as long.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False. The file stays unchanged.
        ModuleNotFoundError: if matplotlib is not installed.
        OSError: if the file cannot be written.
        ValueError: if there is no frame, the numbers of frames differ, or a frame cannot be drawn.

    Example:
        >>> import tempfile
        >>> grids = [np.full((2, 2, 2, 2), 0.25), np.eye(4).reshape(2, 2, 2, 2)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_animation(f"{folder}/maps.gif", [np.eye(4)], grids, [(0, 3)], titles=["step 0", "step 10"])
        ...     Path(f"{folder}/maps.gif").read_bytes()[:4]
        b'GIF8'
    """
    require("selfattn_core.viz", ["matplotlib"], "viz")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    path = Path(path)
    images = list(images) * len(grids) if len(images) == 1 else list(images)
    gains: Sequence[float | None] = [None] * len(grids) if gammas is None else gammas
    counts = {"grids": len(grids), "images": len(images), "titles": len(titles), "gammas": len(gains)}
    if not grids or len(set(counts.values())) > 1:
        raise ValueError(
            f"save_animation: got {', '.join(f'{count} {name}' for name, count in counts.items())}; expected one of each "
            "for every frame, and at least one frame."
        )
    drawn = [panels_of_grid(image, grid, points, kv_pool) for image, grid in zip(images, grids, strict=True)]
    largest = largest_weights(drawn)
    frames = []
    for panels, label, gain in zip(drawn, titles, gains, strict=True):
        figure = empty_figure(panels, 100)
        draw(figure, panels, gain, label, largest)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    content = io.BytesIO()
    frames[0].save(
        content,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[milliseconds] * (len(frames) - 1) + [4 * milliseconds],
        loop=0,
    )
    write_atomically(path, content.getvalue(), overwrite=overwrite)
