"""The name of the distribution, which is not a package: importing it names the packages to import."""

raise ImportError(
    "pip installs selfattn under other names: import selfattn_torch, selfattn_keras or selfattn_flax for the layer, "
    "selfattn_ops for attention on arrays, and selfattn_core for the definition in numpy, files, porting and "
    "conformance. The command is `selfattn`, or `python -m selfattn_core`.",
    name="selfattn",
)
