"""Tables that are only looked up: int8 rows, in the program's file once with the head that they are tied to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import doubleweave as dw
import toys
from doubleweave.compiler.graph.table_ops import table_rows_reference
from doubleweave.compiler.quantize.calibration import Calibration
from doubleweave.compiler.quantize.formats import int8_per_channel
from doubleweave.compiler.quantize.smooth import smoothed
from doubleweave.compiler.quantize.tables import tables
from doubleweave.errors import InputError
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


def test_a_tied_table_takes_no_room(toy_8da8w_dir, tied_dir):
    for folder, is_tied in ((tied_dir, True), (toy_8da8w_dir, False)):
        split = split_of(toys.module(tied=is_tied))
        text = Calibration(folder / "tokenizer.json", 32, toys.VOCAB_SIZE).first_tokens(toys.MAX_CONTEXT)
        split = smoothed(
            split, text
        ).split  # as in a program: a head's columns are scaled, and so is a table's
        data = (folder / "program.pte").read_bytes()
        for segment in ("lm_head", "embed_tokens"):
            rows = int8_per_channel(split.weights[segment][0])[0].numpy().tobytes()
            assert data.count(rows) == 1
    tied, untied = ((folder / "program.pte").stat().st_size for folder in (tied_dir, toy_8da8w_dir))
    assert untied - tied >= TABLE


def test_rows_are_the_references(toy_8da8w_dir):
    found = dw.open(toy_8da8w_dir).methods["embed_tokens"]
    ids = np.array([[0, 7, 7, toys.VOCAB_SIZE - 1]])
    values, scales, _ = int8_per_channel(toys.module().model.embed_tokens.weight.detach())
    expected = table_rows_reference(values, scales, torch.from_numpy(ids)).numpy()
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
