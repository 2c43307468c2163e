"""The end of a run: the best epoch, its test, its energy, and what the run took."""

import contextlib
import math

from dataset.device_loader import DeviceLoader
from utils.checkpoint import load_checkpoint
from utils.energy import SpikeMeter, count_operations, energy_report, own_neurons, spike_statistics
from utils.errors import OtherProcessError, UserError
from utils.figures import as_image
from utils.pictures.network import firing_rate_figure, fusion_figure
from utils.pictures.recording import record
from utils.run_folder import RunFolder
from utils.signals import StopRequest
from utils.training.engine import evaluate
from utils.training.fit import TrainingState


def score(
    state: TrainingState, loader: DeviceLoader, run: RunFolder, epochs: int, protocol: dict,
    meter: SpikeMeter | None = None,
) -> dict | None:  # fmt: skip
    """Test the network after `epochs` epochs; the result is printed and written to test.json with its protocol. None
    if a signal cut the test short. meter: counts the spikes of the clips."""
    with StopRequest() as stop, meter or contextlib.nullcontext():
        scored = evaluate(state.model, loader, state.runtime, should_stop=stop.requested)
    if scored is None:
        print(f"stopped by {stop.name or 'a signal to another process'} in the test; --resume auto tests again")
        return None
    state.runtime.from_main(run.write_result, {"after_epochs": epochs, **protocol, **scored})
    counts, selected = scored["counts"], protocol.get("selected_on")
    print(
        f"test after {epochs} epochs: clip top-1 {scored['clip_top1']:.2f} %, video top-1 {scored['video_top1']:.2f} % "
        f"({counts['video_top1']} of {counts['videos']}), top-5 {scored['video_top5']:.2f} %"
        f"{f', epoch selected on {selected}' if selected else ''}"
    )
    return scored


def conclude(
    state: TrainingState, eval_loader: DeviceLoader, test_loader: DeviceLoader, run: RunFolder, *, evaluated_on: str,
    protocol: dict, counts_energy: bool,
) -> None:  # fmt: skip
    """Report the best epoch and what the run took. The network of the best epoch is tested if it was chosen on
    validation videos, not on those of the test, or for its energy (`counts_energy`)."""
    if state.best["epoch"] is None:
        print(f"no epoch was left to train: the checkpoint is at epoch {state.position.epoch}")
        return
    epochs, on_test_videos = state.best["epoch"] + 1, eval_loader is test_loader
    if on_test_videos:
        print(
            f"best {evaluated_on} video top-1 {state.best['video_top1']:.2f} % at epoch {epochs}, "
            f"{protocol['views']} x {protocol['crops']} clips a video: selected on the {evaluated_on} set "
            "itself, so optimistic; --val-fraction selects without it"
        )
    else:
        print(f"best epoch, selected on validation videos: {epochs}")
    closing = {"best_epoch": state.best["epoch"], "video_top1": state.best["video_top1"]}
    closing |= state.runtime.from_main(_cost, state, run)
    if counts_energy or not on_test_videos:
        state.model.load_state_dict(state.runtime.from_main(load_checkpoint, run.best)["model"])
        meter = SpikeMeter(state.model) if counts_energy else None
        selected = {"selected_on": "these videos" if on_test_videos else "validation videos"}
        scored = score(state, test_loader, run, epochs, selected | protocol, meter)
        if scored is None:
            return
        closing["video_top1"] = scored["video_top1"]
        if meter is not None:
            closing |= _energy(state, meter, protocol)
    state.runtime.from_main(run.add_closing, closing)
    energy = f", {closing['energy']['total_mj']:.2f} mJ a clip by estimate" if "energy" in closing else ""
    print(
        f"run: {closing['device_hours']:.2f} device-hours, {closing['clips_per_second']:.1f} training clips/s, "
        f"{closing['peak_memory_bytes'] / 2**30:.2f} GiB at most{energy}"
    )
    if counts_energy:
        state.runtime.from_main(_draw_network, state, test_loader, run)


def _energy(state: TrainingState, meter: SpikeMeter, protocol: dict) -> dict:
    """{"energy": the report}, or nothing for neurons whose spikes are not 0 and 1."""
    try:
        sums = state.runtime.sum(state.runtime.in_all(meter.sums))
    except OtherProcessError:
        return {}
    except UserError as error:
        print(f"note: {error}; the run ends without it")
        return {}
    counts = count_operations(state.model, protocol["frames"], protocol["size"])
    spikes = spike_statistics(sums, meter.layers)
    return {"energy": energy_report(counts, spikes, neurons=own_neurons(state.model))}


def _cost(state: TrainingState, run: RunFolder) -> dict:
    """What the whole run took, from its first start on."""
    epochs = run.metrics()
    # An epoch that was stopped in its evaluation has no rate of its own.
    rated = [epoch for epoch in epochs if epoch["clips_per_second"] > 0]
    seconds = sum(epoch["train_clips"] / epoch["clips_per_second"] for epoch in rated)
    return {
        "device_hours": state.seconds() * state.runtime.count / 3600,
        "clips_per_second": sum(epoch["train_clips"] for epoch in rated) / (seconds or math.nan),
        "peak_memory_bytes": max(epoch["peak_memory_bytes"] for epoch in epochs),
    }


def _draw_network(state: TrainingState, loader: DeviceLoader, run: RunFolder) -> None:
    """Firing rates, and where the SNN looks, for a few clips at the end of a run."""
    try:
        clips = loader.first_clips(4)
    except UserError:  # --strict: a video that the test has read is gone
        return
    if not len(clips.labels):
        return
    batch = loader.split(clips)
    with state.runtime.autocast():
        recording = record(state.model, batch.key, batch.residual)
    if recording.spikes:
        run.add_picture("firing_rates", as_image(firing_rate_figure(recording)), state.position.epoch)
    if recording.fusion:
        first_segments = range(0, len(recording.key), recording.key_frames)
        run.add_picture(recording.fusion, as_image(fusion_figure(recording, first_segments)), state.position.epoch)
