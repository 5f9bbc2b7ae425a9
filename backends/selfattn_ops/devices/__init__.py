"""The devices of each framework and how to measure their memory, for the built-in backends of the conformance kit.

The layers do not need this package. To print the devices that a framework finds:

    python -m selfattn_ops.devices torch
"""
