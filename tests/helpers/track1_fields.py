"""What a Track 1 submission says of its model."""

from __future__ import annotations

FIELDS = {
    "model_name": "pico",
    "version": "v1",
    "organization": "Example Lab",
    "release_year": "2026",
    "source_type": "open_source",
    "control_type": "text_driven",
}
