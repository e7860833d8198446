"""Export a Hugging Face causal language model to one graph in which attention is one node a layer.

transformers' `AttentionInterface` takes an attention function that calls our opaque operator, and
`AttentionMaskInterface` a function that makes no mask, so a model's own code stays untouched. This module knows nothing
of segments, quantization or backends.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from doubleweave.compiler.graph.broadcasts import drop_expands
from doubleweave.compiler.graph.cross_attention import (
    MOST_ENCODED,
    attend_across,
    example_rows,
    with_causal_bias,
)
from doubleweave.compiler.graph.experts import experts_as_operators
from doubleweave.compiler.graph.fresh_tensors import changes_in_place
from doubleweave.compiler.graph.mask_functions import causal_mask, chosen_keys, mask_of
from doubleweave.compiler.graph.ops import ATTENTIONS, GENERAL, attend
from doubleweave.compiler.graph.own_states import holding
from doubleweave.compiler.graph.permutes import join_permutes
from doubleweave.compiler.graph.positions import check_first, count_by_positions, share_computed
from doubleweave.compiler.graph.proved_rules import with_proved_rules
from doubleweave.compiler.graph.recurrence import mark_recurrences, name_states
from doubleweave.compiler.graph.refusal_causes import cause_of, place_of, watching
from doubleweave.compiler.graph.rotary_lengths import split_positions, two_frequencies
from doubleweave.compiler.graph.shared_attention import join_shared
from doubleweave.compiler.graph.shared_caches import share_caches
from doubleweave.compiler.graph.simplify import drop_no_ops, drop_whole_copies, simplify
from doubleweave.compiler.graph.sizes import sizes_as_operators
from doubleweave.compiler.graph.states import (
    States,
    find_states,
    make_cache,
    one_step_a_row,
    takes_cache_as,
)
from doubleweave.compiler.graph.written_attention import keep_other_attention, recognise_attention
from doubleweave.errors import SplitError
from doubleweave.sources.file_weights import stand_ins
from doubleweave.sources.positions import first_position

_ATTENTION = "doubleweave"
# torch.export takes a size of 0 or 1 for a constant; 33 is unlike the other sizes of a model.
_EXAMPLE_ROWS = 33
# What models hand to attention beside what `_attention` reads, and what says nothing that changes its numbers here:
# rotary embedding is done before, sequences are not packed, and there is no cache. Anything else is refused.
_NO_MATTER = {
    *("position_ids", "position_embeddings", "cache_position", "past_key_values", "use_cache", "layer_idx"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "deterministic"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
}


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D]."""
    sinks = kwargs.pop("s_aux", None)
    position_bias = kwargs.pop("position_bias", None)
    if (chosen := kwargs.pop("indices", None)) is not None:
        attention_mask = chosen_keys(chosen, query, key, attention_mask)
    is_causal = kwargs.pop("is_causal", None)
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in _NO_MATTER)
    own: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    is_across = str(query.shape[2]) != str(key.shape[2])
    is_plain = not softcap and sinks is None and chosen is None
    if unknown and (own is None or is_across or not is_plain):
        raise SplitError(
            f"{type(module).__name__} hands its attention {', '.join(unknown)}: expected queries, keys, values, a "
            "mask, a scale, a window, a soft cap or sinks (s_aux); this architecture is not supported"
        )
    num_heads, num_kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
    scale = head_dim**-0.5 if scaling is None else float(scaling)
    q, k, v = map(_token_major, (query, key, value))
    parameters = (num_heads, num_kv_heads, scale, int(sliding_window or 0), float(softcap or 0.0))
    if is_across:
        out = attend_across(q, k, v, parameters, attention_mask, position_bias, sinks)
        return out.view(1, query.shape[2], num_heads, -1), None
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise SplitError(
            f"{type(module).__name__} is not causal: expected a decoder-only language model; "
            "encoders have no cache to grow"
        )
    if unknown:  # written out in the model's own operators, as it is without an interface
        mask = causal_mask(query, key, sliding_window or 0) if attention_mask is None else attention_mask
        kwargs |= {} if position_bias is None else {"position_bias": position_bias}
        result: tuple[torch.Tensor, None] = own(
            module, query, key, value, mask, scaling=scaling, dropout=0.0, **kwargs
        )
        return result[0], None
    if position_bias is not None:
        attention_mask = with_causal_bias(position_bias, attention_mask)
    out = attend(q, k, v, parameters, mask=attention_mask, sinks=sinks)
    return out.view(1, query.shape[2], num_heads, -1), None


def _token_major(x_BHTD: torch.Tensor) -> torch.Tensor:
    return x_BHTD.transpose(1, 2).reshape(x_BHTD.shape[0], x_BHTD.shape[2], -1)


class _Chunk(nn.Module):
    """A causal language model as a function of (input_ids [1, T], position_ids [1, T], states, encoder_rows [1, E, …])
    -> logits, next states.

    Each state is [T, …], one for each token: the modules that use them see single tokens (states.py). `encoder_rows`
    are None for a model without an encoder.
    """

    def __init__(self, model: nn.Module, first: int, states: States) -> None:
        super().__init__()
        self.model = model
        self.first = first
        self.keys = tuple(states.shapes)
        self.places = states.places

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        states: tuple[torch.Tensor, ...],
        encoder_rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        given: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if encoder_rows is not None:
            given["encoder_rows"] = encoder_rows
        model: Any = self.model
        if "position_ids" in inspect.signature(model.forward).parameters:
            given["position_ids"] = position_ids + self.first if self.first else position_ids
        if not self.keys:
            return (model(**given).logits,)
        # A model may write to a state in place; what it was given stays what it was.
        own = dict(zip(self.keys, (state.clone() for state in states), strict=True))
        cache = make_cache(model.config.get_text_config(decoder=True), {} if self.places else own)
        placed = {self.places[key]: state for key, state in own.items() if self.places}
        with holding(model, placed, cache) as (cache, after):
            given |= {"use_cache": True, takes_cache_as(model): cache}
            logits: torch.Tensor = model(**given).logits
        if self.places:
            return (logits, *(after[self.places[key]] for key in self.keys))
        return (logits, *(cache.now[key] for key in self.keys))


