"""Predictions of a stream: a line a frame, until the source ends."""

import json
import statistics
import sys
import time

from dataset.live import LiveFrame, SourceError, frames_of
from models import ReSpike
from utils.prediction.clips import Clips, top
from utils.prediction.frames import FrameByFrame
from utils.runtime import Runtime

_FPS_OVER = 30  # frames that the reported frame rate is a mean over


def predict_stream(model: ReSpike, runtime: Runtime, source: str, realtime: bool, timeout: float, as_json: bool) -> int:
    """Print the prediction after each frame. Returns the exit status: 0 at the end of the source, 1 if it stalls or
    breaks, 130 if the user interrupts it.

    model: of a checkpoint, in eval mode, on the device of `runtime`.
    source, realtime, timeout: as for `dataset.live.frames_of`.
    as_json: one JSON object a line instead of text.
    """
    trained = model.trained
    if trained.sampling != "window":
        print(f"note: trained on {trained.frames} frames spread over whole videos (--sampling {trained.sampling}), "
            "a stream gives neighbouring frames", file=sys.stderr)  # fmt: skip
    centre, shown, report = Clips(trained).centre, FrameByFrame(model, runtime), StreamReport(as_json)
    try:
        for live in frames_of(source, trained.flags["frame_stride"], realtime, timeout):
            judged = shown.show(centre(live.rgb))
            report.frame(live, top(judged.probabilities, trained.classes))
    except SourceError as error:
        report.leave_line()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the usual end of an endless stream
        report.close("interrupted")
        return 130
    report.close("the source ended")
    return 0


class StreamReport:
    """Lines about the frames of a stream; on a terminal, one line that is renewed each second."""

    def __init__(self, as_json: bool):
        self._as_json, self._renews = as_json, sys.stdout.isatty() and not as_json
        self._done: list[float] = []  # when the latest frames were done
        self._latencies: list[float] = []  # of the latest thousand
        self._frames = self._dropped = 0
        self._started = self._printed = time.monotonic()

    def frame(self, live: LiveFrame, best: list[tuple[str, float]]) -> None:
        """best: of `utils.prediction.clips.top`."""
        now = time.monotonic()
        latency = 1000 * (now - live.arrived)
        self._frames, self._dropped = self._frames + 1, live.dropped
        self._latencies = [*self._latencies[-999:], latency]
        self._done = [*self._done[-_FPS_OVER:], now]
        fps = (len(self._done) - 1) / (now - self._done[0]) if len(self._done) > 1 else 0.0
        name, share = best[0] if best else (None, None)
        if self._as_json:
            print(json.dumps({
                "time": round(live.seconds, 3), "prediction": name, "probability": share,
                "latency_ms": round(latency, 1), "fps": round(fps, 2), "dropped": live.dropped,
            }), flush=True)  # fmt: skip
        elif not self._renews or now - self._printed >= 1.0:
            told = f"{name} {100 * share:.1f} %" if best else "no prediction yet"
            line = f"{live.seconds:8.2f} s  {told}  {latency:.0f} ms  {fps:.1f} frames/s  {live.dropped} dropped"
            print(f"\r\033[K{line}" if self._renews else line, end="" if self._renews else "\n", flush=True)
            self._printed = now

    def leave_line(self) -> None:
        if self._renews:
            print()

    def close(self, why: str) -> None:
        self.leave_line()
        rate = self._frames / max(1e-9, time.monotonic() - self._started)
        latency = statistics.median(self._latencies) if self._latencies else 0.0
        line = f"{why}: {self._frames} frames, {rate:.1f} frames/s, median latency {latency:.0f} ms"
        print(f"{line}, {self._dropped} dropped", file=sys.stderr if self._as_json else sys.stdout, flush=True)
