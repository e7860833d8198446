"""Tables that are only looked up: int8 rows, in the program's file once with the head that they are tied to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import doubleweave as dw
import toys
from doubleweave.compiler.graph.linear_ops import dequantized
from doubleweave.compiler.graph.table_ops import table_rows_reference
from doubleweave.compiler.policy import TABLE_FORMATS
from doubleweave.compiler.quantize.calibration import Calibration
from doubleweave.compiler.quantize.formats import INT8, TABLES, int8_per_row
from doubleweave.compiler.quantize.smooth import smoothed
from doubleweave.compiler.quantize.tables import tables
from doubleweave.errors import InputError, PolicyError
from exports import split_of

TABLE = toys.VOCAB_SIZE * toys.HIDDEN
pytestmark = pytest.mark.usefixtures("lowered_once")


@pytest.fixture(scope="module")
def tied_dir(made_once):
    return made_once(
        "tied_8da8w",
        lambda folder: dw.compile_llm(toys.model(tied=True), folder, quantize="8da8w", chunk=(32,)),
    )


def weight_bytes(folder, name):
    return dw.open(folder).split.segment(name).weight_bytes


@pytest.mark.parametrize("recipe", ["8da8w", "8da4w"])
def test_a_table_takes_a_byte_a_number(recipe, request):
    folder = request.getfixturevalue(f"toy_{recipe}_dir")
    assert weight_bytes(folder, "embed_tokens") == TABLE + 4 * toys.VOCAB_SIZE


@pytest.mark.parametrize("recipe", ["8da8w", "8da4w", "8da4w, head in 4 bits"])
def test_a_tied_table_takes_no_room(recipe, tmp_path, lowered_once):
    recipe, *keep = recipe.split(", ")
    options = {"quantize": recipe, "chunk": (32,), "keep": {"head": "int4"} if keep else {}}
    for name, is_tied in (("tied", True), ("untied", False)):
        dw.compile_llm(toys.model(tied=is_tied), tmp_path / name, **options)
    tied, untied = ((tmp_path / name / "program.pte").stat().st_size for name in ("tied", "untied"))
    assert untied - tied >= 0.98 * TABLE
    manifest = dw.open(tmp_path / "tied").manifest
    stored = {s.name: [item.format for item in s.stored] for s in manifest.split.segments}
    assert stored["embed_tokens"] == stored["lm_head"] == ["int4_offsets" if keep else "int8"]
    # As in a program: a head's columns are scaled, and so is a table's, whose rows are divided again.
    split = split_of(toys.module(tied=True))
    text = Calibration(tmp_path / "tied" / "tokenizer.json", 32, toys.VOCAB_SIZE).first_tokens(
        toys.MAX_CONTEXT
    )
    table, factors = smoothed(split, text).split.weights["embed_tokens"]
    ids = np.array([[0, 7, 7, toys.VOCAB_SIZE - 1]])
    found = dw.open(tmp_path / "tied").methods["embed_tokens"](ids)
    if not keep:
        expected = dequantized(*INT8.convert(table))[ids[0]][:, : table.shape[1]] * factors
        np.testing.assert_allclose(found[0], expected.numpy(), rtol=1e-6)
    exact = toys.module(tied=True).model.embed_tokens.weight.detach()[ids[0]].numpy()
    assert np.abs(found[0] - exact).max() < (0.1 if keep else 0.01) * np.abs(exact).max()


def test_rows_are_the_references(toy_8da8w_dir):
    found = dw.open(toy_8da8w_dir).methods["embed_tokens"]
    ids = np.array([[0, 7, 7, toys.VOCAB_SIZE - 1]])
    values, scales = int8_per_row(toys.module().model.embed_tokens.weight.detach())
    expected = table_rows_reference(values, scales, torch.from_numpy(ids), None, None).numpy()
    assert np.array_equal(found(ids), expected)


@pytest.mark.parametrize("number", [-1, toys.VOCAB_SIZE])
def test_a_row_that_is_not_there(toy_8da8w_dir, number):
    embed = dw.open(toy_8da8w_dir).methods["embed_tokens"]
    with pytest.raises((InputError, dw.DoubleweaveError)):
        embed(np.array([[number]]))


class Lookups(nn.Module):
    """Tables: one that is looked up, one that is multiplied by as well, one that is an index."""

    def __init__(self):
        super().__init__()
        self.only = nn.Embedding(9, 4)
        self.both = nn.Embedding(9, 4)
        self.register_buffer("index", torch.arange(4))

    def forward(self, ids):
        return self.only(ids) + F.linear(self.both(ids), self.both.weight[:4]) + self.only(self.index)


def test_tables_that_are_more_than_looked_up_stay():
    graph = torch.export.export(Lookups(), (torch.tensor([1, 2, 3, 4]),)).module().graph
    assert tables(graph) == {"only.weight"}


def test_formats_have_the_names_that_are_offered():
    assert tuple(TABLES) == TABLE_FORMATS


@pytest.mark.parametrize(("form", "bytes_each"), [("int4", 0.5 + 3 / 32), ("bfloat16", 2.0)])
def test_tables_in_other_formats(form, bytes_each, tmp_path):
    folder = tmp_path / form
    dw.compile_llm(toys.model(), folder, quantize="8da4w", chunk=(32,), table=form)
    kept = weight_bytes(folder, "embed_tokens")
    assert kept == int(TABLE * bytes_each) + (4 * toys.VOCAB_SIZE if form == "int4" else 0)
    ids = np.array([[0, 7, 7, toys.VOCAB_SIZE - 1]])
    found = dw.open(folder).methods["embed_tokens"](ids)
    weight = toys.module().model.embed_tokens.weight.detach()
    parts = (*TABLES[form].convert(weight), None, None, None)[:4]
    wanted = table_rows_reference(*parts[:2], torch.from_numpy(ids), *parts[2:]).numpy()
    assert np.array_equal(found, wanted)
    exact = weight[ids].numpy()
    reach = np.ptp(exact.reshape(4, -1, 32), axis=2).max()
    assert np.abs(found - exact).max() < (0.6 * reach / 15 if form == "int4" else 2**-8 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("tied", "recipe", "form", "message"),
    [
        (False, "8da8w", "int3", "table: found 'int3', expected one of int8, int4, bfloat16"),
        (
            False,
            "none",
            "int4",
            "table: found 'int4', but recipe none keeps every weight as it is; leave it out",
        ),
        (True, "8da4w", "int4", "which are in the program once, as int8; leave it out"),
    ],
)
def test_formats_that_are_refused(tied, recipe, form, message, tmp_path):
    with pytest.raises(PolicyError, match=message):
        dw.compile_llm(toys.model(tied=tied), tmp_path / "out", quantize=recipe, table=form)
    assert not list(tmp_path.iterdir())
