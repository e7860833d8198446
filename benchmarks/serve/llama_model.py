"""A GGUF opened by llama.cpp through its C interface."""

from typing import Any

import llama_cpp as llama


class Model:
    """The model of a file; raises SystemExit where llama.cpp does not load it."""

    def __init__(self, gguf: str) -> None:
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(gguf.encode(), llama.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"{gguf}: llama.cpp cannot load it")
        self.vocab_size: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def context(self, num_tokens: int, threads: int, **options: Any) -> Any:
        """A context of so many tokens, which one batch may fill; `options` are further fields of its parameters."""
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = num_tokens
        params.n_threads = params.n_threads_batch = threads
        for name, value in options.items():
            setattr(params, name, value)
        found = llama.llama_init_from_model(self._model, params)
        if not found:
            raise SystemExit(f"llama.cpp gives no context of {num_tokens} tokens")
        return found
