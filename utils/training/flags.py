"""What both training scripts check of their flags, before anything is read or written."""

import argparse

from dataset.residual import check_stride
from models.respike import SIZE_MULTIPLE
from utils.errors import UserError

_LEAST = {
    "frame_stride": 1, "views": 1, "workers": 0, "epochs": 1, "start_epoch": 0, "batch_size": 1, "warmup_epochs": 0,
    "accumulate": 1, "learning_rate": 0, "weight_decay": 0, "checkpoint_minutes": 0, "keep": 1,
}  # fmt: skip


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for the first flag whose value cannot work."""
    check_stride(args.time, args.stride)
    if args.size < SIZE_MULTIPLE or args.size % SIZE_MULTIPLE:
        nearest = max(1, round(args.size / SIZE_MULTIPLE)) * SIZE_MULTIPLE
        raise UserError(f"--size must be a multiple of {SIZE_MULTIPLE}, got {args.size}; the nearest is {nearest}")
    for flag, low in _LEAST.items():
        if not getattr(args, flag) >= low:
            raise UserError(f"{_name(flag)} must be at least {low}, got {getattr(args, flag)}")
    for flag in ("val_fraction", "label_smoothing"):
        if not 0 <= getattr(args, flag, 0) < 1:
            raise UserError(f"{_name(flag)} must be at least 0 and below 1, got {getattr(args, flag)}")
    if args.clip_norm is not None and not args.clip_norm > 0:
        raise UserError(f"--clip-norm must be positive, got {args.clip_norm}")
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start_epoch {args.start_epoch} leaves none of --epochs {args.epochs} to train")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be at least 0 and below 2^63, got {args.seed}")
    if args.resume and args.start_epoch:
        raise UserError("--start_epoch: a resumed run continues at its checkpoint's epoch; give one of the two")
    if args.test_only and not args.resume:
        raise UserError("--test-only: which weights? Name a checkpoint with --resume PATH, or --resume auto")


def _name(flag: str) -> str:
    return f"--{flag.replace('_', '-')}"
