"""Load a folder in Hugging Face's layout (config.json, safetensors, tokenizer) with transformers.

Quantized weights are made float32 before transformers sees them, an adapter is merged, and no code of the folder runs
unasked.
"""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from doubleweave.errors import SourceError, first_line
from doubleweave.sources import adapter as adapters
from doubleweave.sources.audit import audit
from doubleweave.sources.converted_weights import is_converted
from doubleweave.sources.encoder_decoder import auto_class_of
from doubleweave.sources.folder_config import (
    check_code,
    code_of_tokenizer,
    end_tokens,
    max_context_of,
    read_json,
    vocab_size_of,
)
from doubleweave.sources.model import Model
from doubleweave.sources.positions import first_position
from doubleweave.sources.quantized_folder import PlainTensors, check_readable, method_of, settings_of
from doubleweave.sources.saved_tensors import SavedTensors
from doubleweave.sources.streamed_module import streamed_module
from doubleweave.sources.tensor_files import TensorFiles
from doubleweave.sources.text_part import TextTensors, kinds_of_tokens, text_part_of
from doubleweave.sources.weights import check_dtypes, check_loaded, is_harmless

_VOCABULARIES = re.compile(r"tokenizer\.json|tekken\.json|.*vocab.*|.*\.(model|tiktoken|spm|bpe)")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal, where our own progress is shown."""
    from transformers.utils import logging as untyped

    transformers_logging: Any = untyped
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what torch says of torchao when transformers imports it
    try:
        # The bar of the GGUF reader has no switch.
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def load(path: Path, *, adapter: Path | None = None, trust_remote_code: bool = False) -> Model:
    """Load the folder, with the adapter of the folder `adapter` merged.

    Raises SourceError for a missing config, weights that are missing, left over or quantized in a way that is not read,
    and for a model that needs the folder's own code, unless `trust_remote_code` says that it may run.
    """
    if not (path / "config.json").exists():
        adapters.check_alone(path)
        raise SourceError(f"{path}: has no config.json; expected a Hugging Face model folder")
    described = read_json(path / "config.json")
    if adapter is None:
        adapters.check_beside(path)
    else:
        adapters.check_adapter(adapter)
    with quiet():
        if not trust_remote_code:
            check_code(path, described)
        may_stream = adapter is None or adapters.merges_by_layer(adapter)
        module, check_again, kinds = _load_module(path, described, trust_remote_code, may_stream)
        if adapter is not None:
            # The weights are compared before they change.
            found = check_again()
            module, check_again = adapters.merged(module, adapter)
            if found:
                raise SourceError(f"{path}: {found}; fetch the files again")
        # An adapter may be trained with tokens and a chat template of its own.
        has_own = adapter is not None and (adapter / "tokenizer.json").exists()
        tokenizer = _load_tokenizer(adapter if adapter and has_own else path, trust_remote_code)
    model = _model(path, module, path.resolve().name, tokenizer)
    return replace(model, audit=check_again, kinds_of_tokens=kinds)


def from_module(module: Any, name: str, tokenizer: Any | None) -> Model:
    """A Model around a transformers module that is already in memory."""
    context = max_context_of(module.config)
    return Model(
        name=name,
        module=module,
        max_context=None if context is None else context - first_position(module),
        vocab_size=vocab_size_of(name, module),
        eos_token_ids=end_tokens(module, tokenizer),
        save_tokenizer=None if tokenizer is None else lambda folder: _save_tokenizer(tokenizer, folder),
        chat_template=getattr(tokenizer, "chat_template", None),
        special_tokens={
            key: str(value)
            for key, value in getattr(tokenizer, "special_tokens_map", {}).items()
            if isinstance(value, str)
        },
    )


def _load_module(
    path: Path, described: Mapping[str, Any], trusted: bool, may_stream: bool
) -> tuple[Any, Callable[[], str], str]:
    """The module, each of whose weights is from the files, the audit that compares them once more, and how the whole
    model, where the module is part of one, is told the kinds of tokens. `may_stream`: weights may stay in the files."""
    config = _load_config(path, trusted)
    settings = settings_of(described)
    if settings is not None:
        check_readable(path, settings)
    config, whole = text_part_of(config) or config, config
    kinds = "" if config is whole else kinds_of_tokens(whole)
    if not (trusted and described.get("auto_map")):
        _check_causal(path, config)
    base = _base_of(config) if config is whole else ""
    named = described.get("transformers_weights")

    def saved() -> SavedTensors:
        files = TensorFiles(path, base, named if isinstance(named, str) else None)
        found = files if config is whole else TextTensors(path, files, config, whole)
        return found if settings is None else PlainTensors(path, settings, found)

    tensors = saved()
    config = _unquantized(config)
    module = _streamed(path, config, tensors) if may_stream and not trusted else None
    is_streamed = module is not None
    if module is None:
        module = _whole(path, trusted, config, tensors)
    if settings is None:
        check_dtypes(path, module, {name: tensors.dtype(name) for name in tensors})
    else:
        _check_linears(path, settings, module)
    if is_streamed and not is_converted(module):
        return module, lambda: "", kinds  # its weights are those of the files, under their names
    return module, lambda: audit(saved(), module, _harmless_for(module)), kinds


def _whole(path: Path, trusted: bool, config: Any, tensors: SavedTensors) -> Any:
    """The module, all of whose weights are the files', in memory."""
    if isinstance(tensors, TensorFiles) and tensors.is_plain:
        with _without_adapter(path) as folder:
            module, info = _from_pretrained(path, trusted, folder=folder, config=config)
    else:
        # transformers takes tensors or a folder, not both.
        module, info = _from_pretrained(path, trusted, config=config, state_dict=dict(tensors))
        module.generation_config = _generation_config(path, module)
    check_loaded(path, info, module.config, lambda name: tensors.shape(name) if name in tensors else ())
    return module


