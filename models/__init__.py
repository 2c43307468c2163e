import os
from pathlib import Path

from models.baselines import FramesResNet, VideoResNet
from models.network import Network
from models.respike import ReSpike
from utils.errors import UserError
from utils.trained import TrainedNetwork, load_trained

__all__ = ["FramesResNet", "Network", "ReSpike", "VideoResNet", "load_network", "network_of"]
_NETWORKS = {network.__name__: network for network in (ReSpike, FramesResNet, VideoResNet)}


def load_network(path: str | os.PathLike, lif_backend: str = "auto") -> Network:
    """The network of a checkpoint, whichever it is; else as `Network.from_checkpoint`."""
    return network_of(load_trained(Path(path)), lif_backend)


def network_of(trained: TrainedNetwork, lif_backend: str = "auto") -> Network:
    """The network that `trained` holds, whichever it is; else as `Network.from_trained`."""
    if trained.network not in _NETWORKS:
        raise UserError(f"{trained.path}: expected one of {', '.join(_NETWORKS)}, found {trained.network}")
    return _NETWORKS[trained.network].from_trained(trained, lif_backend)
