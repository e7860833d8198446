"""Refusals of a policy."""

from __future__ import annotations

from torch import nn

from doubleweave import Dynamic, Static
from refusals.provoke import Case, M, X, aten, fc, linear, model, split

POLICY = [
    Case(
        "policy_type",
        "The policy is no dict",
        lambda: split(linear(), X, policy=[("", Static())]),
        "PolicyError: policy: found a list, expected a dict",
        "Write `{key: rule}`.",
    ),
    Case(
        "rule_type",
        "A value is no rule",
        lambda: fc(Static),
        "PolicyError: policy: 'fc' is the class Static, expected doubleweave.Static(…) or "
        "doubleweave.Dynamic(…)",
        "Write `Static()`, `Static(device=…)`, `Dynamic(…)`.",
    ),
    Case(
        "device",
        "A device is no name",
        lambda: fc(Static(device="npu 0")),
        "PolicyError: policy: 'fc': found device 'npu 0', expected a name such as 'npu' or 'cpu'",
        "A device is a name of your choice: letters, digits, `.`, `_` and `-`.",
    ),
    Case(
        "sizes_without_chunk",
        "`sizes` without `chunk`",
        lambda: fc(Static(sizes=(1, 8))),
        "PolicyError: policy: 'fc': sizes=(1, 8) are those of chunks, and it has no chunk; add "
        'chunk={"argument": axis}',
        "Say which axis is cut into chunks of these sizes, or leave `sizes` out.",
    ),
    Case(
        "chunk_empty",
        "`chunk` names nothing",
        lambda: fc(Static(chunk={})),
        "PolicyError: policy: 'fc': found chunk={}, expected {\"argument\": axis, …}",
        "Name the axis of each argument that has the rows.",
    ),
    Case(
        "size_range",
        "A chunk of a size that cannot be",
        lambda: fc(Static(chunk={"input": 0}, sizes=(0,))),
        "PolicyError: policy: 'fc': found size 0, expected 1 to 4096 rows",
        "Give whole numbers of rows.",
    ),
    Case(
        "key_type",
        "A key of another kind",
        lambda: fc(Static(), 3),
        "PolicyError: policy: found key 3, expected a module name, a pattern 're:…', a module "
        "class or an operator such as torch.ops.aten.softmax.int",
        "Use the module's name, not the module itself.",
    ),
    Case(
        "key_pattern",
        "A pattern that cannot be read",
        lambda: fc(Static(), "re:("),
        "PolicyError: policy: 're:(' is not a pattern (missing ), unterminated subpattern at position 0)",
        "Python's `re` reads what follows `re:`.",
    ),
    Case(
        "key_unknown",
        "A name that no module has",
        lambda: fc(Static(), "Fc"),
        "PolicyError: policy: key 'Fc' matches no module of Model; names near it: fc",
        "`dict(module.named_modules())` has all names.",
    ),
    Case(
        "key_without_modules",
        "A name, and the module has none nested",
        lambda: split(nn.ReLU(), X, policy={"fc": Static()}),
        "PolicyError: policy: key 'fc' matches no module of ReLU; it has no nested modules",
        'The whole module is `""`.',
    ),
    Case(
        "pattern_unknown",
        "A pattern that no name matches in full",
        lambda: fc(Static(), "re:layers.*"),
        "PolicyError: policy: pattern 're:layers.*' matches no module of Model; its names are fc",
        "Patterns match whole names.",
    ),
    Case(
        "class_unknown",
        "A class that no module has",
        lambda: fc(Static(), nn.Conv1d),
        "PolicyError: policy: no module is a Conv1d; this one has Linear, Model",
        "Take one of those that it has.",
    ),
    Case(
        "two_rules",
        "One module under two names with two rules",
        lambda: split(
            (lambda fc: model(lambda self, x: self.a(self.b(x)), a=fc, b=fc))(linear()),
            X,
            policy={"a": Static(), "b": Dynamic()},
        ),
        "PolicyError: policy: 'a' and 'b' are one module, and have different rules; give it one",
        "Name it once, or twice with the same rule.",
    ),
    Case(
        "operator_chunk",
        "An operator with `chunk`",
        lambda: fc(Static(chunk={"x": 0}), aten.linear.default),
        "PolicyError: policy: aten.linear.default is an operator, whose sizes are those of what "
        "it is called with; leave chunk out",
        "Name the module around the operator where it has to be cut.",
    ),
    Case(
        "operator_dims",
        "An operator with dims",
        lambda: fc(Dynamic({"x": {0: M}}), aten.linear.default),
        "PolicyError: policy: aten.linear.default is an operator, whose sizes are those of what "
        "it is called with; leave dims out",
        "Name the module around the operator where dims are needed.",
    ),
    Case(
        "operator_unknown",
        "An operator that is not called",
        lambda: fc(Dynamic(), aten.softmax.int),
        "PolicyError: policy: Model does not call aten.softmax.int; operators that it calls: "
        "aten.linear.default",
        "Take one of those that it calls.",
    ),
    Case(
        "never_called",
        "A module whose `forward` is not called",
        lambda: split(
            model(lambda self, x: self.layers[0](x), layers=nn.ModuleList([linear()])),
            X,
            policy={"layers": Static()},
        ),
        "PolicyError: policy: 'layers' names 'layers', whose forward is never called for these "
        "arguments; leave the key out, or name the module whose forward is",
        "Name the modules in the list, or the one around it.",
    ),
]
