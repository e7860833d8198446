"""A worker's side of the conversation: one JSON request a line in, one JSON answer a line out.

It knows nothing of any engine. Standard output is kept for answers: whatever a library prints goes to stderr.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

Operation = Callable[..., dict[str, Any]]


def open_channel() -> Any:
    """The file for answers; call it before importing an engine."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def serve(answers: Any, ready: dict[str, Any], operations: dict[str, Operation]) -> None:
    """Say `ready`, then answer requests ({"op": name, ...arguments}) until standard input ends."""
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = operations[request.pop("op")](**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)
