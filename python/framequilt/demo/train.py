"""Trains the demo model: `python -m framequilt.demo.train --resume RUN_DIR`.

Phase `tower` teaches tower and projector dense labels of single frames, phase `lm` teaches the
language model to answer. Both go on from the last checkpoint in RUN_DIR, save every few minutes
and on SIGTERM, and read RUN_DIR/control.json (see `lm_data.Plan`) while they run. With `--start
CHECKPOINT` a new run goes on from the weights and tokenizer of an exported checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from framequilt.demo.export import load_checkpoint
from framequilt.demo.lm_train import LmRun, train_lm
from framequilt.demo.model import DemoConfig
from framequilt.demo.runstate import load_state
from framequilt.demo.tower_train import train_tower

TOWER_STEPS = 2750


def begin_from(checkpoint: Path, run: Path) -> None:
    """Lays out a language-model run that continues `checkpoint` with fresh optimizer state."""
    shutil.copyfile(checkpoint / "tokenizer.json", run / "tokenizer.json")
    model, _ = load_checkpoint(checkpoint)
    work = LmRun(run, model.config)
    work.model.load_state_dict(model.state_dict())
    work.save()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resume", type=Path, required=True, metavar="RUN_DIR")
    parser.add_argument("--phase", choices=("tower", "lm", "all"), default="all")
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--lm-steps", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=int, default=50, help="steps between report lines")
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="weights of a new run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.resume.mkdir(parents=True, exist_ok=True)
    config = DemoConfig()
    if args.start is not None and not (args.resume / "lm.pt").exists():
        begin_from(args.start, args.resume)
    if args.phase in ("tower", "all") and args.start is None:
        state = load_state(args.resume / "tower.pt")
        if state is None or int(state["step"]) < args.tower_steps:
            train_tower(args.resume, config, args.tower_steps)
    if args.phase in ("lm", "all"):
        train_lm(args.resume, config, args.lm_steps, args.report)


if __name__ == "__main__":
    main()
