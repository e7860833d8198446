"""Every refusal on the way from a module and a policy to a call, with its message; docs/refusals.md is their table.

The cases are in tests/refusals, a file for each subject.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import doubleweave as dw
from doubleweave import Static
from refusals.call_cases import CALLING, OUT, STATES, WRITING
from refusals.dims_cases import DIMS
from refusals.module_cases import MODULE
from refusals.policy_cases import POLICY
from refusals.provoke import Case, X, call, fc, folder, linear, set_state, split, unregistered, whole
from refusals.static_cases import STATIC

DOCS = Path(__file__).parents[2] / "docs" / "refusals.md"
CASES = {
    "The policy": POLICY,
    "Dims": DIMS,
    "Static modules": STATIC,
    "The module and its arguments": MODULE,
    "Lowering and writing": WRITING,
    "Calling": CALLING,
    "Results in memory of your own (`out=`)": OUT,
    "States, threads": STATES,
}
ALL = {case.id: case for cases in CASES.values() for case in cases}


def refusal(case: Case) -> str:
    """The error that a case raises, as Python shows it; what differs from machine to machine made the same."""
    with pytest.raises(dw.DoubleweaveError) as caught:
        case.provoke()
    text = f"{caught.typename}: {caught.value}"
    text = re.sub(r"(provoke|\w+_cases)\.py:\d+", "model.py:12", text)
    text = re.sub(r"1 to \d+ \(the cores", "1 to 8 (the cores", text)
    text = re.sub(r"/\S*/doubleweave\.\w+/", "", text)
    return text.replace(f"{folder()}/", "")


@pytest.fixture(scope="module", autouse=True)
def clean():
    yield
    shutil.rmtree(folder())
    folder.cache_clear()


@pytest.mark.parametrize("case", ALL.values(), ids=lambda case: case.id)
def test_refusal(case):
    assert refusal(case) == case.message


# Names of torch's and ExecuTorch's that say nothing to the reader of a message, and options of the command line.
INTERNALS = (
    r"\b[su]\d+\b|tensors_\d|Traceback|TORCH_LOGS|SymInt|Guard|_native_|TruncToInt|KernelCall|::| -o\b"
)


@pytest.mark.parametrize("case", ALL.values(), ids=lambda case: case.id)
def test_message_is_one_line_without_internals(case):
    assert "\n" not in case.message
    assert not re.search(INTERNALS, case.message)


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def test_docs_have_every_refusal(request):
    """The table is made of the cases, which raise their messages; with --regenerate it is written anew."""
    lines = []
    for section, cases in CASES.items():
        lines += ["", f"## {section}", "", row("When", "Message", "What to do"), row("---", "---", "---")]
        lines += [row(case.when, f"`{case.message}`", case.advice) for case in cases]
    table = "\n".join(lines).strip() + "\n"
    head, _, found = DOCS.read_text().partition("\n## ")
    if request.config.getoption("--regenerate"):
        DOCS.write_text(f"{head}\n{table}")
        found = table.removeprefix("## ")
    assert f"## {found}".splitlines() == table.splitlines()
    rows = [line for line in lines if line.startswith("| ") and "---" not in line and "| When" not in line]
    assert len(set(rows)) == len(rows) == len(ALL)


@pytest.mark.parametrize(
    "provoke",
    [
        pytest.param(lambda: split(linear(), X, policy=Static()), id="policy is a rule"),
        pytest.param(lambda: fc(Static(chunk="input")), id="chunk is a text"),
        pytest.param(lambda: fc(Static(chunk={"input": "0"})), id="axis is a text"),
        pytest.param(
            lambda: fc(Static(chunk={"input": 0}, sizes=4)),
            id="sizes is a number",
        ),
        pytest.param(lambda: split(linear(), "x"), id="argument is a text"),
        pytest.param(lambda: dw.compile(nn.ReLU, (X,)), id="module is a class"),
        pytest.param(lambda: dw.compile(None, (X,)), id="module is None"),
        pytest.param(lambda: dw.compile(nn.ModuleList([linear()]), (X,)), id="module is a container"),
        pytest.param(lambda: split(nn.Linear(4, 4, device="meta"), X), id="weights without numbers"),
        pytest.param(lambda: whole(unregistered, kept=[torch.zeros(4)]), id="state that is no buffer"),
        pytest.param(
            lambda: call(x=torch.nested.nested_tensor([X[0], X[1]])),
            id="nested tensor",
        ),
        pytest.param(lambda: call(x=np.zeros((3, 4), ">f4")), id="other byte order"),
        pytest.param(lambda: set_state("total", None), id="state is None"),
    ],
)
def test_what_nobody_thought_of(provoke):
    """Refused too, with an error of ours."""
    with pytest.raises(dw.DoubleweaveError):
        provoke()
