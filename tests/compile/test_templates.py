"""Templates: a layer filled from its structure's template is the layer lowered directly."""

from __future__ import annotations

import hashlib

import pytest
import torch

import toys
from doubleweave.ir.split import FixedSizes, SizeRanges, rows


def split_of(recipe, shape):
    from doubleweave.compiler.graph.export_llm import export_llm, owned_modules
    from doubleweave.compiler.lower.lower import prepare
    from doubleweave.compiler.quantize.weights import quantize
    from doubleweave.compiler.split.split_llm import default_policy, split_llm

    module = toys.module()
    split = split_llm(
        export_llm(module, 8),
        owned_modules(module),
        policy=default_policy(shape),
        max_context=toys.MAX_CONTEXT,
    )
    return prepare(quantize(split, recipe))


def filled(template, weights):
    """(payloads, named data, buffers) as bytes of a template over weights, keys renamed as the writer does."""
    from doubleweave.compiler.lower.pte_file import _KEY
    from doubleweave.compiler.lower.templates import encode

    named, keys = {}, {}
    for key, source in template.named.items():
        data = encode(source, weights)
        new = ("scale_" if key.startswith("scale_") else "") + hashlib.sha256(data).hexdigest()
        keys[key.encode()] = new.encode()
        named[new] = data
    payloads = [_KEY.sub(lambda m: keys.get(m.group(), m.group()), payload) for payload in template.payloads]
    return payloads, named, [encode(source, weights) for source in template.buffers]


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [("none", rows(1, 8)), ("8da8w", rows(1, 8)), ("8da4w", rows(1, 8)), ("8da8w", FixedSizes((8,)))],
)
def test_a_filled_template_is_the_layer_lowered_directly(recipe, shape):
    from doubleweave.compiler.lower.lower import lower_graph
    from doubleweave.compiler.lower.templates import Constant, as_they_are, made_up

    split = split_of(recipe, shape)
    size = None if isinstance(shape, SizeRanges) else 8
    first, second = split.split.segment("block_1"), split.split.segment("block_2")
    assert first.structure == second.structure
    graph = split.graphs[first.structure]
    template = lower_graph(graph, made_up(split.weights["block_1"]), first, {"m": size})[size]
    from_weights = [s for s in (*template.named.values(), *template.buffers) if isinstance(s, Constant)]
    assert len(from_weights) >= 7  # the linears at least
    weights = split.weights["block_2"]
    direct = lower_graph(graph, as_they_are(weights), second, {"m": size})[size]
    assert filled(template, weights) == filled(direct, weights)
    assert (template.num_operators, template.num_delegated) == (direct.num_operators, direct.num_delegated)
    assert str(template.plan) == str(direct.plan)


def two_linears(biases):
    """A split segment of two linears with biases, whose weights are random and whose biases are given."""
    from torch import fx

    from doubleweave.ir.split import Port, Segment

    port = Port("in0", "float32", (1, "T", 8))
    segment = Segment("two", "cpu", "xnnpack", FixedSizes((2,)), (port,), (port,), "two")
    generator = torch.Generator().manual_seed(len(biases[0]) + int(biases[0].sum()))
    first, second = (torch.randn(8, 8, generator=generator) for _ in range(2))
    weights = (first, biases[0], second, biases[1])
    root, graph = torch.nn.Module(), fx.Graph()
    value = graph.placeholder("in0")
    for index in range(4):
        root.register_buffer(f"w{index}", weights[index])
    for index in (0, 2):
        parameters = (graph.get_attr(f"w{index}"), graph.get_attr(f"w{index + 1}"))
        value = graph.call_function(torch.ops.aten.linear.default, (value, *parameters))
    graph.output((value,))
    return fx.GraphModule(root, graph), weights, segment


def test_a_layer_with_zero_biases_stands_for_layers_with_others():
    from doubleweave.compiler.lower.lower import lower_graph
    from doubleweave.compiler.lower.templates import as_they_are, made_up

    graph, zeros, segment = two_linears((torch.zeros(8), torch.zeros(8)))
    template = lower_graph(graph, made_up(zeros), segment, {"m": 2})[2]
    _, weights, _ = two_linears((torch.arange(8.0) + 1, -torch.arange(8.0) - 1))
    direct = lower_graph(graph, as_they_are(weights), segment, {"m": 2})[2]
    assert filled(template, weights) == filled(direct, weights)