def export_llm(model: Any, max_rows: int, long: bool = False) -> fx.GraphModule:
    """Export `model` for chunks of 1 to `max_rows` tokens and simplify the graph.

    The graph takes input_ids and position_ids (int64 [1, T]) and returns logits (float32 [1, T, vocab]). A state of the
    model is a placeholder besides, and its next value a result; their recurrences are marked (recurrence.py). With
    `long` a position p may be given as ~p, by LongRoPE's long frequencies (rotary_lengths.py).
    Raises SplitError when the model does not go through transformers' attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, mask_of)
    states = find_states(model)
    exported, put_back = _exported(model, states, max_rows, long)
    if states.shapes or changes_in_place(exported.graph):
        # An empty table decomposes nothing: it only turns changes in place into values.
        exported = exported.run_decompositions({})
    graph_module = exported.module()
    assert isinstance(graph_module, fx.GraphModule)
    put_back(graph_module)
    name_states(graph_module, [key.name for key in states.shapes])
    drop_no_ops(graph_module)
    drop_whole_copies(graph_module)
    recognise_attention(graph_module, type(model).__name__)
    join_permutes(graph_module)
    drop_expands(graph_module)
    simplify(graph_module)
    count_by_positions(graph_module)
    if long:
        split_positions(graph_module)
    share_computed(graph_module)
    share_caches(graph_module)
    join_shared(graph_module)
    keep_other_attention(graph_module, type(model).__name__)
    mark_recurrences(graph_module)
    if not states.shapes and not any(
        node.target in (*ATTENTIONS, GENERAL) for node in graph_module.graph.nodes
    ):
        raise SplitError(
            f"{type(model).__name__} has no attention, neither by transformers' attention interface nor written in its "
            "own code: expected a decoder that attends to earlier tokens; this architecture is not supported"
        )
    return graph_module


def _exported(
    model: Any, states: States, max_rows: int, long: bool
) -> tuple[torch.export.ExportedProgram, Callable[[nn.Module], None]]:
    """torch.export of the model with our attention, and what puts weights that stay in files into its module; raises
    SplitError that names the module which it fails in."""
    before = model.config._attn_implementation
    with watching(model) as watch:
        try:
            first = first_position(model)
            check_first(model, first)
            model.set_attn_implementation(_ATTENTION)
            if model.config._attn_implementation != _ATTENTION:  # it writes attention itself
                model.config._attn_implementation = "eager"
            example = torch.zeros(1, _EXAMPLE_ROWS, dtype=torch.long)
            positions = torch.arange(example.shape[1]).unsqueeze(0)
            encoder_rows = example_rows(model)
            # Of a range such as 1 to 2 torch.export makes several dims.
            rows = torch.export.Dim("T", min=1, max=max(_EXAMPLE_ROWS, max_rows))
            # One number stands for all of a state: nothing is computed with it.
            before_rows = tuple(
                torch.zeros(1).expand(_EXAMPLE_ROWS, *shape) for shape in states.shapes.values()
            )
            encoded = torch.export.Dim("E", min=1, max=MOST_ENCODED)
            modules, experts = one_step_a_row(states.users), experts_as_operators(model)
            frequencies = two_frequencies(model, long)
            operators = sizes_as_operators(model)
            with torch.no_grad(), frequencies, modules, experts, operators, stand_ins(model) as put_back:
                # Not strict: only the operators are traced, so a model may use any Python on the way.
                chunk = _Chunk(model, first, states)
                shapes = (
                    *({1: rows}, {1: rows}, tuple({0: rows} for _ in before_rows)),
                    *({1: encoded} for _ in encoder_rows),
                )
                given = (example, positions, before_rows, *encoder_rows)
                exported = with_proved_rules(
                    chunk, lambda: torch.export.export(chunk, given, dynamic_shapes=shapes, strict=False)
                )
        except SplitError as error:
            raise SplitError(
                f"{type(model).__name__}: in {place_of(watch.running, model)}: {error}"
            ) from error
        except Exception as error:
            raise SplitError(
                f"{type(model).__name__}: {cause_of(error, watch, max_rows)}: expected a decoder that runs any 1 to "
                f"{max_rows} tokens alike; this architecture is not supported"
            ) from error
        finally:
            model.set_attn_implementation(before)
            if model.config._attn_implementation != before:
                model.config._attn_implementation = before
    return exported, put_back


def owned_modules(model: Any) -> dict[str, str]:
    """The modules that become segments of their own: qualified name (in the exported graph) -> segment.

    Found by role, not by name: input embeddings, output embeddings, rotary tables.
    """
    names = {id(module): f"model.{name}" for name, module in model.named_modules()}
    owners = {names[id(model.get_input_embeddings())]: "embed_tokens"}
    owners |= {
        names[id(module)]: "rotary"
        for module in model.modules()
        if type(module).__name__.endswith("RotaryEmbedding") and id(module) in names
    }
    owners[names[id(model.get_output_embeddings())]] = "lm_head"
    return owners
