"""A training that was interrupted goes on from its last saved state, to the same result."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import torch

from earlyexit.atomic import atomic_path
from earlyexit.models.checkpoints import CheckpointError


class TrainingState:
    """This state of a training holds weights, optimiser, random numbers and history.

    Args:
        folder: where the state is kept; None keeps nothing.
        key: the configuration that it belongs to; a state of another key is ignored.
    """

    def __init__(self, folder: Path | None, key: dict):
        self.path = Path(folder) / "training.pt" if folder else None
        self.key = key

    def save(self, model, optimizer, log: dict) -> None:
        """Write everything that decides the coming steps; ``log`` holds what came before."""
        state = {
            "key": self.key,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "log": log,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(hashlib.sha256(content).digest() + content)

    def restore(self, model, optimizer) -> dict:
        """Load a state of the same key into the arguments, and return its log, or else an empty one.

        Raises:
            CheckpointError: the file is damaged or not a training state.
        """
        empty = {"step": 0, "history": [], "recent": [], "tokens": 0}
        if not self.path or not self.path.exists():
            return empty
        digest, content = (data := self.path.read_bytes())[:32], data[32:]
        try:
            if hashlib.sha256(content).digest() != digest:
                raise ValueError("it was changed after it was written")
            state = torch.load(io.BytesIO(content), weights_only=True)
            if state["key"] != self.key:
                return empty
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            if state["cuda_rng"]:
                torch.cuda.set_rng_state_all(state["cuda_rng"])
            return state["log"]
        except (
            RuntimeError,
            pickle.UnpicklingError,
            EOFError,
            KeyError,
            ValueError,
            TypeError,
        ) as e:
            raise CheckpointError(
                f"{self.path} is not a usable training state ({e}): delete it to start again"
            ) from e

    def delete(self) -> None:
        """Delete the state, if there is one."""
        if self.path:
            self.path.unlink(missing_ok=True)
