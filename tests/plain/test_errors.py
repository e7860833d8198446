"""The tree of errors: one base, and the built-in type that fits, so that either can be caught."""

from __future__ import annotations

import inspect

import pytest

from doubleweave import errors


def all_errors() -> list[type[BaseException]]:
    return [
        item
        for _, item in inspect.getmembers(errors, inspect.isclass)
        if item.__module__ == errors.__name__ and item is not errors.DoubleweaveError
    ]


def test_there_are_the_errors_we_know():
    assert {error.__name__: error.__mro__[2].__name__ for error in all_errors()} == {
        "BackendError": "RuntimeError",
        "CheckError": "RuntimeError",
        "InputError": "ValueError",
        "LowerError": "RuntimeError",
        "PolicyError": "ValueError",
        "ProgramError": "ValueError",
        "RunError": "RuntimeError",
        "ScheduleError": "ValueError",
        "SourceError": "ValueError",
        "SplitError": "ValueError",
    }


@pytest.mark.parametrize("error", all_errors())
def test_each_is_caught_by_the_base_and_says_when_it_is_raised(error):
    assert issubclass(error, errors.DoubleweaveError)
    assert issubclass(error, Exception)
    assert error.__doc__
    assert str(error("where: found, expected")) == "where: found, expected"
