"""Which profile a program runs by."""

from __future__ import annotations

from dataclasses import replace

import pytest

import toys
from doubleweave.errors import InputError
from doubleweave.ir.manifest import Manifest
from doubleweave.ir.split import FixedSizes, rows
from doubleweave.predict.find_profile import (
    GENERIC,
    PROFILE_FILE,
    find_profile,
    program_id,
    shipped,
    shipped_names,
    this_machine,
)
from doubleweave.predict.profile import Profile
from doubleweave.predict.profile_file import write_profile


def manifest(**model) -> Manifest:
    return Manifest("toy", toys.model_info(**model), toys.split(1, rows(1, 8)), "0" * 64, 0, "", {})


def own(folder, **changes) -> Profile:
    found = manifest()
    profile = Profile("own", "measured", machine=this_machine(), program=program_id(found.split))
    write_profile(replace(profile, **changes), folder / PROFILE_FILE)
    return profile


def test_without_any_it_is_the_generic_one(tmp_path):
    assert find_profile(tmp_path, manifest()).name == shipped(GENERIC).name


def test_the_folders_own(tmp_path):
    own(tmp_path)
    assert find_profile(tmp_path, manifest()).name == "own"


def test_one_of_another_machine_is_left_alone(tmp_path):
    own(tmp_path, machine="another, 64 cores")
    assert find_profile(tmp_path, manifest()).name == shipped(GENERIC).name


def test_named_ones(tmp_path):
    own(tmp_path)
    assert find_profile(tmp_path, manifest(), "sm8650").name == shipped("sm8650").name
    path = tmp_path / "hand.toml"
    write_profile(Profile("by hand", "estimate"), path)
    assert find_profile(tmp_path, manifest(), str(path)).name == "by hand"


@pytest.mark.parametrize("given", [None, "profile.toml"])
def test_one_of_another_program_is_refused(tmp_path, given):
    own(tmp_path, program="ffffffffffff")
    given = None if given is None else str(tmp_path / given)
    with pytest.raises(
        InputError, match=r"was measured for program ffffffffffff, expected .* doubleweave profile"
    ):
        find_profile(tmp_path, manifest(), given)


def test_unknown_names_list_the_known():
    with pytest.raises(
        InputError, match=r"found 'sm1', expected a .toml file or one of generic, intel.*sm8850, x1"
    ):
        find_profile("folder", manifest(), "sm1")  # type: ignore[arg-type]
    assert GENERIC in shipped_names()


@pytest.mark.parametrize(("quantize", "weights"), [("none", "float32"), ("8da8w", "int8"), ("8da4w", "int4")])
def test_the_weights_are_those_of_the_program(tmp_path, quantize, weights):
    assert find_profile(tmp_path, manifest(quantize=quantize)).weights == weights


def test_a_programs_digest_tells_shapes_and_devices_apart():
    splits = [
        toys.split(1, rows(1, 8)),
        toys.split(2, rows(1, 8)),
        toys.split(1, rows(1, 16)),
        toys.split(1, FixedSizes((1, 8))),
        toys.split(1, rows(1, 8), static_device="npu"),
    ]
    assert len({program_id(split) for split in splits}) == len(splits)
    assert program_id(splits[0]) == program_id(toys.split(1, rows(1, 8)))
