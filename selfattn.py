"""The name of the distribution is no package; whoever imports it is told which ones there are."""

raise ImportError(
    "selfattn is what pip installs, and nothing to import. The layer is in selfattn_torch, selfattn_keras and "
    "selfattn_flax; attention on arrays in selfattn_ops; the definition in numpy, files, porting and conformance in "
    "selfattn_core. The command is `selfattn`, or `python -m selfattn_core`.",
    name="selfattn",
)
