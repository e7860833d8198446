"""A backend as the compiler sees it: one record. Knows no backend by name, and no registry.

Records are listed without torch: their functions are imported when they are called (`late`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from doubleweave.compiler.program_folder import Progress
from doubleweave.errors import PolicyError
from doubleweave.ir.split import FixedSizes, Segment, SizeRanges
from doubleweave.vendors.library import Library, library_of

if TYPE_CHECKING:
    from torch import fx
    from torch.export import ExportedProgram

    from doubleweave.compiler.backends.lowered import Lowered
    from doubleweave.compiler.backends.unread_weights import UnreadWeights
    from doubleweave.compiler.quantize.calibration import Calibration
    from doubleweave.compiler.quantize.weights import Rounding
    from doubleweave.compiler.split.pieces import TorchSplit
    from doubleweave.compiler.split.weights import Convert


@dataclass(frozen=True)
class Option:
    """An option of one backend: a keyword of compile_llm, and --name on the command line."""

    name: str
    help: str
    kind: Literal["text", "flag", "pairs"] = "text"  # pairs: a dict, and KEY=VALUE that may be repeated
    default: Any = None
    metavar: str = ""
    example: str = ""  # of a pair
    choices: tuple[str, ...] = ()  # the texts that it takes, in small or capital letters
    # The error where it is given for another backend, or for an attention that it does not go with.
    elsewhere: str = "{option}: is an option of the {owner} backend; add backend {owner} or leave it out"

    @property
    def flag(self) -> str:
        return self.name.replace("_", "-")

    def checked(self, value: Any) -> Any:
        """The value as the backend takes it; PolicyError for one that it does not know."""
        if self.kind == "pairs" and not isinstance(value, Mapping):
            raise PolicyError(f"{self.flag}: found {value!r}, expected a dict of {self.metavar}")
        if not self.choices:
            return value
        for choice in self.choices:
            if str(value).lower() == choice.lower():
                return choice
        raise PolicyError(f"{self.flag}: found {value!r}, expected one of {', '.join(self.choices)}")

    def misplaced(self, value: Any, owner: str, attention: str, backend: str) -> PolicyError:
        """The error for the owner's option where another attention or backend is asked for."""
        return PolicyError(
            self.elsewhere.format(
                option=self.flag, value=value, owner=owner, attention=attention, backend=backend
            )
        )


@dataclass(frozen=True)
class Options:
    """How a language model is compiled; compile_llm says what the words mean. `own` has a value for each of the
    backend's own options."""

    backend: Backend
    recipe: str
    sizes: FixedSizes | SizeRanges
    max_context: int
    attention: str = "dynamic"
    cache: str | None = None  # None: the recipe's default, where the model's attention can read it
    own: Mapping[str, Any] = field(default_factory=dict)
    table: str | None = None  # of embeddings; None: int8 where the recipe rounds weights
    name: str = ""  # of the file that has all of this
    is_part: bool = False  # of a model's first layers, whose names a pattern need not match


def late(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when the function is first called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*args, **kwargs)

    return call


@dataclass(frozen=True)
class Backend:
    """The record that a package of doubleweave.compiler.backends defines as BACKEND; `library` is the run time's half.

    The fields from `about` on are for language models. A backend without recipes is not offered for them.
    """

    name: str
    # Lowers exported programs, by method, for a target and a recipe; raises LowerError for what it refuses.
    to_edge: Callable[[dict[str, ExportedProgram], str, str], Lowered]
    # Rewrites a structure's graph before it is lowered.
    prepare: Callable[[fx.GraphModule], tuple[fx.GraphModule, Convert]] | None = None
    # Within it the compiler takes the names of weights that nobody reads for their bytes (unread_weights.py). A backend
    # has it whose program keeps each weight in a place of its own; others need the numbers.
    serialized: Callable[[UnreadWeights], AbstractContextManager[None]] | None = None
    way_out: str = ""  # what a user can do about a segment ("{}") that it refuses
    about: str = ""  # the devices
    recipes: Mapping[str, str] = field(default_factory=dict)  # with what they mean, the default first
    options: tuple[Option, ...] = ()
    takes_fixed_sizes_only: bool = False
    # From a recipe, an attention and own options to those that `place` gets, before any work; raises PolicyError for
    # what does not go together, BackendError for what this machine lacks.
    check: Callable[[str, str, Mapping[str, Any]], Mapping[str, Any]] = lambda recipe, attention, own: own
    # Puts the segments of a split on the backend, and quantizes them.
    place: Callable[[TorchSplit, Options, Calibration, Progress], TorchSplit] | None = None
    # What a split's weights are rounded to; None for a recipe that gains nothing where channels are scaled before
    # (quantize/smooth.py) and weights put on grids (quantize/best_grids.py).
    rounding: Callable[[TorchSplit, Options], Rounding | None] = lambda torch_split, options: None
    # What compiles a segment with less noise, as options of the command line; "" for nothing.
    quieter: Callable[[Segment], str] = lambda segment: ""
    # Static attention adds it to the scores of keys that a query does not see. Finite: masks are products with it, and
    # 0 times infinity is NaN.
    hidden_score: float = -1e9

    @property
    def library(self) -> Library:
        return library_of(self.name)
