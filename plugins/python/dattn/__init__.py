"""dattn: exact attention whose heads and sequence are sharded over many ranks.

`import dattn.torch` is the PyTorch plugin. This module needs nothing but Python: the version and the exceptions."""
from dattn._c import BadInput, Error, InternalError, PeerLost, SystemRefused, library_path, library_version

__version__ = "0.1.0"
__all__ = ["BadInput", "Error", "InternalError", "PeerLost", "SystemRefused", "library_path", "library_version"]
