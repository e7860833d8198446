"""These tests need torch and the compile extra: they compile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import needs
import toys


def pytest_collect_file() -> None:
    needs.compile_extra()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("compile")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy as a Hugging Face folder, which no test changes."""
    return toys.save_hugging_face(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved`, for one test."""
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture(scope="session")
def static_attention_dir(made_once: Callable[..., Path]) -> Path:
    """The toy in float32 with attention over a cache of 64 tokens, fixed sizes 1 and 8."""
    import doubleweave

    options: dict[str, Any] = {"quantize": "none", "attention": "static", "max_context": 64, "chunk": (1, 8)}
    return made_once(
        "static_attention", lambda folder: doubleweave.compile_llm(toys.model(), folder, **options)
    )


_templates: dict[Any, Any] = {}


@pytest.fixture(scope="module")
def lowered_once() -> Iterator[None]:
    """Compile in this process, and lower a structure once for all programs of the tests that ask for this.

    What was lowered over made-up weights serves any: here not only in one program, as in the product.
    """
    from doubleweave.compiler.lower import lower
    from doubleweave.compiler.lower.templates import made_up

    patch = pytest.MonkeyPatch()
    patch.setattr(os, "sched_getaffinity", lambda pid: {0})
    lower_graph = lower.lower_graph

    def lower_once(graph: Any, over: Any, segment: Any, methods: Any) -> Any:
        ports, placed = (segment.inputs, segment.outputs), (segment.backend, segment.target, segment.recipe)
        # Recipes rewrite a structure's graph and keep its name.
        nodes = tuple(f"{node.format_node()} {node.kwargs}" for node in graph.graph.nodes)
        key = (segment.structure, nodes, segment.shape, ports, placed, tuple(methods.values()))
        if key not in _templates:
            _templates[key] = lower_graph(graph, made_up(over.weights), segment, methods)
        if all(template.is_complete for template in _templates[key].values()):
            return _templates[key]
        return lower_graph(graph, over, segment, methods)

    patch.setattr(lower, "lower_graph", lower_once)
    yield
    patch.undo()
