"""The input, outputs, layout and sizes of a file: found by their shapes, or chosen by the user."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.case import Layout
from selfattn_core.verifying.artifact import Tensor
from selfattn_core.verifying.errors import VerifyError
from selfattn_core.verifying.process import Description

__all__ = ["LAYOUTS", "Signature", "signature"]

LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Signature:
    """The chosen input and outputs of a file.

    Args:
        x: the input.
        y: name of the output y.
        attention: name of the output with the map, or None if there is no map.
        layout: layout of x and y.
        sizes: (B, H, W), with None for an open size.
    """

    x: Tensor
    y: str
    attention: str | None
    layout: Layout
    sizes: tuple[int | None, int | None, int | None]


def signature(
    artifact: str,
    described: Description,
    config: SelfAttentionConfig,
    *,
    input_name: str | None = None,
    output_name: str | None = None,
    map_name: str | None = None,
    layout: Layout | None = None,
) -> Signature:
    """Choose input, outputs and layout.

    Args:
        artifact: name of the file for messages.
        described: description of the file.
        config: config of the weights.
        input_name: name of the input, if there are several.
        output_name: name of y, if several outputs could be y.
        map_name: name of the map, if its shape does not determine it.
        layout: layout of x and y, if their shapes do not determine it.

    Raises:
        VerifyError: if something is missing, ambiguous or does not fit the config. It lists every problem, and the inputs
            and outputs of the file.
    """
    problems: list[str] = []
    x = _input(described.inputs, input_name, problems)
    found: Layout | None = None
    if x is not None:
        if x.dtype not in _FLOATS:
            problems.append(
                f"input {x} is not floating-point; export with inputs and outputs of float32, whatever the weights are"
            )
        found = _layout(x, config, layout, problems)
    y, attention = _outputs(described.outputs, x, output_name, map_name, problems)
    if problems or x is None or found is None or y is None:
        has = [f"inputs {', '.join(map(str, described.inputs)) or 'none'}"]
        has += [f"outputs {', '.join(map(str, described.outputs)) or 'none'}"]
        raise VerifyError(f"{artifact}: {'; '.join(problems)}. The file has {' and '.join(has)}.")
    return Signature(x, y, attention, found, _sizes(x, found))


def _input(inputs: Sequence[Tensor], name: str | None, problems: list[str]) -> Tensor | None:
    if name is not None:
        chosen = next((each for each in inputs if each.name == name), None)
        if chosen is None:
            problems.append(f"there is no input {name!r}")
        elif len(inputs) > 1:
            others = ", ".join(each.name for each in inputs if each is not chosen)
            problems.append(f"beside {name!r} it takes {others}; expected one input, the feature maps")
        return chosen
    if len(inputs) != 1:
        problems.append(
            f"it takes {len(inputs)} inputs; expected one, the feature maps: export the layer with its weights inside"
        )
        return None
    return inputs[0]


def _layout(
    x: Tensor, config: SelfAttentionConfig, given: Layout | None, problems: list[str]
) -> Layout | None:
    if x.shape is None:
        if given is None:
            problems.append(
                f"the shape of input {x.name} is not known; pass the layout, one of {', '.join(LAYOUTS)}"
            )
        return given
    if len(x.shape) != 4:
        problems.append(f"input {x} has {len(x.shape)} axes; expected 4, as (B, H, W, C) or (B, C, H, W)")
        return None
    axes: dict[Layout, int | None] = {"channels_last": x.shape[3], "channels_first": x.shape[1]}
    possible = [layout for layout, size in axes.items() if size in (None, config.channels)]
    if given is not None and given not in possible:
        problems.append(
            f"in {given} input {x} has {axes[given]} channels, but the weights are for {config.channels}"
        )
        return None
    certain = [layout for layout in possible if axes[layout] == config.channels]
    other = [size for size in axes.values() if size not in (None, config.channels)]
    # If only one axis has a fixed size, it is the channels axis, so a different size belongs to a different layer.
    if not possible or (given is None and not certain and other):
        problems.append(f"input {x} has no axis of {config.channels} channels, which the weights are for")
        return None
    choices = [given] if given is not None else certain or possible
    if len(choices) > 1:
        problems.append(f"input {x} could have either layout; pass the layout, one of {', '.join(LAYOUTS)}")
        return None
    return choices[0]


def _outputs(
    outputs: Sequence[Tensor],
    x: Tensor | None,
    output_name: str | None,
    map_name: str | None,
    problems: list[str],
) -> tuple[str | None, str | None]:
    names = [each.name for each in outputs]
    for name in (output_name, map_name):
        if name is not None and name not in names:
            problems.append(f"there is no output {name!r}")
            return None, None
    rest = [each for each in outputs if each.name != map_name]
    if output_name is None:
        # A single output needs no known shape. Among several, y is the one with the shape of x.
        like = rest if len(rest) == 1 else [each for each in rest if _fits(each, x)]
        if len(like) != 1:
            problems.append(f"{'several outputs' if like else 'no output'} could be y; name it as output")
            return None, map_name
        output_name = like[0].name
    if map_name is None:
        maps = [each for each in outputs if each.name != output_name and len(each.shape or ()) == 3]
        map_name = maps[0].name if len(maps) == 1 else None
    return output_name, map_name


def _fits(output: Tensor, x: Tensor | None) -> bool:
    """Whether an output may have the shape of x."""
    if x is None or x.shape is None or output.shape is None:
        return output.shape is None or len(output.shape) == 4
    if len(output.shape) != len(x.shape):
        return False
    pairs = zip(output.shape, x.shape, strict=True)
    return all(one is None or other is None or one == other for one, other in pairs)


def _sizes(x: Tensor, layout: Layout) -> tuple[int | None, int | None, int | None]:
    if x.shape is None:
        return None, None, None
    batch, height, width = (
        (x.shape[0], x.shape[1], x.shape[2])
        if layout == "channels_last"
        else (x.shape[0], x.shape[2], x.shape[3])
    )
    return batch, height, width
