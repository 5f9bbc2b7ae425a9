"""A probe: one question of the search, with everything that a case of the table fixes."""

from dataclasses import dataclass

from selfattn_core.config import SelfAttentionConfig

__all__ = ["ASKS", "STEP_PLACES", "Probe", "Step"]

ASKS = (
    "forward",
    "vjp",
    "map",
    "r1",
    "mixed",
    "per_sample",
    "compiled_forward",
    "compiled_vjp",
    "training_pass",
    "training_vjp",
    "params",
    "saved",
    "updated",
    "refilled",
    "permuted",
    "alone",
    "doubled",
    "shifted",
    "together",
    "often",
    "worn",
)
"""What a step may ask.

- "forward" to "per_sample" call the method of that ability. "compiled_forward" and "compiled_vjp" do so on the compiled
  model, and "training_pass" and "training_vjp" in training mode.
- "params" reads the weights, and then overwrites the arrays that it received. They are the caller's.
- "saved" replaces the layer by one from a file, and "updated" gives the layer other weights. Later steps ask the new layer.
- "refilled" calls `forward` twice with one array, whose numbers are others the second time.
- "permuted" exchanges positions, "alone" asks for one sample of the batch, "doubled" doubles the value projection, and
  "shifted" adds a constant to the key bias. The definition says what each gives.
- "together" calls `forward` in two threads at once, with both inputs. "often" calls it thousands of times, and "worn" after a
  thousand updates with the weights of both layers, of which the last are the layer's own.
"""

STEP_PLACES = ("", "input", "layer")
"""Where a step asks: the first layer and input, the same layer with the other input, or another layer of the same form."""


@dataclass(frozen=True)
class Step:
    """One call of a probe.

    Args:
        ask: one of `ASKS`.
        place: one of `STEP_PLACES`.
    """

    ask: str
    place: str = ""

    @property
    def words(self) -> str:
        """The step in a token, such as "vjp" or "forward@input"."""
        return f"{self.ask}@{self.place}" if self.place else self.ask


@dataclass(frozen=True)
class Probe:
    """A layer, its inputs, and calls in an order. Equal probes have equal inputs on every machine.

    Args:
        steps: the calls, in order.
        channels: C.
        qk: Dk.
        value: Dv. Without an out projection it is C.
        out: whether there is an out projection.
        bias: whether there are biases.
        pool: the side of a pooling window.
        norm: whether there is spectral norm.
        batch: B.
        height: H.
        width: W.
        other: (B, H, W) of the other input.
        dtype: the dtype of the computation.
        layout: the layout of the computation.
        seed: the seed of all numbers.
        logits: the standard deviation of the entries of q kᵀ, before `key_mean` and `query_mean`.
        gamma: the learned gain.
        x_scale: the scale of x, as a power of two. The weights of query and key make up for it.
        dy_scale: the scale of dy, as a power of two.
        value_scale: the scale of the value projection, as a power of two.
        balance: the scale of the query as a power of two. The key makes up for it.
        x_mean: the mean of x, as a multiple of its scale.
        key_mean: a constant in each key bias, as a multiple of its scale. It moves all scores of a row alike.
        query_mean: a constant in each query bias, as a multiple of its scale.
        zero_biases: whether all biases are zero, as in a new layer.
        rows: "equal" gives all positions the same numbers, and "repeated" the second half those of the first half.
            "integers" makes x and weights multiples of a power of two, so that pooling windows contain equal values.
            "positive" makes x, dy and the weights of value and out positive.
        x_view: the memory of x. "still" is one number for a whole map, with strides of 0.
        dy_view: the memory of dy. "still" is what the sum of y hands over: one number, with strides of 0.
        state: with spectral norm, how u and v are made: "scaled" (u does not have unit length), "unit", or "random" (they
            belong to no iteration).
        sigma: the scale of raw kernels with spectral norm, as a power of two.
        zero: the projection whose kernel is zero. Empty for none.
        poison: "x" or "dy" gets one NaN. Empty for none.
    """

    steps: tuple[Step, ...] = (Step("forward"),)
    channels: int = 3
    qk: int = 2
    value: int = 3
    out: bool = False
    bias: bool = True
    pool: int = 1
    norm: bool = False
    batch: int = 2
    height: int = 2
    width: int = 3
    other: tuple[int, ...] = (1, 3, 2)
    dtype: str = "float32"
    layout: str = "channels_last"
    seed: int = 0
    logits: float = 3.0
    gamma: float = 0.7
    x_scale: int = 0
    dy_scale: int = 0
    value_scale: int = 0
    balance: int = 0
    x_mean: float = 0.0
    key_mean: float = 0.0
    query_mean: float = 0.0
    zero_biases: bool = False
    rows: str = ""
    x_view: str = ""
    dy_view: str = ""
    state: str = "scaled"
    sigma: int = 0
    zero: str = ""
    poison: str = ""

    @property
    def config(self) -> SelfAttentionConfig:
        """The layer.

        Raises:
            ValueError: if the sizes do not make a layer.
        """
        return SelfAttentionConfig(
            self.channels,
            self.qk,
            self.value,
            out_projection=self.out,
            use_bias=self.bias,
            kv_pool=self.pool,
            spectral_norm=self.norm,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, H, W) of the input."""
        return self.batch, self.height, self.width

    @property
    def other_shape(self) -> tuple[int, int, int]:
        """(B, H, W) of the other input."""
        batch, height, width = self.other
        return batch, height, width

    @property
    def words(self) -> str:
        """The probe for a person.

        Example:
            >>> Probe().words
            'forward; C=3, Dk=2, Dv=3; 2×2×3; float32, channels_last'
        """
        form = [f"C={self.channels}", f"Dk={self.qk}", f"Dv={self.value}"]
        form += [f"kv_pool={self.pool}"] if self.pool > 1 else []
        form += [
            words
            for words, there in (
                ("out projection", self.out),
                ("no biases", not self.bias),
                ("spectral norm", self.norm),
            )
            if there
        ]
        calls = ", ".join(step.words for step in self.steps)
        sizes = "×".join(map(str, self.shape))
        return f"{calls}; {', '.join(form)}; {sizes}; {self.dtype}, {self.layout}"
