"""The file formats of figures, and writing a figure."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from selfattn_core.files.writing import write_atomically
from selfattn_core.installed import require
from selfattn_core.weights import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["format_of", "save_figure"]

_NO_TRANSPARENCY = "PostScript has no transparency, which the heat maps need; .pdf is as good for print"
_UNSUITED = {
    "eps": _NO_TRANSPARENCY,
    "ps": _NO_TRANSPARENCY,
    "pgf": "a drawing for LaTeX keeps its images in separate files; LaTeX accepts .pdf",
}
"""Formats that matplotlib can write, but that do not suit these figures, with the reason."""


def format_of(path: PathLike) -> str:
    """Matplotlib's name of the format that the suffix of a picture's name selects.

    Args:
        path: name with the suffix .png, .pdf, .svg, .jpg or another that matplotlib writes here.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if these figures cannot be written in this format.

    Example:
        >>> format_of("Map.PNG")
        'png'
        >>> format_of("map.eps")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: map.eps: got the suffix '.eps'; PostScript has no transparency, ... expected one of ...
    """
    require("selfattn_core.viz", ["matplotlib"], "viz")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import features

    known = set(FigureCanvasAgg.get_supported_filetypes()) - set(_UNSUITED)
    # A build of Pillow may lack these.
    known -= {name for name in ("webp", "avif") if not features.check(name)}
    path = Path(path)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in known:
        reason = f" {_UNSUITED[suffix]};" if suffix in _UNSUITED else ""
        raise ValueError(
            f"{path}: got the suffix {path.suffix!r};{reason} expected one of "
            f"{', '.join(f'.{name}' for name in sorted(known))}."
        )
    return suffix


def save_figure(figure: "Figure", path: PathLike, *, overwrite: bool = False) -> None:
    """Write a figure in the format of the suffix.

    Args:
        figure: the figure.
        path: path with a suffix for `format_of`. Its folder must exist.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False. The file stays unchanged.
        OSError: if the file cannot be written.
        ValueError: see `format_of`. PostScript would lose the heat maps' transparency, and with it the weights.

    Example:
        >>> import tempfile
        >>> from matplotlib.figure import Figure
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_figure(Figure(), f"{folder}/map.png")
        ...     Path(f"{folder}/map.png").read_bytes()[1:4]
        b'PNG'
    """
    content = io.BytesIO()
    figure.savefig(content, format=format_of(path))
    write_atomically(Path(path), content.getvalue(), overwrite=overwrite)