def _harmless_for(module: Any) -> Callable[[str, tuple[int, ...]], bool]:
    """Whether a tensor of the files, by its name and shape, need not be in the module."""
    left_out = [re.compile(one) for one in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
    return lambda name, shape: (
        is_harmless(name, shape, module.config) or any(one.search(name) for one in left_out)
    )


def _streamed(path: Path, config: Any, tensors: SavedTensors) -> Any | None:
    """The module over weights that stay in their files, None where transformers has to load it."""
    if auto_class_of(config) is not None:  # with an encoder
        return None
    kind = _class_of(path, config, trusted=False)
    module = streamed_module(kind, config, tensors, lambda name, shape: is_harmless(name, shape, config))
    if module is not None:
        module.generation_config = _generation_config(path, module)
    return module


def _from_pretrained(
    path: Path, trusted: bool, *, folder: Path | None = None, **kwargs: Any
) -> tuple[Any, Mapping[str, Any]]:
    """The module, in float32 and eval mode, and transformers' account of its weights; `path` is what errors name."""
    auto = _auto_of(kwargs["config"])
    try:
        if folder is None:
            auto = _class_of(path, kwargs["config"], trusted)
        module, info = auto.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            # SOURCE is a folder: nothing is fetched.
            local_files_only=True,
            output_loading_info=True,
            # They are told apart, and refused, by what the account says.
            ignore_mismatched_sizes=True,
            **({} if folder is None else {"trust_remote_code": trusted}),
            **kwargs,
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: transformers cannot load it: {first_line(error)}") from error
    except Exception as error:  # safetensors raises types of its own
        raise SourceError(
            f"{path}: the weights cannot be read ({type(error).__name__}: {first_line(error)}); "
            "fetch the file again"
        ) from error
    return module.eval(), info


def _class_of(path: Path, config: Any, trusted: bool) -> Any:
    """The class of the model: the one that the folder's own code defines, where it may run, or transformers'."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if trusted and own:
        return get_class_from_dynamic_module(own, path, local_files_only=True)
    known = _auto_of(config)._model_mapping
    if type(config) not in known:
        raise ValueError(f"it has no causal language model of the type {config.model_type!r}")
    return known[type(config)]


def _check_causal(path: Path, config: Any) -> None:
    """Raise SourceError for a model that is no causal language model, and has none inside."""
    inner = config.get_text_config(decoder=True)
    if type(config) not in _auto_of(config)._model_mapping:
        inside = "" if inner is config else f", nor of the text model inside it ({inner.model_type})"
        raise SourceError(
            f"{path}: transformers cannot load it: it has no causal language model of the type {config.model_type!r}"
            f"{inside}; expected one of the types in docs/models.md"
        )


def _generation_config(path: Path, module: Any) -> Any:
    """The folder's, or what follows from the model's config."""
    from transformers import GenerationConfig

    with suppress(OSError):
        return GenerationConfig.from_pretrained(path, local_files_only=True)
    return module.generation_config


def _load_config(path: Path, trusted: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trusted)
    except Exception as error:
        raise SourceError(f"{path}: transformers cannot load it: {first_line(error)}") from error


def _auto_of(config: Any) -> Any:
    """transformers' auto class for the models of a config."""
    from transformers import AutoModelForCausalLM

    return auto_class_of(config) or AutoModelForCausalLM


def _base_of(config: Any) -> str:
    """The name that the body of a model has in its weights' names, "" where transformers does not know it."""
    known = _auto_of(config)._model_mapping
    return getattr(known[type(config)], "base_model_prefix", "") if type(config) in known else ""


def _unquantized(config: Any) -> Any:
    """The config without what would make transformers quantize the module."""
    for part in (config, config.get_text_config(decoder=True)):
        for name in ("quantization_config", "compression_config"):
            if hasattr(part, name):
                delattr(part, name)
    return config


def _check_linears(path: Path, settings: Mapping[str, Any], module: Any) -> None:
    """Raise SourceError for GPT-2's layers, which keep weights transposed: methods save them one way or the other."""
    from transformers.pytorch_utils import Conv1D

    if any(isinstance(part, Conv1D) for part in module.modules()):
        raise SourceError(
            f"{path}: its weights are quantized by {method_of(settings)!r}, which is not read for "
            f"{module.config.model_type}; use the folder of the model before it was quantized"
        )


@contextmanager
def _without_adapter(path: Path) -> Iterator[Path]:
    """The folder without the adapter beside the model, which transformers would put on the module by itself."""
    if not (path / adapters.CONFIG).exists():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in path.iterdir():
            if not file.name.startswith("adapter_"):
                (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def _model(path: Path, module: Any, name: str, tokenizer: Any | None) -> Model:
    model = from_module(module, name, tokenizer)
    if tokenizer is not None:
        _check_vocabulary(path, tokenizer, model.vocab_size)
    return model


def _load_tokenizer(path: Path, trust_remote_code: bool) -> Any | None:
    from transformers import AutoTokenizer

    code = code_of_tokenizer(path)
    if not code and not any(_VOCABULARIES.fullmatch(file.name) for file in path.iterdir()):
        return None  # transformers would make one up, without a vocabulary
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        if code and not trust_remote_code:
            raise SourceError(f"{path}: {code}, or remove the file to compile without a tokenizer") from error
        if (path / "tokenizer.json").exists():
            raise SourceError(
                f"{path}: its tokenizer cannot be read ({type(error).__name__}: {first_line(error)}); fetch "
                "tokenizer.json and tokenizer_config.json again, or remove them to compile without a tokenizer"
            ) from error
        return None
    return tokenizer if hasattr(tokenizer, "backend_tokenizer") else None


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write tokenizer.json, without the truncation and padding that its last user left in it: a prompt stays whole."""
    from tokenizers import Tokenizer

    saved = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    saved.no_truncation()
    saved.no_padding()
    saved.save(str(folder / "tokenizer.json"))


def _check_vocabulary(path: Path, tokenizer: Any, vocab_size: int) -> None:
    """Raise SourceError for a tokenizer of another model, whose ids the embedding would not have."""
    # Added tokens may lie beyond the vocabulary, and a vocabulary may be padded beyond the tokens.
    size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    if size > vocab_size:
        raise SourceError(
            f"{path}: the tokenizer has {size} tokens, but the model has {vocab_size}; put the model's own there"
        )
