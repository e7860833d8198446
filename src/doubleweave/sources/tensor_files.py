"""The tensors of a Hugging Face folder's weight files by name, each read when it is asked for.

Names lose the wrappers that training leaves in them (torch.compile, DataParallel, FSDP, Lightning). Knows nothing of
models.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doubleweave.errors import SourceError, first_line
from doubleweave.sources.saved_tensors import Saved, SavedTensors

# In the order in which transformers looks for them.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SUFFIX = ".index.json"
# Modules around a module, which put their own name into the names of its weights, on any floor.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_fpw_module)\."
)


class TensorFiles(SavedTensors):
    """The tensors of `folder`; `base` is the name of a model's body in its weights' names ("model", "transformer").

    Raises SourceError for files that are missing or damaged.
    """

    def __init__(self, folder: Path, base: str = "", named: str | None = None) -> None:
        self.files = weight_files(folder, named)
        self._opened: dict[Path, Any] = {}
        places: dict[str, Path] = {}
        for path in self.files:
            names = self._open(path).keys()
            if twice := places.keys() & set(names):
                raise SourceError(
                    f"{folder}: {listed(twice)} {_is_in(twice)} {places[min(twice)].name} and in {path.name}; keep the "
                    "files of one version of the model"
                )
            places.update(dict.fromkeys(names, path))
        _check_index(folder, named, places)
        plain = plain_names(places, base)
        # Whether transformers finds the same tensors under the same names by itself.
        self.is_plain = all(name == saved for saved, name in plain.items()) and all(
            path.suffix == ".safetensors" for path in self.files
        )
        self._places = {name: (places[saved], saved) for saved, name in plain.items()}

    def __getitem__(self, name: str) -> Tensor:
        path, saved = self._places[name]
        opened = self._open(path)
        tensor: Tensor = opened[saved] if isinstance(opened, dict) else opened.get_tensor(saved)
        return tensor

    @contextmanager
    def opened(self, names: Sequence[str]) -> Iterator[list[Saved]]:
        """Tensors as they are mapped, which no memory is held for behind the context."""
        files: dict[Path, Any] = {}
        found: list[Saved] = []
        for path, saved in map(self._places.__getitem__, names):
            if path not in files:
                files[path] = _opened(path) if _is_mapped(path) else self._open(path)
            opened = files[path]
            found.append(opened[saved] if isinstance(opened, dict) else opened.get_tensor(saved))
        yield found

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        path, saved = self._places[name]
        opened = self._open(path)
        return tuple(opened[saved].shape if isinstance(opened, dict) else opened.get_slice(saved).get_shape())

    def dtype(self, name: str) -> str:
        path, saved = self._places[name]
        opened = self._open(path)
        return str(opened[saved].dtype if isinstance(opened, dict) else opened.get_slice(saved).get_dtype())

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            self._opened[path] = _opened(path)
        return self._opened[path]


def weight_files(folder: Path, named: str | None = None) -> list[Path]:
    """The files that hold the weights; SourceError where there are none, or an index names some that are missing."""
    found = _found(folder, named)
    if found is not None:
        return [found] if found.suffix != ".json" else _shards(folder, found.name)
    expected = ", ".join(name for whole in _WHOLE for name in (whole, f"{whole}{_SUFFIX}"))
    raise SourceError(
        f"{folder}: transformers cannot load it: none of {named or expected} is there; fetch the weights"
    )


def _found(folder: Path, named: str | None) -> Path | None:
    """The file of all weights, or the index of several."""
    candidates = (
        folder / file for whole in (_WHOLE if named is None else (named,)) for file in _forms(whole)
    )
    return next((path for path in candidates if path.exists()), None)


def _forms(whole: str) -> tuple[str, str]:
    return whole, f"{whole}{_SUFFIX}"


def _check_index(folder: Path, named: str | None, places: Mapping[str, Path]) -> None:
    """SourceError where the index names a file that does not have a tensor."""
    index = _found(folder, named)
    if index is None or index.suffix != ".json":
        return
    for name, file in _weight_map(folder, index.name).items():
        if name not in places or places[name].name != file:
            where = f"it is in {places[name].name}" if name in places else "that file has no such tensor"
            raise SourceError(
                f"{folder}: {index.name} says that {name} is in {file}, but {where}; fetch the index and the files of "
                "one version of the model"
            )


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    """By tensor, the name of its file."""
    try:
        found: dict[str, str] = json.loads((folder / index).read_text())["weight_map"]
        sorted(set(found.values()))
        return found
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise SourceError(
            f"{folder / index}: the weights cannot be read: it is no index of weight files ({type(error).__name__}); "
            "fetch it again"
        ) from error


def _shards(folder: Path, index: str) -> list[Path]:
    names = sorted(set(_weight_map(folder, index).values()))
    if missing := [name for name in names if not (folder / name).exists()]:
        raise SourceError(
            f"{folder}: transformers cannot load it: {index} names {len(names)} files, of which "
            f"{listed(missing)} {'is' if len(missing) == 1 else 'are'} missing; fetch what is missing"
        )
    return [folder / name for name in names]


def _is_mapped(path: Path) -> bool:
    """Not so a file of torch's from before 1.6, which is no archive."""
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)


def _opened(path: Path) -> Any:
    """A safetensors file's handle, or the dictionary of a file of torch's."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            return safe_open(path, framework="pt")
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_mapped(path))
    except Exception as error:
        reason = first_line(error, "", 200)
        raise SourceError(
            f"{path.parent}: the weights cannot be read: {path.name} is damaged ({type(error).__name__}: {reason}); "
            "fetch the file again"
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def plain_names(names: Iterable[str], base: str = "") -> dict[str, str]:
    """By saved name, the name without wrappers.

    A first part that all names share is a wrapper where the body or the head of the model comes second:
    "model.model.layers.0" and "net.lm_head", but not "model.layers.0" of a model without a head of its own. Without a
    `base` only DataParallel's "module" is one.
    """
    found = {name: _WRAPPERS.sub("", name) for name in names}
    while found:
        first = {name.partition(".")[0] for name in found.values()}
        if len(first) > 1:
            break
        wrapper = f"{first.pop()}."
        inner = {name.removeprefix(wrapper) for name in found.values()}
        is_known = base and any(name.startswith((f"{base}.", "lm_head.")) for name in inner)
        if wrapper != "module." and not is_known:
            break
        if any("." not in name for name in inner):
            break
        found = {saved: name.removeprefix(wrapper) for saved, name in found.items()}
    return found


def _is_in(names: Iterable[str]) -> str:
    return "is in" if len(list(names)) == 1 else "are in"


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few, and how many more there are."""
    ordered = sorted(names)
    rest = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {rest} more" if rest > 0 else "")