@pytest.mark.parametrize("name", ["int4", "int4_offsets", "int8"])
def test_large_weights_are_lowered_over_memory_that_nobody_reads(name):
    """Two linears of which one is large: only the template's weights are made up, and they take their places."""
    from doubleweave.compiler.backends.xnnpack.lower import prepare
    from doubleweave.compiler.lower.lower import lower_graph, matrices
    from doubleweave.compiler.lower.templates import as_they_are, made_up
    from doubleweave.compiler.quantize.formats import FORMATS
    from doubleweave.compiler.quantize.weights import _quantize_graph

    graph, weights, segment = one_large(
        torch.ops.aten.linear.default, torch.randn(2048, 1024), torch.zeros(1, 2, 1024)
    )
    quantized, convert = _quantize_graph(graph, FORMATS[name], ())
    prepared, pack = prepare(quantized)
    over = made_up(pack(convert(weights)), matrices(prepared.graph))
    assert [tensor in over.unread for tensor in over.weights].count(True) == 1
    template = lower_graph(prepared, over, segment, {"m": 2})[2]
    assert template.is_complete
    other = pack(convert(tuple(torch.randn_like(weight) for weight in weights)))
    direct = lower_graph(prepared, as_they_are(other), segment, {"m": 2})[2]
    assert filled(template, other) == filled(direct, other)


def one_large(operator, weight, rows):
    """A segment that applies the operator to rows and a weight."""
    from torch import fx
    from torch._subclasses.fake_tensor import FakeTensorMode

    from doubleweave.ir.split import Port, Segment

    ports = (
        Port("in0", "float32", tuple(rows.shape)),
        Port("out0", "float32", tuple(operator(rows, weight).shape)),
    )
    segment = Segment("one", "cpu", "xnnpack", FixedSizes((2,)), ports[:1], ports[1:], "one")
    mode, graph, root = FakeTensorMode(), fx.Graph(), torch.nn.Module()
    root.register_buffer("w0", weight)
    x, read = graph.placeholder("in0"), graph.get_attr("w0")
    x.meta["val"], read.meta["val"] = mode.from_tensor(rows), mode.from_tensor(weight)
    result = graph.call_function(operator, (x, read))
    result.meta["val"] = x.meta["val"]
    graph.output((result,))
    return fx.GraphModule(root, graph), (weight,), segment


def test_a_large_weight_that_changes_its_form_leaves_a_template_incomplete():
    """A convolution's is turned around in lowering and not found again, so each segment is lowered over its own."""
    from doubleweave.compiler.lower.lower import lower_graph, matrices
    from doubleweave.compiler.lower.templates import made_up

    graph, weights, segment = one_large(
        torch.ops.aten.conv2d.default, torch.randn(512, 512, 1, 2), torch.zeros(1, 512, 8, 8)
    )
    over = made_up(weights, matrices(graph.graph))
    assert over.unread
    template = lower_graph(graph, over, segment, {"m": 2})[2]
    assert template.num_delegated
    assert not template.is_complete


def test_numbers_of_tiny_tensors_belong_to_the_structure():
    from doubleweave.compiler.split.pieces import structure

    def digest(tiny, large):
        graph, weights, segment = two_linears((torch.zeros(8), torch.zeros(8)))
        return structure(graph.graph, (*weights, tiny, large), segment.inputs)

    wanted = digest(torch.ones(1), torch.ones(4))
    assert digest(torch.ones(1), torch.zeros(4)) == wanted
    assert digest(torch.zeros(1), torch.ones(4)) != wanted


def test_layers_differ_only_in_their_weights():
    from doubleweave.compiler.lower.equal_structures import jobs

    split = split_of("none", rows(1, 8))
    lowered = {job.segment.name for job in jobs(split.split)}
    assert len(lowered & {"block_1", "block_2"}) == 1
    assert {"block_0", "block_3"} <= lowered  # the first has no attention before it, the last none behind


def test_made_up_weights_look_like_the_real_ones():
    from doubleweave.compiler.lower.templates import made_up

    real = (
        torch.randn(8, 32),
        torch.randint(-8, 8, (8, 32), dtype=torch.int8),
        torch.randint(-127, 128, (64, 32), dtype=torch.int8),
        torch.zeros(8, dtype=torch.int64),
        torch.tensor([2.0]),
        torch.randn(8, 32),
    )
    made, numbers, _ = made_up(real)
    assert numbers == {0, 1, 2, 5}
    assert [(t.shape, t.dtype) for t in made] == [(t.shape, t.dtype) for t in real]
    assert not torch.equal(made[0], real[0])
    assert not torch.equal(made[0], made[5])
    assert (made[0] > 0).all()  # they may be scales
    assert -8 <= int(made[1].min()) <= int(made[1].max()) <= 7
    assert int(made[2].abs().max()) > 8
    assert torch.equal(made[3], real[3])
    assert torch.equal(made[4], real[4])
    assert all(torch.equal(a, b) for a, b in zip(made, made_up(real).weights, strict=True))


def test_bytes_of_constants():
    from doubleweave.compiler.lower.templates import Constant, encode

    weights = (torch.tensor([1, -2], dtype=torch.int8), torch.tensor([1.0], dtype=torch.bfloat16))
    assert encode(Constant(0), weights) == b"\x01\xfe"
    assert encode(Constant(1), weights) == b"\x80\x3f"
    assert encode(b"as it is", weights) == b"as it is"
