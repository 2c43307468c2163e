"""SpikingJelly is compared with where it is installed."""

import pytest


def skip_without_spikingjelly(backend: str = "spikingjelly") -> None:
    """Skip the test that runs if `backend` is SpikingJelly's and it, or loguru that it imports, is not installed."""
    if backend == "spikingjelly":
        pytest.importorskip("spikingjelly.activation_based.neuron", exc_type=ImportError)
