"""What each framework says about its devices, one file a framework; the adapters' backends of the conformance kit use it.

    python -m selfattn_ops.devices torch

prints what the framework sees. Nothing here is needed to use a layer.
"""
