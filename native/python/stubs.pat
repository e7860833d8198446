# What nanobind's stub generator is to write of `_native` beside what the bindings say.
_native.__prefix__:
    \from typing import Any, Protocol, TypeAlias
    \from numpy.typing import NDArray
    \from typing_extensions import Buffer
    class _DLPack(Protocol):
        """PyTorch tensors, JAX arrays."""
        def __dlpack__(self) -> Any: ...
    # NumPy declares its arrays to be buffers only from Python 3.12 on.
    _Array: TypeAlias = NDArray[Any] | Buffer | _DLPack
