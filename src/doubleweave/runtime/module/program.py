"""A compiled module, opened: called as the module, its nested modules one by one. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from doubleweave.ir import manifest
from doubleweave.runtime.instances import open_instances
from doubleweave.runtime.module.method import Method, segment_functions
from doubleweave.runtime.module.runner import Runner
from doubleweave.runtime.module.states import States
from doubleweave.runtime.module.submit import Result, Workers
from doubleweave.timeline.timeline import Timeline


class ModuleProgram:
    """A compiled module. Call it as the module; `methods` has its pieces: nested modules by qualified name, the glue
    between them as glue_0 …, fixed sizes as name@size.

    `state` has what the module's `forward` changes; `session()` gives another, independent set. `threads` is how
    many threads a call uses (the machine's cores at first).
    """

    def __init__(self, folder: Path, found: manifest.Manifest) -> None:
        self.folder = folder
        self.manifest = found
        self.name, self.split = found.name, found.split
        self._instances = open_instances(folder, found.split)
        self._workers = Workers()
        self._session = ModuleSession(self)
        self.methods, self.state = self._session.methods, self._session.state

    def __repr__(self) -> str:
        return f"<program {self.manifest.name}: {', '.join(self.methods)}>"

    @property
    def timeline(self) -> Timeline | None:
        """What ran in the last call, where `record` was set."""
        return self._session.timeline

    @property
    def record(self) -> bool:
        """Whether calls keep a timeline."""
        return self._workers.record

    @record.setter
    def record(self, value: bool) -> None:
        self._workers.record = bool(value)

    @property
    def threads(self) -> int:
        return self._workers.threads

    @threads.setter
    def threads(self, value: int) -> None:
        self._workers.threads = value

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Run the whole module; see Method."""
        return self._session(*args, out=out, **kwargs)

    def submit(self, *args: Any, out: Any = None, **kwargs: Any) -> Result:
        """Run the whole module on a worker; see Method.submit."""
        return self._session.main.submit(*args, out=out, **kwargs)

    def session(self) -> ModuleSession:
        """An independent set of states over the same methods."""
        return ModuleSession(self)


class ModuleSession:
    """A program with its own states; made by `ModuleProgram.session`."""

    def __init__(self, program: ModuleProgram) -> None:
        split = program.split
        self.state = States(split, program.folder / manifest.STATE_FILE)
        self._runner = Runner(split, program._instances, self.state)
        self.main = Method(program.name, split.main, self._runner, program._workers)
        found = segment_functions(split.segments)
        found.update((function.name, function) for function in split.functions[1:])
        self.methods = {
            name: Method(name, function, self._runner, program._workers)
            for name, function in sorted(found.items())
        }

    @property
    def timeline(self) -> Timeline | None:
        return self._runner.timeline

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        return self.main(*args, out=out, **kwargs)

    def reset(self) -> None:
        """Give every state its first value."""
        self.state.reset()
