"""Flags and DEFAULTS: an edited value is checked as a typed one."""

import argparse
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

import train_fusion
import train_kinetics
from utils.errors import UserError
from utils.runtime import ALONE
from utils.training.flags import NOT_TRAINING_FLAGS, begin_run, check_epoch, keyword_arguments

SCRIPTS = pytest.mark.parametrize("script", [train_fusion, train_kinetics], ids=lambda script: script.__name__)


def parsed(monkeypatch, script, *words: str, **edited):
    monkeypatch.setattr(script, "DEFAULTS", script.DEFAULTS | edited)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    return script.parse_args()


@SCRIPTS
def test_every_default_is_a_flag_and_every_flag_has_a_default(monkeypatch, script):
    args = vars(parsed(monkeypatch, script))
    assert set(args) - set(script.DEFAULTS) == {"resume", "test_only", "overwrite", "index_dir"}
    found = {name for name, value in script.DEFAULTS.items() if args[name] != value}
    assert found <= {"workers", "device", "run_dir", "train_list", "val_list"}  # chosen by machine and data set


@SCRIPTS
def test_an_edited_default_counts_and_a_typed_flag_counts_more(monkeypatch, script):
    args = parsed(monkeypatch, script, "-lr", "0.3", "--no-amp", tau=2.0, learning_rate=0.2, epochs=7, downsample=True)
    assert (args.tau, args.learning_rate, args.epochs, args.downsample, args.amp) == (2.0, 0.3, 7, True, False)
    assert parsed(monkeypatch, script).tau == 2.0


BAD = {
    "choice": (dict(model="resnet20"), "--model", "resnet20", r"--model: invalid choice: 'resnet20'"),
    "name": (dict(tiem=8), "--tiem", "8", r"unrecognized arguments: --tiem"),
    "range": (dict(views=0), "--views", "0", r"--views must be at least 1, got 0"),
    "type": (dict(time="many"), "-T", "many", r"-T/--time: invalid int value: 'many'"),
    "nan": (dict(learning_rate=float("nan")), "-lr", "nan", r"--learning-rate must be at least 0, got nan"),
    "infinite": (dict(weight_decay=float("inf")), "--weight_decay", "inf", r"--weight-decay must be at least 0"),
    "fraction": (dict(momentum=1.0), "--momentum", "1", r"--momentum must be at least 0 and below 1, got 1.0"),
    "tau": (dict(tau=0.5), "--tau", "0.5", r"--tau must be at least 1, got 0.5"),
    "alpha": (dict(alpha=0.0), "--alpha", "0", r"--alpha.*positive"),
    "surrogate": (dict(surrogate="step"), "--surrogate", "step", r"--surrogate: invalid choice: 'step'"),
    "neuron": (dict(neuron="izhikevich"), "--neuron", "izhikevich", r"izhikevich: expected lif or sj.NAME"),
    "seed": (dict(seed=2**63), "--seed", str(2**63), r"--seed must be at least 0 and below"),
    "size": (dict(size=100), "--size", "100", r"--size must be a multiple of 32, got 100; the nearest is 96"),
    "clip norm": (dict(clip_norm=0.0), "--clip-norm", "0", r"--clip-norm must be positive"),
}  # fmt: skip


@SCRIPTS
@pytest.mark.parametrize("edited, flag, word, message", BAD.values(), ids=BAD.keys())
def test_a_bad_value_is_refused_alike_edited_or_typed(monkeypatch, script, edited, flag, word, message):
    complaints = []
    for words, defaults in (((), edited), ((flag, word), {})):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=message) as caught:
            parsed(patch, script, *words, **defaults)
        complaints.append(re.sub(r"=\S*", "", str(caught.value)).replace(f" {word} (", " ("))
    assert complaints[0] == complaints[1] and "\n" not in complaints[0]


@SCRIPTS
def test_a_default_of_the_wrong_kind_is_refused(monkeypatch, script):
    for edited, message in (
        ({"epochs": True}, "--epochs: expected one argument"),
        ({"amp": 1}, "--amp.*ignored explicit argument"),
    ):
        with pytest.raises(UserError, match=message), monkeypatch.context() as patch:
            parsed(patch, script, **edited)


