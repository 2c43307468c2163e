"""The variants by name, and variants of a user's own."""

import sys

import pytest

import train_fusion
import train_kinetics
from experiments.variants import BASE, BASELINES, RESPIKE, VARIANTS, choose
from utils.errors import UserError

LISTS = {train_fusion: [], train_kinetics: ["--dset", "list", "--train-list", "a", "--val-list", "b"]}


@pytest.mark.parametrize("name", [*VARIANTS, *BASELINES])
def test_every_variant_is_a_command_of_the_training_scripts(monkeypatch, name):
    for script, flags in LISTS.items():
        (variant,) = choose([name], flags).values()
        monkeypatch.setattr(sys, "argv", [script.__name__, *variant.flags])
        assert script.parse_args().downsample == (name in VARIANTS)


def test_respikes_flags_come_before_those_of_all_runs_and_its_own_last():
    chosen = choose([], ["--size", "64"])
    assert list(chosen) == [*VARIANTS, *BASELINES]
    assert " ".join(chosen["stride2"].flags) == f"{BASE} {RESPIKE} --size 64 --stride 2"
    assert " ".join(chosen["r3d_18"].flags) == f"{BASE} --size 64 --model r3d_18"


def test_a_variant_of_ones_own_starts_from_the_same_flags():
    chosen = choose(["cross", "wide=--model resnet50 --fusion 'a b'", "tsn=--branches frames -T 8"], ["--size", "64"])
    assert list(chosen) == ["cross", "wide", "tsn"] and chosen["wide"].changed == "--model resnet50 --fusion 'a b'"
    first = (*BASE.split(), *RESPIKE.split(), "--size", "64")
    assert chosen["wide"].flags == (*first, "--model", "resnet50", "--fusion", "a b")
    assert chosen["tsn"].flags == (*BASE.split(), "--size", "64", "--branches", "frames", "-T", "8")


def test_a_baseline_is_one_however_its_flag_is_written():
    assert " ".join(choose(["a=--model=r3d_18"], [])["a"].flags) == f"{BASE} --model=r3d_18"


def test_flags_that_cannot_be_cut_are_refused():
    with pytest.raises(UserError, match=r"^--only x=--flip 'abc: cannot be cut into flags \(No closing quotation\)"):
        choose(["x=--flip 'abc"], [])


@pytest.mark.parametrize("word", ["crss", "a/b=--stride 2", "=--stride 2", "a b="])
def test_an_unknown_variant_is_refused(word):
    with pytest.raises(
        UserError, match=r"^--only .*: expected one of ann, snn, .*r2plus1d_18, or a variant of your own"
    ):
        choose([word], [])
