"""Attention maps as pictures: the figure of the SAGAN paper, and an animation of it over training steps.

Maps, statistics and coordinates come from `selfattn_core.maps`. You can import its names from here too.

Drawing needs matplotlib (`pip install 'selfattn[viz]'`), which is imported inside the calls. Figures are
`matplotlib.figure.Figure` objects. No window opens, and matplotlib's global state (pyplot, backend, style) does not change.

Source: Zhang et al., "Self-Attention Generative Adversarial Networks", 2018, figures 1 and 5.
"""

from selfattn_core.maps import (
    SMALL_GAMMA,
    MapStatistics,
    effect_warning,
    map_statistics,
    position_of,
    unflatten,
    upsample,
)
from selfattn_core.viz.animation import save_animation
from selfattn_core.viz.figure import attention_figure, draw_attention, rows_figure
from selfattn_core.viz.panels import COLOURS
from selfattn_core.viz.saving import format_of, save_figure

__all__ = [
    "COLOURS",
    "SMALL_GAMMA",
    "MapStatistics",
    "attention_figure",
    "draw_attention",
    "effect_warning",
    "format_of",
    "map_statistics",
    "position_of",
    "rows_figure",
    "save_animation",
    "save_figure",
    "unflatten",
    "upsample",
]