def test_flags_of_both_scripts_mean_the_same(monkeypatch):
    words = [
        "--sampling",
        "window",
        "--frame-stride",
        "2",
        "--crops",
        "3",
        "--no-flip",
        "--views",
        "4",
        "--val-fraction",
        "0.2",
    ]
    for script in (train_fusion, train_kinetics):
        args = parsed(monkeypatch, script, *words)
        assert (args.sampling, args.frame_stride, args.crops, args.flip) == ("window", 2, 3, False)
        assert (args.views, args.val_fraction) == (4, 0.2)


def test_arguments_of_a_neuron_are_numbers_or_words():
    assert keyword_arguments("tau=2.0, decay_input=False,v_reset=None,k=3,init=abc") == {
        "tau": 2.0, "decay_input": False, "v_reset": None, "k": 3, "init": "abc"
    }  # fmt: skip
    assert keyword_arguments("") == {}
    for text in ("tau", "=2", "tau=1,tau=2", "2tau=1"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must be NAME=VALUE,\.\.\. with each name once"):
            keyword_arguments(text)


def test_every_window_goes_with_windows(monkeypatch):
    with pytest.raises(UserError, match=r"--clips-per-video all.*--sampling window"):
        parsed(monkeypatch, train_fusion, "--clips-per-video", "all", "--sampling", "segments")


def test_what_may_differ_without_a_note_is_a_flag(monkeypatch):
    flags = {*vars(parsed(monkeypatch, train_fusion)), *vars(parsed(monkeypatch, train_kinetics))}
    assert flags > NOT_TRAINING_FLAGS


def loader(*sizes: int) -> SimpleNamespace:
    """As far as `check_epoch` looks at one. sizes: of the batches, over all processes."""
    return SimpleNamespace(batches=SimpleNamespace(sizes=lambda: list(sizes)), clips=sum(sizes))


@pytest.mark.parametrize(
    "words, sizes, processes, values",
    [
        ("-T 4 --stride 4 --size 32", (8, 8, 2), 1, 2),  # the last batch counts
        ("-T 16 --stride 4 --size 32", (3, 3), 1, 12),
        ("-T 4 --stride 4 --size 64", (3,), 1, 12),
        ("-T 4 --stride 4 --size 32", (16,), 2, 8),
        ("-T 4 --stride 4 --size 32 --sync-bn", (8,), 2, 8),
        ("-T 4 --stride 4 --size 32 --snn-bn merged", (8,), 1, 8),
        ("-T 4 --stride 4 --size 32 --snn-bn merged --branches snn", (4,), 1, 12),
        ("-T 4 --stride 4 --size 32", (16,), 1, None),
        ("-T 4 --stride 4 --size 32 --sync-bn", (16,), 2, None),
        ("-T 4 --stride 4 --size 32 --snn-bn merged --freeze ann", (8,), 1, None),
        ("-T 4 --stride 4 --size 224", (1,), 1, None),
    ],
)
def test_little_for_batch_norm_to_normalise_by_is_a_note_before_the_run(
    monkeypatch, capsys, words, sizes, processes, values
):
    args = parsed(monkeypatch, train_fusion, *words.split())
    check_epoch(args, loader(*sizes), replace(ALONE, count=processes))
    out = capsys.readouterr().out
    assert (out == "") if values is None else (f"has {values} values a channel; with fewer than 16" in out)
    check_epoch(args, loader(1000), ALONE)
    assert capsys.readouterr().out == ""


def test_nothing_for_batch_norm_to_normalise_by_is_refused(monkeypatch):
    args = parsed(monkeypatch, train_fusion, "-T", "4", "--stride", "4", "--size", "32")
    with pytest.raises(UserError, match="-b: the last batch of an epoch holds one key frame of 32 x 32 pixels"):
        check_epoch(args, loader(8, 1), ALONE)


@SCRIPTS
@pytest.mark.parametrize("epochs, noted", [(2, True), (5, True), (6, False)])
def test_a_warm_up_that_takes_every_epoch_is_a_note(monkeypatch, capsys, tmp_path, script, epochs, noted):
    words = ("--warmup-epochs", "5", "--epochs", str(epochs), "--device", "cpu", "--run-dir", str(tmp_path))
    begin_run(parsed(monkeypatch, script, *words))
    assert (
        f"note: --warmup-epochs 5 of --epochs {epochs}: the learning rate rises" in capsys.readouterr().out
    ) == noted
