"""Plans: followed step by step over plain bytes, they compute what the calls say, and nothing meets in a buffer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doubleweave.ir.interface import Interface
from doubleweave.ir.split import (
    Call,
    FixedSizes,
    Function,
    Port,
    Range,
    Segment,
    SizeRanges,
    Split,
    State,
    Value,
)
from doubleweave.ir.trees import Tree
from doubleweave.schedule.module_plan import make
from doubleweave.schedule.module_steps import Plan

PRIME = 10007  # values stay below it, so that every dtype holds them and sums are exact
MOST = 40
LAYOUTS = (("T",), ("T", 3), (2, "T", 2), (3, "T"), (1, "T", 4))
DTYPES = ("int64", "int32", "int16")
INTERFACE = Interface((), Tree("tensor"))


def rows_axis(shape):
    return next((axis for axis, size in enumerate(shape) if isinstance(size, str)), None)


def compute(segment, arrays):
    """What a segment computes in these tests: rows that do not depend on one another, but through a state.

    Every row of every result depends on that row of every input, on the segment and on its place in the row.
    """
    rows = np.zeros(1, np.int64) + 7 * len(segment.name)
    state = None
    for number, (port, array) in enumerate(zip(segment.inputs, arrays, strict=True)):
        array = array.astype(np.int64)
        if port.name.startswith("state"):
            state = array
            continue
        axis = rows_axis(port.shape)
        axis = 0 if axis is None else axis
        moved = np.moveaxis(array, axis, 0)
        total = moved.reshape(len(moved), -1).sum(1) if rows_axis(port.shape) is not None else array.sum()
        rows = (rows + (number + 1) * total) % PRIME
    if state is not None:
        rows = (state[0] + np.cumsum(rows)) % PRIME
    results = []
    for number, port in enumerate(segment.outputs):
        if port.name.startswith("state"):
            results.append(rows[-1:])
            continue
        axis = rows_axis(port.shape)
        sizes = [len(rows) if i == axis else int(size) for i, size in enumerate(port.shape)]
        wide = rows.reshape([-1 if i == axis else 1 for i in range(len(sizes))]) if axis is not None else rows
        place = np.arange(math.prod(sizes[:axis] if axis is not None else sizes))
        lead = place.reshape([*(sizes[:axis] if axis is not None else sizes)])
        lead = lead.reshape(*lead.shape, *[1] * (len(sizes) - lead.ndim))
        found = (
            np.broadcast_to(wide, sizes) * (number + 2)
            + 31 * lead
            + np.arange(sizes[-1]) * (axis != len(sizes) - 1)
        )
        results.append((found % PRIME).astype(port.dtype))
    return results


def call_by_call(split, function, inputs, states):
    """The results of a function with every tensor whole; `states` are changed."""
    names = {value.name: array for value, array in zip(function.inputs, inputs, strict=True)}
    names |= {state.value: states[state.value] for state in function.states}
    for call in function.calls:
        reads = [names[name] for name in call.reads]
        if call.callee == "function":
            results = call_by_call(split, split.function(call.segment), reads, states)
        else:
            results = compute(split.segment(call.segment), reads)
        names.update(zip(call.writes, results, strict=True))
    for state in function.states:
        states[state.value] = names[state.next]
    return [names[name] for name in function.outputs]


@dataclass
class Follower:
    """Follows plans over bytes, and checks that nothing is read before it is written, or written twice."""

    split: Split
    states: dict[str, list[np.ndarray]]  # two buffers each
    current: dict[str, int] = field(default_factory=dict)

    def run(self, plan: Plan, inputs):
        self.plan = plan
        self.buffers = [np.full(size, 0xCD, np.uint8) for size in plan.buffer_bytes]
        self.written = [np.zeros(tensor.num_bytes, np.uint8) for tensor in plan.tensors]
        self.memory = []
        for index, tensor in enumerate(plan.tensors):
            if tensor.place == "input":
                assert plan.inputs[tensor.number] == index
                self.memory.append(np.frombuffer(inputs[tensor.number].tobytes(), np.uint8))  # read-only
                self.written[index][:] = 1
            elif tensor.place == "state":
                which = (self.current.get(tensor.name, 0) + tensor.number) % 2
                self.memory.append(self.states[tensor.name][which].view(np.uint8))
                self.written[index][:] = 1  # from the run before, or by the update before
            elif tensor.place == "output":
                self.memory.append(np.full(tensor.num_bytes, 0xAB, np.uint8))
            else:
                assert tensor.number >= 0 or not tensor.writers
                self.memory.append(
                    self.buffers[tensor.number][: tensor.num_bytes]
                    if tensor.writers
                    else np.zeros(0, np.uint8)
                )
        for number, step in enumerate(plan.steps):
            self.step(number, step)
        for tensor, written in zip(plan.tensors, self.written, strict=True):
            if tensor.writers:
                assert (written == 1).all(), f"{tensor.name}: a byte was not written, or twice"
        for name, times in plan.updates.items():
            self.current[name] = (self.current.get(name, 0) + times) % 2
        return [self.whole(index) for index in plan.outputs]

    def whole(self, index):
        tensor = self.plan.tensors[index]
        return self.memory[index].view(tensor.dtype).reshape(tensor.sizes)

    def bytes_of(self, index, start, count):
        assert 0 <= start <= start + count <= self.plan.tensors[index].num_bytes
        return slice(start, start + count)

    def write(self, number, index, where, data):
        tensor = self.plan.tensors[index]
        assert tensor.place != "input"
        assert number in tensor.writers
        if number == tensor.writers[0] and tensor.place == "buffer" and not self.written[index].any():
            self.memory[index][:] = 0xCD  # what another tensor left there is nothing to rely on
        self.memory[index][where] = data
        if tensor.place != "state":
            self.written[index][where] += 1

    def read(self, number, index, where):
        assert number in self.plan.tensors[index].readers
        assert (self.written[index][where] == 1).all(), "read before it was written"
        return self.memory[index][where]

    def step(self, number, step):
        if step.copy is not None:
            copy = step.copy
            assert step.method == ""
            for block in range(copy.num_blocks):
                source = copy.source_offset + block * copy.source_stride
                target = copy.target_offset + block * copy.target_stride
                data = self.read(number, copy.source, self.bytes_of(copy.source, source, copy.block_bytes))
                where = self.bytes_of(copy.target, target, copy.block_bytes + copy.pad_bytes)
                self.write(number, copy.target, where, np.append(data, np.zeros(copy.pad_bytes, np.uint8)))
            return
        segment = self.split.segment(step.segment)
        size = segment.methods()[step.method]
        arrays = []
        for port, view in zip(segment.inputs, step.reads, strict=True):
            self.check_sizes(port, view.sizes, size)
            count = math.prod(view.sizes) * np.dtype(port.dtype).itemsize
            data = self.read(number, view.tensor, self.bytes_of(view.tensor, view.offset, count))
            arrays.append(data.view(port.dtype).reshape(view.sizes).copy())
        results = compute(segment, arrays)
        for port, view, result in zip(segment.outputs, step.writes, results, strict=True):
            self.check_sizes(port, view.sizes, size)
            assert result.shape == view.sizes
            data = np.ascontiguousarray(result.astype(port.dtype)).view(np.uint8).reshape(-1)
            self.write(number, view.tensor, self.bytes_of(view.tensor, view.offset, data.size), data)

    def check_sizes(self, port, sizes, size):
        assert len(sizes) == len(port.shape)
        if size is not None and rows_axis(port.shape) is not None:
            assert sizes[rows_axis(port.shape)] == size


class Maker:
    """Draws a split: functions of dynamic, chunked and fixed segments, with states."""

    def __init__(self, draw):
        self.draw = draw
        self.segments = []

    def port(self, name, prefix=()):
        layout = self.draw(st.sampled_from(LAYOUTS))
        return Port(name, self.draw(st.sampled_from(DTYPES)), layout)

    def segment(self, reads, num_writes, has_state=False, may_be_chunked=True):
        name = f"s{'x' * len(self.segments)}"
        sizes = tuple(self.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True)))
        if has_state:
            sizes = tuple(dict.fromkeys((1, *sizes)))
        dynamic = SizeRanges((Range("T", 1, MOST),))
        shape = self.draw(st.sampled_from([FixedSizes(sizes), dynamic])) if may_be_chunked else dynamic
        state = (Port("state", "int64", (1,)),) if has_state else ()
        inputs = tuple(Port(f"in{i}", value.dtype, value.shape) for i, value in enumerate(reads))
        outputs = tuple(self.port(f"out{i}") for i in range(num_writes))
        at_front = self.draw(st.booleans())
        outputs = (*state, *outputs) if at_front else (*outputs, *state)
        found = Segment(name, "cpu", "xnnpack", shape, (*inputs, *state), outputs, name)
        self.segments.append(found)
        return found

    def function(self, name, inner):
        draw = self.draw
        inputs = [self.port(f"{name}i{i}") for i in range(draw(st.integers(1, 3)))]
        values = {port.name: Value(port.name, port.dtype, port.shape, "input") for port in inputs}
        has_rows = list(values)
        small = []  # without rows: read whole by every chunk
        if draw(st.booleans()):
            values["fixed"] = Value("fixed", "int32", (3,), "input")
            small.append("fixed")
        states, calls = [], []
        # States that no segment changes: each becomes something else when the function ends.
        moved = [f"{name}moved{i}" for i in range(draw(st.sampled_from([0, 0, 1, 2])))]
        values |= {state: Value(state, "int64", (1,), "state") for state in moved}
        small += moved

        def add(segment, reads, callee="segment", outputs=None):
            writes = []
            for number, port in enumerate(outputs or segment.outputs):
                written = f"{name}v{len(calls)}.{number}"
                if port.name == "state":
                    written = f"{states[-1]}.next"
                    if isinstance(segment.shape, SizeRanges):  # in chunks nothing else may see it
                        small.extend([*states[-1:], written])
                else:
                    (has_rows if rows_axis(port.shape) is not None else small).append(written)
                values[written] = Value(written, port.dtype, port.shape, "chunk")
                writes.append(written)
            calls.append(Call(f"c{len(calls)}", segment.name, tuple(reads), tuple(writes), callee=callee))

        def dynamic(read, port):
            """A call that makes a value like `port`."""
            segment = Segment(
                f"s{'x' * len(self.segments)}",
                "npu",
                "xnnpack",
                SizeRanges((Range("T", 1, MOST),)),
                (Port("in0", values[read].dtype, values[read].shape),),
                (Port("out0", port.dtype, port.shape),),
                "",
            )
            self.segments.append(segment)
            add(segment, [read])

        for _ in range(draw(st.integers(1, 6))):
            kind = draw(st.sampled_from(["rows", "rows", "state", "function"]))
            if kind == "function" and inner is not None:
                reads = []
                for wanted in inner.inputs:
                    alike = [
                        n for n, v in values.items() if (v.dtype, v.shape) == (wanted.dtype, wanted.shape)
                    ]
                    alike = [n for n in alike if n in has_rows or n in small]
                    if not alike and wanted.name == "fixed":
                        values["fixed"] = Value("fixed", "int32", (3,), "input")
                        small.append("fixed")
                        alike = ["fixed"]
                    elif not alike:
                        dynamic(draw(st.sampled_from(has_rows)), wanted)
                        alike = has_rows[-1:]
                    reads.append(draw(st.sampled_from(alike)))
                add(inner, reads, "function", [inner.value(output) for output in inner.outputs])
                continue
            reads = draw(st.lists(st.sampled_from(has_rows), min_size=1, max_size=3))
            if small and draw(st.booleans()):
                reads.append(draw(st.sampled_from(small)))
            # What changes chunk by chunk only one segment may see (split_module.py).
            sees_state = any(n in moved or n.removesuffix(".next") in states for n in reads)
            segment = self.segment(
                [values[n] for n in reads], draw(st.integers(1, 2)), kind == "state", not sees_state
            )
            if kind == "state":
                states.append(f"{name}state{len(states)}")
                values[states[-1]] = Value(states[-1], "int64", (1,), "state")
                reads.append(states[-1])
            add(segment, reads)
        outputs = tuple(draw(st.lists(st.sampled_from(has_rows + small), min_size=1, max_size=4)))
        ones = [n for n in small if values[n].shape == (1,)]
        return Function(
            name=name,
            calls=tuple(calls),
            values=tuple(values.values()),
            outputs=outputs,
            ranges=(Range("T", 1, MOST),),
            states=(
                *(State(state, f"{state}.next") for state in states),
                *(State(state, draw(st.sampled_from(ones))) for state in moved),
            ),
            interface=INTERFACE,
        )


@st.composite
def splits(draw):
    maker = Maker(draw)
    inner = maker.function("inner", None) if draw(st.booleans()) else None
    main = maker.function("", inner)
    return Split(tuple(maker.segments), (main, inner) if inner else (main,))


def example(function, rows, seed=0):
    random = np.random.default_rng(seed)
    return [
        random.integers(0, PRIME, [rows if size == "T" else size for size in value.shape]).astype(value.dtype)
        for value in function.inputs
    ]


def plan_of(split, arrays, function=None):
    return make(split, function or split.main, "main", [(str(a.dtype), a.shape) for a in arrays])


@settings(max_examples=150)
@given(splits(), st.lists(st.integers(1, MOST), min_size=1, max_size=3))
def test_a_plan_computes_every_row_once_and_only_what_the_calls_say(split, runs):
    states = {value.name: np.zeros(1, np.int64) for value in split.states}
    follower = Follower(split, {name: [np.zeros(1, np.int64), np.full(1, 99)] for name in states})
    for seed, rows in enumerate(runs):
        arrays = example(split.main, rows, seed)
        plan = plan_of(split, arrays)
        found = follower.run(plan, arrays)
        wanted = call_by_call(split, split.main, arrays, states)
        for got, want, name in zip(found, wanted, split.main.outputs, strict=True):
            assert np.array_equal(got, want), name
        for name, value in states.items():
            assert follower.states[name][follower.current.get(name, 0)][0] == value[0], name


@settings(max_examples=150)
@given(splits(), st.integers(1, MOST))
def test_live_tensors_never_share_a_buffer(split, rows):
    plan = plan_of(split, example(split.main, rows))
    spans = []
    for index, tensor in enumerate(plan.tensors):
        if tensor.place != "buffer" or not tensor.writers:
            continue
        last = plan.last_use(index)
        assert last is not None
        assert plan.buffer_bytes[tensor.number] >= tensor.num_bytes
        for number, begin, end in spans:
            assert number != tensor.number or end < tensor.writers[0] or last < begin
        spans.append((tensor.number, tensor.writers[0], last))
    assert {number for number, *_ in spans} == set(range(len(plan.buffer_bytes)))
    assert plan.peak_bytes() <= sum(plan.buffer_bytes)


@given(splits(), st.integers(1, MOST))
def test_results_are_the_callers_own(split, rows):
    plan = plan_of(split, example(split.main, rows))
    places = [plan.tensors[index] for index in dict.fromkeys(plan.outputs)]
    assert [tensor.place for tensor in places] == ["output"] * len(places)
    assert [tensor.number for tensor in places] == list(range(len(places)))
    same = {}
    for name, index in zip(split.main.outputs, plan.outputs, strict=True):
        assert same.setdefault(name, index) == index  # the same value twice is one tensor


def segment(name, shape, inputs, outputs, device="cpu"):
    return Segment(
        name,
        device,
        "xnnpack",
        shape,
        tuple(Port(f"in{i}", "int64", port) for i, port in enumerate(inputs)),
        tuple(Port(f"out{i}", "int64", port) for i, port in enumerate(outputs)),
        name,
    )


def value(name, shape, kind="chunk", dtype="int64"):
    return Value(name, dtype, shape, kind)


def chain(*segments, shape=("T", 3)):
    """x through one segment after the other."""
    names = ["x", *(f"y{i}" for i in range(len(segments)))]
    calls = [Call(f"c{i}", s.name, (names[i],), (names[i + 1],)) for i, s in enumerate(segments)]
    values = [value("x", shape, "input"), *(value(name, shape) for name in names[1:])]
    function = Function(
        "", tuple(calls), tuple(values), (names[-1],), (Range("T", 1, MOST),), interface=INTERFACE
    )
    return Split(tuple(segments), (function,))


ROW = ("T", 3)
DYNAMIC = SizeRanges((Range("T", 1, MOST),))


def test_a_chain_needs_two_buffers():
    split = chain(*(segment(f"s{i}", DYNAMIC, [ROW], [ROW]) for i in range(9)))
    plan = plan_of(split, example(split.main, 5))
    assert plan.buffer_bytes == (120, 120)
    assert plan.peak_bytes() == 240
    assert len(plan.steps) == 9
    assert plan.methods() == [f"s{i}" for i in range(9)]


def test_chunks_of_rows_that_lie_together_are_not_copied():
    split = chain(segment("s", FixedSizes((4, 8)), [ROW], [ROW]))
    plan = plan_of(split, example(split.main, 20))
    assert [step.method for step in plan.steps] == ["s@8", "s@8", "s@4"]
    assert [step.chunk for step in plan.steps] == [0, 1, 2]
    for start, step in zip((0, 8, 16), plan.steps, strict=True):
        assert step.reads[0].offset == step.writes[0].offset == start * 3 * 8
        assert step.reads[0].tensor == plan.inputs[0]
        assert step.writes[0].tensor == plan.outputs[0]
    assert plan.buffer_bytes == ()


def test_only_the_last_chunk_is_padded_and_copied():
    split = chain(segment("s", FixedSizes((4, 8)), [ROW], [ROW]))
    plan = plan_of(split, example(split.main, 11))
    assert [step.method for step in plan.steps] == ["s@8", "", "s@4", ""]
    into, out_of = plan.steps[1].copy, plan.steps[3].copy
    row = 3 * 8
    assert (into.source_offset, into.block_bytes, into.pad_bytes) == (8 * row, 3 * row, row)
    assert (out_of.target_offset, out_of.block_bytes, out_of.pad_bytes) == (8 * row, 3 * row, 0)
    assert plan.tensors[into.target].sizes == plan.tensors[out_of.source].sizes == (4, 3)


def test_rows_along_an_inner_axis_are_gathered_block_by_block():
    shape = (2, "T", 3)
    split = chain(segment("s", FixedSizes((4,)), [shape], [shape]), shape=shape)
    plan = plan_of(split, example(split.main, 6))
    into = plan.steps[0].copy
    assert (into.num_blocks, into.source_stride, into.target_stride) == (2, 6 * 24, 4 * 24)
    assert [step.method for step in plan.steps] == ["", "s@4", "", "", "s@4", ""]


def test_an_input_as_result_is_copied():
    function = Function("", (), (value("x", ROW, "input"),), ("x", "x"), (Range("T", 1, MOST),))
    plan = plan_of(Split((), (function,)), [np.zeros((4, 3), np.int64)])
    assert len(plan.steps) == 1
    assert plan.steps[0].copy is not None
    assert plan.outputs[0] == plan.outputs[1] != plan.inputs[0]


def counter(shape, *, outputs=("y",), second=None):
    """A function that reads and updates one state; `second` reads the new value after."""
    state = Port("state", "int64", (1,))
    sums = Segment("sums", "npu", "x", shape, (Port("in0", "int64", ROW), state), (state,), "sums")
    values = [value("x", ROW, "input"), value("n", (1,), "state"), value("n.next", (1,))]
    calls = [Call("sums", "sums", ("x", "n"), ("n.next",))]
    segments = [sums]
    if second is not None:
        segments.append(second)
        values.append(value("y", ROW))
        calls.append(Call("second", second.name, ("x", "n.next"), ("y",)))
    return tuple(segments), Function(
        "counter",
        tuple(calls),
        tuple(values),
        outputs,
        (Range("T", 1, MOST),),
        (State("n", "n.next"),),
        INTERFACE,
    )


def test_a_states_buffers_take_turns():
    segments, inner = counter(DYNAMIC, second=segment("second", DYNAMIC, [ROW, (1,)], [ROW]))
    values = [value("x", ROW, "input"), *(value(f"y{i}", ROW) for i in range(3))]
    calls = tuple(Call(f"c{i}", "counter", ("x",), (f"y{i}",), callee="function") for i in range(3))
    main = Function("", calls, tuple(values), ("y0", "y1", "y2"), (Range("T", 1, MOST),))
    split = Split(segments, (main, inner))
    arrays = example(main, 4)
    plan = plan_of(split, arrays)
    sums = [step for step in plan.steps if step.segment == "sums"]
    number = [plan.tensors[step.reads[1].tensor].number for step in sums]
    assert number == [0, 1, 0]
    assert [plan.tensors[step.writes[0].tensor].number for step in sums] == [1, 0, 1]
    assert plan.updates == {"n": 3}
    assert [step.name for step in sums] == ["c0/sums", "c1/sums", "c2/sums"]
    states = {"n": np.zeros(1, np.int64)}
    follower = Follower(split, {"n": [np.zeros(1, np.int64), np.zeros(1, np.int64)]})
    for _ in range(3):  # an odd number of updates: the next run begins in the other buffer
        found = follower.run(plan, arrays)
        wanted = call_by_call(split, main, arrays, states)
        assert all(map(np.array_equal, found, wanted))


@pytest.mark.parametrize("outputs", [("n",), ("n.next",), ("n", "n.next")])
def test_a_state_that_is_returned_stays_as_it_was_then(outputs):
    segments, inner = counter(DYNAMIC, outputs=outputs)
    values = [value("x", ROW, "input")]
    calls = []
    for number in range(4):
        writes = tuple(f"y{number}.{place}" for place in range(len(outputs)))
        values += [value(name, (1,)) for name in writes]
        calls.append(Call(f"c{number}", "counter", ("x",), writes, callee="function"))
    names = tuple(v.name for v in values[1:])
    main = Function("", tuple(calls), tuple(values), names, (Range("T", 1, MOST),))
    split = Split(segments, (main, inner))
    arrays = example(main, 3)
    found = Follower(split, {"n": [np.full(1, 5), np.zeros(1, np.int64)]}).run(plan_of(split, arrays), arrays)
    wanted = call_by_call(split, main, arrays, {"n": np.full(1, 5)})
    assert len({array.item() for array in wanted}) >= 4
    assert all(map(np.array_equal, found, wanted))


@pytest.mark.parametrize(
    ("rows", "methods"), [(1, ["@1"]), (4, ["@4"]), (6, ["@4", "@1", "@1"]), (12, ["@4"] * 3)]
)
def test_chunks_with_a_state_add_up_without_padding(rows, methods):
    segments, inner = counter(FixedSizes((1, 4)), outputs=("x",))
    plan = plan_of(Split(segments, (inner,)), example(inner, rows))
    steps = [step for step in plan.steps if step.copy is None]
    assert [step.method for step in steps] == [f"sums{m}" for m in methods]
    assert plan.updates == {"n": len(methods)}
    numbers = [plan.tensors[step.reads[1].tensor].number for step in steps]
    assert numbers == [i % 2 for i in range(len(methods))]
    assert [plan.tensors[step.writes[0].tensor].number for step in steps] == [1 - n for n in numbers]
