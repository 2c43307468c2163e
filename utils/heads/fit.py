"""The training of one head: resumed from its checkpoint, epoch by epoch, with metrics, checkpoints and curves."""

from torch import nn, optim

from models.heads.on_features import OnFeatures
from utils.checkpoint import check_settings, kept_checkpoints, load_newest, save_checkpoint
from utils.heads.batches import ClipBatches, FeatureBatches
from utils.heads.config import Config
from utils.heads.engine import evaluate, neurons_of, train_epoch
from utils.heads.plots import save_curves
from utils.run_folder import RunFolder
from utils.signals import StopRequest


def resume(run: RunFolder, network: nn.Module, optimizer: optim.Optimizer, settings: dict) -> list[dict]:
    """Load the newest checkpoint of the run folder, if there is one, and return the metrics of its epochs.

    The learning rate and the weight decay stay those of `optimizer`. Raises UserError if the checkpoint was written
    with other `settings` or another type of optimizer.
    """
    found = load_newest(kept_checkpoints(run.path))
    if found is None:
        return []
    path, state = found
    check_settings(path, state["model_settings"], settings)
    check_settings(path, {"optimizer": state["optimizer_name"]}, {"optimizer": _name(optimizer)})
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"] | {"param_groups": optimizer.state_dict()["param_groups"]})
    print(f"resumed from {path}, after epoch {state['epoch']}")
    return state["history"]


def fit(
    network: OnFeatures,
    train_loader: FeatureBatches | ClipBatches,
    test_loader: FeatureBatches | ClipBatches,
    optimizer: optim.Optimizer,
    run: RunFolder,
    config: Config,
    history: list[dict],
    settings: dict,
) -> bool:
    """Train and test for the epochs that are left, and save a checkpoint after each.

    network: inputs -> logits [T, B, classes]; the config's train_mode chooses the neurons of `network.head`.
    config: with the number of epochs, those that are done included, and the loss.
    history: the metrics of the epochs that are done; new ones are appended.
    settings: of the network, for the checkpoint.

    Returns False if a signal stopped it in mid-epoch. The newest checkpoint is then that of the last whole epoch.
    """
    epochs = config.SNN_trainer.epochs
    with StopRequest() as stop:
        for epoch in range(len(history), epochs):
            with neurons_of(network.head, config.SNN.train_mode):
                trained = train_epoch(
                    network, train_loader.shuffled(epoch), optimizer, task=f"epoch {epoch + 1}/{epochs}",
                    steps=len(train_loader), loss=config.SNN.loss, should_stop=stop.requested,
                )  # fmt: skip
            if trained is None:
                print(f"stopped by {stop.name} in epoch {epoch + 1}; the next start begins this epoch again")
                return False
            tested = evaluate(network, test_loader, test_loader.videos)
            history.append({"epoch": epoch, **trained, **{f"test_{name}": value for name, value in tested.items()}})
            run.add_metrics(history[-1])
            print(
                f"epoch {epoch + 1}/{epochs}: loss {trained['train_loss']:.4f}, last step: training "
                f"{trained['train_last_step']:.1f} %, test {tested['last_step']:.1f} %, video {tested['video']:.1f} %",
                flush=True,
            )
            state = {
                "model_settings": settings, "model": network.state_dict(), "optimizer": optimizer.state_dict(),
                "optimizer_name": _name(optimizer), "epoch": epoch + 1, "history": history,
            }  # fmt: skip
            save_checkpoint(run.last, state, keep=2)
    save_curves(run.path / "curves.png", history, f"{config.name}: {config.SNN.head}")
    return True


def _name(optimizer: optim.Optimizer) -> str:
    return type(optimizer).__name__.lower()
