"""Reading and writing the feature decoder's folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ..decoder_files import config_of, load_weights, read_config, save_decoder
from .config import FeatureDecoderConfig
from .decoder import STATISTICS, FeatureInverseDynamics
from .goal import TextEncoder


def save_feature_decoder(model: FeatureInverseDynamics, folder: str | Path, *, card: str | None = None) -> Path:
    """Network float16, statistics float32, configuration and card."""
    return save_decoder(model, folder, kind="feature", exact=STATISTICS, card=card)


def load_feature_decoder(
    folder: str | Path, device: str | torch.device = "cpu", *, text: TextEncoder | None = None
) -> FeatureInverseDynamics:
    """``text`` (default: the shipped models' sentence encoder) must make embeddings of the configuration's ``goal_dim``."""
    config = config_of(FeatureDecoderConfig, read_config(folder), "feature")
    if text is None:
        from physisforcing.worldmodel.text import TextEmbedder

        text = TextEmbedder()
    model = FeatureInverseDynamics(config, text)
    model.fingerprint = load_weights(model, folder, device)
    return model
