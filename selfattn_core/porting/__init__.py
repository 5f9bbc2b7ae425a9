"""Ports weights between other people's checkpoints and the files of all frameworks, exactly or with an error that explains."""

from selfattn_core.porting.errors import PortError, VerificationError
from selfattn_core.porting.formats import TensorInfo, Tensors, open_tensors
from selfattn_core.porting.formats.write import write_tensors
from selfattn_core.porting.inspect import InspectReport, inspect
from selfattn_core.porting.load import load
from selfattn_core.porting.port import port
from selfattn_core.porting.report import PortReport

__all__ = [
    "InspectReport",
    "PortError",
    "PortReport",
    "TensorInfo",
    "Tensors",
    "VerificationError",
    "inspect",
    "load",
    "open_tensors",
    "port",
    "write_tensors",
]
