"""A compiled module, opened: called as the module, its nested modules one by one. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from doubleweave.ir import manifest
from doubleweave.runtime.instances import Instances, open_instances
from doubleweave.runtime.module.method import Method, segment_functions
from doubleweave.runtime.module.runner import Runner
from doubleweave.runtime.module.states import States
from doubleweave.runtime.module.submit import Result, Workers
from doubleweave.timeline.timeline import Timeline


class ModuleSession:
    """A program with its own states; made by `ModuleProgram.session`."""

    def __init__(
        self, folder: Path, found: manifest.Manifest, instances: Instances, workers: Workers
    ) -> None:
        split = found.split
        self.state = States(split, folder / manifest.STATE_FILE)
        self._runner = Runner(split, instances, self.state)
        self.main = Method(found.name, split.main, self._runner, workers)
        functions = segment_functions(split.segments)
        functions.update((function.name, function) for function in split.functions[1:])
        self.methods = {
            name: Method(name, function, self._runner, workers)
            for name, function in sorted(functions.items())
        }

    @property
    def timeline(self) -> Timeline | None:
        """What ran in the last call, where the program's `record` was set."""
        return self._runner.timeline

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Run the whole module; see Method."""
        return self.main(*args, out=out, **kwargs)

    def reset(self) -> None:
        """Give every state its first value."""
        self.state.reset()


class ModuleProgram(ModuleSession):
    """A compiled module, which is a session itself. Call it as the module; `methods` has its pieces: nested modules by
    qualified name, the glue between them as glue_0 …, fixed sizes as name@size.

    `state` has what the module's `forward` changes; `session()` gives another, independent set. `threads` is how
    many threads a call uses (the machine's cores at first).
    """

    def __init__(self, folder: Path, found: manifest.Manifest) -> None:
        self.folder = folder
        self.manifest = found
        self.name, self.split = found.name, found.split
        self._instances = open_instances(folder, found.split)
        self._workers = Workers()
        super().__init__(folder, found, self._instances, self._workers)

    def __repr__(self) -> str:
        return f"<program {self.name}: {', '.join(self.methods)}>"

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

    def submit(self, *args: Any, out: Any = None, **kwargs: Any) -> Result:
        """Run the whole module on a worker; see Method.submit."""
        return self.main.submit(*args, out=out, **kwargs)

    def session(self) -> ModuleSession:
        """An independent set of states over the same methods."""
        return ModuleSession(self.folder, self.manifest, self._instances, self._workers)
